"""GGUF's metadata as a `ModelConfig`. Keys as llama.cpp's converter writes them; see `gguf.constants.Keys`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from fusedllm.config import ModelConfig, RopeConfig
from fusedllm.errors import CheckpointError, ConfigError
from fusedllm.model.attributes import MAX_LAYERS, Attributes, shortened
from fusedllm.weights.gguf_header import TensorEntry


@dataclass(frozen=True, slots=True)
class Architecture:
    """What llama.cpp's name of an architecture implies: whether q and k are permuted, biases, q and k norms."""

    permuted: bool = False
    attention_bias: bool = False
    qk_norm: bool = False
    window: bool = False


# Mistral is written as `llama`: the two differ in the window only.
ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "llama": Architecture(permuted=True, window=True),
        "qwen2": Architecture(attention_bias=True),
        "qwen3": Architecture(qk_norm=True),
    }
)

# Keys below the architecture's name that may only hold these values, at which they change nothing.
_FIXED: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "expert_count": (0,),
        "expert_used_count": (0,),
        "attention.causal": (True,),
        "attention.clamp_kqv": (0,),
        "attention.max_alibi_bias": (0,),
        "attention.scale": (0,),
        "use_parallel_residual": (False,),
        "logit_scale": (0, 1),
        "embedding_scale": (0, 1),
        "residual_scale": (0, 1),
        "attn_logit_softcapping": (0,),
        "final_logit_softcapping": (0,),
        "pooling_type": (0,),
        "rope.scaling.attn_factor": (1,),
        "rope.scaling.yarn_attn_factor": (1,),
        "rope.scaling.yarn_ext_factor": (-1, 1),
        "rope.scaling.yarn_log_multiplier": (0,),
    }
)
_NEUTRAL = frozenset({"rope.scaling.finetuned", "tensor_data_layout"})

# Llama 3.1's published ramp; the factor itself is read off the tensor.
_LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_ORIGINAL = 1.0, 4.0, 8192


def config_from_gguf(
    metadata: Mapping[str, Any], tensors: Mapping[str, TensorEntry], rope_freqs: np.ndarray | None
) -> ModelConfig:
    """The model that the metadata describes; `tensors` tells which optional parts it has.

    `rope_freqs` is the tensor `rope_freqs.weight`, in which the converter stores Llama 3.1's rope scaling.

    Raises:
      CheckpointError: the metadata misses a key that every model has.
      ConfigError: an unknown architecture, an impossible value, or mathematics that is not implemented; it is named.
    """
    name = metadata.get("general.architecture")
    if name is None:
        raise CheckpointError("the GGUF metadata has no 'general.architecture', so the model's family is unknown.")
    architecture = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if architecture is None:
        raise ConfigError(
            f"the GGUF architecture {shortened(name)} is not implemented; known are: {', '.join(ARCHITECTURES)}."
        )
    _refuse_parts(metadata)
    prefix = f"{name}."
    keys = Attributes(
        {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)},
        f"the GGUF metadata under {prefix!r}",
    )

    def required(key: str, high: int | None = None) -> int:
        value = keys.integer(key, None) if high is None else keys.integer(key, None, high=high)
        if value is None:
            raise CheckpointError(f"the GGUF metadata has no {prefix + key!r}.")
        return value

    hidden_size, num_heads = required("embedding_length"), required("attention.head_count")
    num_layers = required("block_count", high=MAX_LAYERS)
    max_position = required("context_length")
    epsilon = keys.number("attention.layer_norm_rms_epsilon", None, above=0)
    if epsilon is None:
        raise CheckpointError(f"the GGUF metadata has no {prefix + 'attention.layer_norm_rms_epsilon'!r}.")
    head_dim = keys.integer("attention.key_length", None)
    if head_dim is None:
        if hidden_size % num_heads:
            raise ConfigError(f"the embedding length {hidden_size} is not a multiple of the {num_heads} heads.")
        head_dim = hidden_size // num_heads
    keys.expect("attention.value_length", head_dim)
    keys.expect("rope.dimension_count", head_dim)
    window = keys.integer("attention.sliding_window", None, low=0) if architecture.window else None
    keys.expect("attention.sliding_window", 0)

    def has(part: str) -> bool:
        return any(f"blk.{layer}.{part}.bias" in tensors for layer in range(num_layers))

    config = ModelConfig(
        family="mistral" if name == "llama" and window else name,
        vocab_size=_vocab_size(keys, metadata, tensors),
        hidden_size=hidden_size,
        intermediate_size=required("feed_forward_length"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=keys.integer("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        max_position=max_position,
        rms_norm_eps=epsilon,
        rope=_rope(keys, head_dim, max_position, rope_freqs),
        tie_embeddings="output.weight" not in tensors,
        attention_bias=architecture.attention_bias or has("attn_q"),
        attention_output_bias=has("attn_output"),
        mlp_bias=has("ffn_gate") or has("ffn_up") or has("ffn_down"),
        qk_norm=architecture.qk_norm,
        sliding_windows=(window or None,) * num_layers,
        **_special_tokens(metadata),
    )
    for key, allowed in _FIXED.items():
        keys.expect(key, *allowed)
    keys.drop(_NEUTRAL)
    keys.finish()
    return config


def _refuse_parts(metadata: Mapping[str, Any]) -> None:
    general = Attributes(metadata, "the GGUF metadata")
    kind = general.string("general.type", "model")
    if kind != "model":
        raise ConfigError(f"the GGUF file is of the type {shortened(kind)}, a model was expected.")
    parts = general.integer("split.count", 1, low=0)
    if parts > 1:
        raise ConfigError(f"the GGUF file is one of {parts} parts ('split.count'); merge them with llama-gguf-split.")


def _vocab_size(keys: Attributes, metadata: Mapping[str, Any], tensors: Mapping[str, TensorEntry]) -> int:
    """The rows of the embedding: older files don't write the size, and a vocabulary may be shorter than its matrix."""
    written = keys.integer("vocab_size", None)
    embedding = tensors.get("token_embd.weight")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if written is not None:
        return written
    if embedding is not None:
        return embedding.shape[0]
    if isinstance(tokens, list) and tokens:
        return len(tokens)
    raise CheckpointError("the GGUF file holds neither a vocabulary nor 'token_embd.weight'.")


def _special_tokens(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The beginning token, and the two that end a generation: end of sequence, and end of turn where it differs."""
    tokenizer = Attributes(metadata, "the GGUF metadata")
    ends = [tokenizer.integer(f"tokenizer.ggml.{name}_token_id", None, low=0) for name in ("eos", "eot", "eom")]
    return {
        "bos_token_id": tokenizer.integer("tokenizer.ggml.bos_token_id", None, low=0),
        "eos_token_ids": tuple(dict.fromkeys(end for end in ends if end is not None)),
    }


def _rope(keys: Attributes, head_dim: int, max_position: int, rope_freqs: np.ndarray | None) -> RopeConfig:
    theta = keys.number("rope.freq_base", 10_000.0, above=1)
    # llama.cpp takes a factor without a type as linear; files older than `scaling.type` have `scale_linear`.
    older = keys.number("rope.scale_linear", 0.0, above=-1)
    factor = keys.number("rope.scaling.factor", older, above=-1) or 1.0
    kind = keys.string("rope.scaling.type", "linear")
    original = keys.integer("rope.scaling.original_context_length", None)
    fast = keys.number("rope.scaling.yarn_beta_fast", RopeConfig().beta_fast, above=0)
    slow = keys.number("rope.scaling.yarn_beta_slow", RopeConfig().beta_slow, above=0)
    if kind not in ("none", "linear", "yarn"):
        raise ConfigError(
            f"the rope scaling {shortened(kind)} of the GGUF file is not implemented; known: linear, yarn."
        )
    stretched = kind == "yarn" or (kind == "linear" and factor != 1)
    if rope_freqs is not None and not np.all(rope_freqs == 1):
        if stretched:
            raise ConfigError(
                f"the GGUF file has 'rope_freqs.weight' and {kind} rope scaling; only one is implemented."
            )
        return _llama3(theta, head_dim, original or _LLAMA3_ORIGINAL, rope_freqs)
    if kind == "yarn":
        return RopeConfig(theta, "yarn", factor, original or max_position, beta_fast=fast, beta_slow=slow)
    return RopeConfig(theta, "linear", factor) if stretched else RopeConfig(theta)


def _llama3(theta: float, head_dim: int, original: int, rope_freqs: np.ndarray) -> RopeConfig:
    """Llama 3.1's scaling, recovered from the divisors of the frequencies that it makes."""
    from fusedllm.model.rope import inverse_frequencies

    found = rope_freqs.astype(np.float32)
    factor = float(found.max()) if found.size else 0.0
    if found.shape == (head_dim // 2,) and np.isfinite(factor) and factor > 1:
        rope = RopeConfig(theta, "llama3", factor, original, _LLAMA3_LOW, _LLAMA3_HIGH)
        wanted = inverse_frequencies(RopeConfig(theta), head_dim) / inverse_frequencies(rope, head_dim)
        # Both sides are a few float32 operations deep; a different ramp is off by percents.
        if np.allclose(found, wanted, rtol=1e-4, atol=0):
            return rope
    raise ConfigError(
        "the tensor 'rope_freqs.weight' of the GGUF file is not Llama 3.1's rope scaling, which is the only one "
        "implemented in this form."
    )
