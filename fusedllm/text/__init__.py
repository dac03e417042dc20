"""Text in, token ids out, and back: tokenizers, chat templates, incremental detokenizing. Knows no model and no jax."""
