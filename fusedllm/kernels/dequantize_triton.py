"""`dequantize` with Pallas: each program decodes a tile of rows and columns."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from fusedllm.kernels.grouped import GroupedScheme
from fusedllm.kernels.triton_tiles import Span, from_float8, group_of, launch, load, load_codes, store
from fusedllm.qarray import QuantArray

# Weights of a program, and columns where a row is one group: 32 weights for each thread of four warps.
TILE = 4096
COLUMNS = 256
WARPS = 4


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def dequantize_triton(
    array: QuantArray, dtype: np.dtype, interpret: bool, native_float8: bool | None = None
) -> jax.Array:
    """The values of `array` in `dtype`; its scheme is one that `why_not_codes` has nothing against.

    `native_float8` is what `from_float8` asks.
    """
    scheme = array.scheme
    assert isinstance(scheme, GroupedScheme)
    width = array.shape[-1]
    buffers = [x.reshape(-1, x.shape[-1]) for x in (array.values, array.scales, array.zeros) if x is not None]
    columns = min(scheme.group_size or COLUMNS, COLUMNS)
    rows = TILE // columns
    out = jax.ShapeDtypeStruct((buffers[0].shape[0], width), dtype)
    kernel = functools.partial(_dequantize_tile, scheme=scheme, tile=(rows, columns), native_float8=native_float8)
    grid = (pl.cdiv(out.shape[0], rows), pl.cdiv(width, columns))
    (values,) = launch(kernel, grid, [out], *buffers, warps=WARPS, stages=1, interpret=interpret)
    return values.reshape(array.shape)


def _dequantize_tile(*refs: Any, scheme: GroupedScheme, tile: tuple[int, int], native_float8: bool | None) -> None:
    values, *numbers, out = refs
    rows, columns = Span(pl.program_id(0), tile[0]), Span(pl.program_id(1), tile[1])
    codes = load_codes(values, scheme.bits, rows, columns)
    scale, *zero = (load(ref, rows, group_of(columns, scheme)).astype(jnp.float32) for ref in numbers)
    if scheme.codes == "float8":
        decoded = from_float8(codes, native_float8)
    else:
        decoded = codes.astype(jnp.float32) - (zero[0] if zero else np.float32(scheme.center))
    store(out, rows, columns, scale * decoded)
