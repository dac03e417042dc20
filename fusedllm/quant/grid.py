"""`Grid`: the scales and zero points of a matrix's groups, and the codes that lie next to weights on it.

Methods choose a grid first, rounded as it will be stored, and then codes on it: what they optimize is what is stored.
Weights are `groups` here, float32 `[out, groups, size]`, a row padded with zeros to whole groups.
"""

from __future__ import annotations

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from fusedllm.kernels.grouped import LARGEST_FLOAT8, GroupedScheme, pack
from fusedllm.kernels.quantize import quantize
from fusedllm.qarray import QuantArray


@flax.struct.dataclass
class Grid:
    """Scales and zero points, float32 `[out, groups]`, of which each is a number of the stored dtype."""

    scale: Float[Array, "out groups"]
    zero: Float[Array, "out groups"]


@functools.partial(jax.jit, static_argnums=1)
def as_groups(weights: jax.Array, scheme: GroupedScheme) -> jax.Array:
    """`weights`, `[out, in]` or one vector of `in` elements, as `[out, groups, size]` in float32."""
    rows, width = jnp.atleast_2d(weights).shape
    padding = scheme.padded(width) - width
    padded = jnp.pad(jnp.atleast_2d(weights).astype(jnp.float32), ((0, 0), (0, padding)))
    return padded.reshape(rows, scheme.groups(width), -1)


def nearest_grid(weights: jax.Array, scheme: GroupedScheme, scale_dtype: DTypeLike) -> Grid:
    """The grid of `kernels.quantize`, from each group's extremes; `weights` is `[out, in]`."""
    array = quantize(weights, scheme, scale_dtype=scale_dtype, implementation="xla")
    assert array.scales is not None
    scale = array.scales.astype(jnp.float32)
    zero = jnp.full_like(scale, scheme.center) if array.zeros is None else array.zeros.astype(jnp.float32)
    return Grid(scale, zero)


def stored(numbers: jax.Array, scale_dtype: DTypeLike) -> jax.Array:
    """`numbers` rounded to the nearest of `scale_dtype`, in float32."""
    return numbers.astype(scale_dtype).astype(jnp.float32)


def inverse(scale: jax.Array) -> jax.Array:
    """`1 / scale`, and 0 where the scale is 0: all codes are the zero point there."""
    return jnp.where(scale > 0, 1 / scale, 0)


def nearest_codes(steps: jax.Array, zero: jax.Array, scheme: GroupedScheme) -> jax.Array:
    """The codes nearest to `steps + zero`, as float32; `steps` are weights divided by their scales."""
    if scheme.codes == "float8":
        # The cast makes what is above the largest number no number.
        return jnp.clip(steps, -LARGEST_FLOAT8, LARGEST_FLOAT8).astype(jnp.float8_e4m3fn).astype(jnp.float32)
    return jnp.clip(jnp.round(steps + zero), scheme.lowest, scheme.highest)


@functools.partial(jax.jit, static_argnums=2)
def codes_on(grid: Grid, groups: jax.Array, scheme: GroupedScheme) -> jax.Array:
    """The nearest codes of `groups`, float32 of the same shape."""
    return nearest_codes(groups * inverse(grid.scale)[..., None], grid.zero[..., None], scheme)


def values_of(grid: Grid, codes: jax.Array) -> jax.Array:
    """What `codes` of that shape stand for."""
    return grid.scale[..., None] * (codes - grid.zero[..., None])


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def as_array(grid: Grid, codes: jax.Array, scheme: GroupedScheme, width: int, scale_dtype: DTypeLike) -> QuantArray:
    """The `QuantArray` of `grid` and of `codes`, float32 `[out, groups, size]` of rows of `width` weights."""
    rows = codes.shape[0]
    flat = codes.reshape(rows, -1)
    if scheme.codes == "float8":
        values = jax.lax.bitcast_convert_type(flat.astype(jnp.float8_e4m3fn), jnp.uint8)
    else:
        values = pack(jnp, flat.astype(jnp.int32), scheme.bits)
    dtype = np.dtype(scale_dtype)
    zeros = None if scheme.symmetric else grid.zero.astype(dtype)
    return QuantArray(values, grid.scale.astype(dtype), zeros, scheme, (rows, width))
