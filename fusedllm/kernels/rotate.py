"""`rotate`: the rotation of queries and keys by rotary position embedding's angles."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def rotate(
    x: Float[Array, "batch seq heads head_dim"],
    cos: Float[Array, "batch seq half"],
    sin: Float[Array, "batch seq half"],
) -> Float[Array, "batch seq heads head_dim"]:
    """`x` with element `i` and element `i + head_dim / 2` rotated as a pair (HF's layout), computed in float32."""
    cos, sin = cos[:, :, None], sin[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
