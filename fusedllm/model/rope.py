"""Rotary position embedding: inverse frequencies with their scalings, and angles."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fusedllm.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Radians per position of each rotated pair, float32 `[head_dim / 2]`, with the scaling of `rope` applied."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    plain = (1.0 / np.float32(rope.theta) ** exponents).astype(np.float32)
    if rope.kind == "linear":
        return plain / np.float32(rope.factor)
    if rope.kind == "llama3":
        return _llama3(plain, rope)
    if rope.kind == "yarn":
        return _yarn(plain, rope, head_dim)
    return plain


def attention_factor(rope: RopeConfig) -> float:
    """What cos and sin are multiplied by: YaRN's temperature (arXiv:2309.00071, section 3.4), otherwise 1."""
    if rope.kind != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor

    def temperature(scale: float = 1.0) -> float:
        return 0.1 * scale * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.mscale and rope.mscale_all_dim:
        return temperature(rope.mscale) / temperature(rope.mscale_all_dim)
    return temperature()


def cos_sin(
    rope: RopeConfig, head_dim: int, positions: Int[Array, "batch seq"]
) -> tuple[Float[Array, "batch seq half"], Float[Array, "batch seq half"]]:
    """Cosine and sine of each pair's angle at `positions`, float32."""
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(inverse_frequencies(rope, head_dim))
    factor = attention_factor(rope)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def _llama3(plain: np.ndarray, rope: RopeConfig) -> np.ndarray:
    """Llama 3.1: long wavelengths divided by `factor`, short ones kept, a linear ramp between."""
    assert rope.original_max_position is not None
    wavelength = 2 * math.pi / plain
    turns = rope.original_max_position / wavelength
    keep = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1)
    return ((1 - keep) * plain / rope.factor + keep * plain).astype(np.float32)


def _yarn(plain: np.ndarray, rope: RopeConfig, head_dim: int) -> np.ndarray:
    """arXiv:2309.00071, section 3.2: pairs of more than `beta_fast` turns are kept, below `beta_slow` divided."""
    original = rope.original_max_position
    assert original is not None

    def pair_that_turns(times: float) -> float:
        return head_dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    divided = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    return (plain / rope.factor * divided + plain * (1 - divided)).astype(np.float32)
