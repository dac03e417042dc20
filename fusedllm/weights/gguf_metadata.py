"""A model's configuration and tokenizer as GGUF metadata: the inverse of `gguf_config.py`.

What is written is read back by `config_from_gguf` before any tensor is: a configuration that a GGUF can't express is
refused, and none is changed in silence.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fusedllm.config import ModelConfig, RopeConfig
from fusedllm.errors import ConfigError
from fusedllm.model.attributes import shortened
from fusedllm.text.data import TokenizerData
from fusedllm.text.special import END_OF_GENERATION_TEXTS
from fusedllm.weights.gguf_config import config_from_gguf
from fusedllm.weights.gguf_header import TensorEntry

# Family -> llama.cpp's name of the architecture.
ARCHITECTURE_OF: Mapping[str, str] = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}

# Optional parts of a layer, and the architectures in which llama.cpp has them.
_PARTS: Mapping[str, tuple[str, ...]] = {
    "attention_bias": ("llama", "qwen2"),
    "attention_output_bias": ("llama",),
    "mlp_bias": ("llama",),
    "qk_norm": ("qwen3",),
}
# Llama 3.1's ramp, which every reader of its rope tensor assumes, and the trained length that needs no mention.
_LLAMA3_RAMP, _LLAMA3_ORIGINAL = (1.0, 4.0), 8192
# There are keys for these numbers, and llama.cpp does not read them for any architecture that is written here.
_YARN_BETAS = (RopeConfig().beta_fast, RopeConfig().beta_slow)
# Tokens that end a generation have three places.
_ENDS = ("eos", "eot", "eom")
_TOKENIZER = "tokenizer.ggml."


def architecture_of(config: ModelConfig) -> str:
    """llama.cpp's name of the model's architecture.

    Raises:
      ConfigError: it has none, or it has no place there for a part of this model.
    """
    name = ARCHITECTURE_OF.get(config.family)
    if name is None:
        known = ", ".join(ARCHITECTURE_OF)
        raise ConfigError(f"GGUF has no architecture for the family {config.family!r} here; known are: {known}.")
    for part, having in _PARTS.items():
        if getattr(config, part) and name not in having:
            raise ConfigError(f"llama.cpp's {name} has no {part}, which this model has; it can't be written as GGUF.")
    if config.rope.kind == "llama3" and name != "llama":
        raise ConfigError(f"llama.cpp's {name} has no llama3 rope scaling; this model can't be written as GGUF.")
    return name


def metadata_of(
    config: ModelConfig, tokenizer: TokenizerData | None, tensors: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """GGUF keys to plain values, for a file with `tensors` (GGUF's names, shapes).

    Raises:
      ConfigError: an attribute that GGUF can't express, which is named.
      TokenizerError: a tokenizer that GGUF can't hold.
    """
    name = architecture_of(config)
    values: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope.theta),
        **_rope(config.rope),
    }
    window = next(iter(config.sliding_windows), None)
    if window is not None and name == "llama":
        values["attention.sliding_window"] = window
    metadata = {"general.architecture": name, "general.type": "model"}
    metadata |= {f"{name}.{key}": _as_stored(value) for key, value in values.items()}
    metadata |= _vocabulary(config, tokenizer)
    _check(config, metadata, tensors)
    return metadata


def rope_factors(config: ModelConfig) -> np.ndarray | None:
    """What Llama 3.1's scaling divides each pair's frequency by, float32 `[head_dim / 2]`: `rope_freqs.weight`."""
    from fusedllm.model.rope import inverse_frequencies

    if config.rope.kind != "llama3":
        return None
    plain = inverse_frequencies(RopeConfig(config.rope.theta), config.head_dim)
    factors: np.ndarray = plain / inverse_frequencies(config.rope, config.head_dim)
    return factors


def _rope(rope: RopeConfig) -> dict[str, Any]:
    if rope.kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope.factor)}
    if rope.kind == "llama3":
        if (rope.low_freq_factor, rope.high_freq_factor) != _LLAMA3_RAMP:
            raise ConfigError(
                f"a GGUF holds llama3 rope scaling from {_LLAMA3_RAMP[0]} to {_LLAMA3_RAMP[1]} turns only, and this "
                f"model's is from {rope.low_freq_factor} to {rope.high_freq_factor}."
            )
        original = rope.original_max_position
        return {} if original == _LLAMA3_ORIGINAL else {"rope.scaling.original_context_length": original}
    if rope.kind == "yarn":
        if (rope.beta_fast, rope.beta_slow) != _YARN_BETAS:
            raise ConfigError(
                f"llama.cpp knows YaRN with beta_fast and beta_slow of {_YARN_BETAS} only, and this model has "
                f"{(rope.beta_fast, rope.beta_slow)}; it can't be written as GGUF."
            )
        return {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope.factor),
            "rope.scaling.original_context_length": rope.original_max_position,
        }
    return {}


def _vocabulary(config: ModelConfig, tokenizer: TokenizerData | None) -> dict[str, Any]:
    """The tokenizer's keys, with the tokens that the configuration names where the tokenizer names none."""
    from fusedllm.text.gguf_vocab_write import tokenizer_to_gguf

    if tokenizer is None:
        metadata: dict[str, Any] = {f"{_TOKENIZER}model": "none"}
    else:
        metadata = tokenizer_to_gguf(tokenizer, config.vocab_size)
    if config.bos_token_id is not None:
        metadata.setdefault(f"{_TOKENIZER}bos_token_id", config.bos_token_id)
    keys = [f"{_TOKENIZER}{name}_token_id" for name in _ENDS]
    named = {metadata[key] for key in keys if key in metadata}
    unnamed = [token for token in config.eos_token_ids if token not in named]
    free = [key for key in keys if key not in metadata]
    metadata |= zip(free, unnamed, strict=False)
    for token in unnamed[len(free) :]:
        if tokenizer is None or metadata[f"{_TOKENIZER}tokens"][token] not in END_OF_GENERATION_TEXTS:
            raise ConfigError(f"a GGUF has places for three tokens that end a generation, and {token} is one more.")
    return metadata


def _as_stored(value: Any) -> Any:
    """A float as it will be read: the shortest text of its float32."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _check(config: ModelConfig, metadata: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]) -> None:
    """Compares `config` with what a reader of `metadata` will find."""
    entries = {name: TensorEntry(name, shape, "F32", 0, 0) for name, shape in tensors.items()}
    found = config_from_gguf(metadata, entries, rope_factors(config))
    wanted = dataclasses.replace(config, rope=_plainest(config.rope))
    # Mistral is llama with a window; and what ends a generation the tokenizer says too, in another order.
    for name in {field.name for field in dataclasses.fields(ModelConfig)} - {"family", "bos_token_id", "eos_token_ids"}:
        one, other = getattr(wanted, name), getattr(found, name)
        if _as_stored(one) != _as_stored(other):
            raise ConfigError(
                f"a GGUF of the architecture {metadata['general.architecture']} can't express {name} = "
                f"{shortened(one)}; it would read back as {shortened(other)}."
            )


def _plainest(rope: RopeConfig) -> RopeConfig:
    """`rope` without what its kind does not use, and without an attention factor that is YaRN's own."""
    from fusedllm.model.rope import attention_factor

    plain = RopeConfig(rope.theta)
    if rope.kind == "linear":
        return plain if rope.factor == 1 else RopeConfig(rope.theta, "linear", rope.factor)
    if rope.kind == "llama3":
        return RopeConfig(rope.theta, "llama3", rope.factor, rope.original_max_position)
    if rope.kind == "yarn":
        without = dataclasses.replace(rope, attention_factor=None, mscale=None, mscale_all_dim=None)
        return without if math.isclose(attention_factor(rope), attention_factor(without)) else rope
    return plain
