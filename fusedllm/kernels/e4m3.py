"""Codes of e4m3, the 8-bit floating point number that a KV cache may hold: rounding to them, and reading them.

A sign, four bits of exponent and three of fraction; no infinity, and one magnitude, 0x7f, that is no number (FP8
Formats for Deep Learning, arXiv:2209.05433; OCP 8-bit Floating Point Specification 1.0). Codes are kept as uint8: XLA's
CPU backend does not write into an array of an 8-bit floating point dtype in place, but keeps wider copies of the whole.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

DTYPE = jnp.float8_e4m3fn
# Of arrays that hold codes.
CODES = jnp.uint8
# The largest number.
MOST = 448.0


def to_e4m3(x: Float[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    """`x` saturated to +-448, infinity too, and rounded to the nearest, ties to even; what is no number stays none."""
    return lax.bitcast_convert_type(jnp.clip(x, -MOST, MOST).astype(DTYPE), CODES)


def from_e4m3(codes: UInt8[Array, "*shape"], dtype: DTypeLike) -> Float[Array, "*shape"]:
    """The numbers of `codes`, which float32, bfloat16 and float16 hold exactly."""
    return lax.bitcast_convert_type(codes, DTYPE).astype(dtype)
