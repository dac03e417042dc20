"""`quantize` with Pallas: each program finds the scales of a group in some rows, then rounds its weights."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from fusedllm.kernels.grouped import GroupedScheme
from fusedllm.kernels.quantize import largest_code, round_up
from fusedllm.kernels.triton_tiles import Span, launch, load, round_to_even, store, store_codes, to_float8
from fusedllm.qarray import QuantArray

# Weights of a program at a time, and columns of a group that is a whole row: 32 weights for each thread of four warps.
TILE = 4096
COLUMNS = 1024
WARPS = 4


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def quantize_triton(weights: jax.Array, scheme: GroupedScheme, scale_dtype: np.dtype, interpret: bool) -> QuantArray:
    """`weights` `[out, in]` in `scheme`, which is one that `why_not_codes` has nothing against."""
    rows, width = weights.shape
    groups = scheme.groups(width)
    columns = min(scheme.group_size or COLUMNS, COLUMNS)
    tile = (TILE // columns, columns)
    shapes = [(scheme.row_bytes(width), np.dtype(np.uint8)), (groups, scale_dtype)]
    if not scheme.symmetric:
        shapes.append((groups, scale_dtype))
    out = [jax.ShapeDtypeStruct((rows, count), dtype) for count, dtype in shapes]
    kernel = functools.partial(_quantize_tile, scheme=scheme, tile=tile, scale_dtype=scale_dtype)
    grid = (pl.cdiv(rows, tile[0]), groups)
    values, scales, *zeros = launch(kernel, grid, out, weights, warps=WARPS, stages=1, interpret=interpret)
    return QuantArray(values, scales, zeros[0] if zeros else None, scheme, (rows, width))


def _quantize_tile(
    weights: Any, values: Any, scales: Any, *zeros: Any, scheme: GroupedScheme, tile: tuple[int, int], scale_dtype: Any
) -> None:
    rows, group = Span(pl.program_id(0), tile[0]), Span(pl.program_id(1), 1)
    parts = pl.cdiv(scheme.group_size or weights.shape[1], tile[1])

    def part(index: Any) -> tuple[Span, jax.Array]:
        columns = Span(group.index * parts + index, tile[1])
        return columns, load(weights, rows, columns).astype(jnp.float32)

    def widen(index: Any, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        _, found = part(index)
        return jnp.minimum(ends[0], jnp.min(found, axis=1)), jnp.maximum(ends[1], jnp.max(found, axis=1))

    nothing = jnp.zeros(tile[0], jnp.float32)
    low, high = jax.lax.fori_loop(0, parts, widen, (nothing, nothing))
    if scheme.symmetric:
        reach = jnp.maximum(-low, high) * np.float32(1 / largest_code(scheme))
    else:
        reach = (high - low) * np.float32(1 / scheme.highest)
    scale = round_up(reach, scale_dtype, keep=lambda nearest: nearest)
    wide = scale.astype(jnp.float32)
    inverse = jnp.where(wide > 0, 1 / wide, 0)
    zero = jnp.full_like(inverse, scheme.center)
    if not scheme.symmetric:
        zero = _between(round_to_even(-low * inverse), scheme)
        store(zeros[0], rows, group, zero[:, None])
    store(scales, rows, group, scale[:, None])

    def write(index: Any, done: int) -> int:
        columns, found = part(index)
        steps = found * inverse[:, None]
        if scheme.codes == "float8":
            codes = to_float8(steps)
        else:
            codes = _between(round_to_even(steps) + zero[:, None], scheme).astype(jnp.int32)
        store_codes(values, scheme.bits, rows, columns, codes)
        return done

    jax.lax.fori_loop(0, parts, write, 0)


def _between(codes: jax.Array, scheme: GroupedScheme) -> jax.Array:
    return jnp.minimum(jnp.maximum(codes, np.float32(scheme.lowest)), np.float32(scheme.highest))
