"""Rewrites of a model's weights before it runs: other numbers, the same logits up to rounding."""
