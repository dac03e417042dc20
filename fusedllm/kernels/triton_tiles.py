"""What the Pallas kernels are made of: the call, masked tiles of matrices, and grouped codes in registers.

Every tensor here has sizes that are powers of two, and every operation is one of those that Pallas lowers to Triton:
neither `round`, `stack` nor a gather from registers is. Arrays are passed whole, and tiles are addressed by the numbers
of their rows and columns, so that what lies outside of an array is masked in one way everywhere.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from fusedllm.kernels.grouped import LARGEST_FLOAT8, GroupedScheme
from fusedllm.kernels.pallas_support import casts_float8

# A float8 e4m3fn has four bits of exponent with a bias of 7, and three of mantissa; a float32 has 8, 127 and 23.
FLOAT8_LEAST_NORMAL = 2.0**-6
FLOAT8_LEAST = 2.0**-9
FLOAT8_NAN = 0x7F


def launch(
    kernel: Callable[..., None],
    grid: tuple[int, ...],
    out: Sequence[jax.ShapeDtypeStruct],
    *operands: jax.Array,
    warps: int,
    stages: int,
    interpret: bool,
    updated: Mapping[int, int] = MappingProxyType({}),
) -> Sequence[jax.Array]:
    """The results of `kernel`, which gets references to all operands and results, for each point of `grid`.

    `updated` maps numbers of operands to those of results that are the same memory, written in part.

    The only place that says which of Pallas's backends lowers a kernel: Triton's, for GPUs of NVIDIA and AMD. (It warns
    that it is deprecated from jax 0.11 on; its successor lowers for Hopper and newer GPUs of NVIDIA only.)
    """
    parameters = triton.CompilerParams(num_warps=warps, num_stages=stages)
    results: Sequence[jax.Array] = pl.pallas_call(
        kernel,
        out,
        grid=grid,
        compiler_params=parameters,
        interpret=interpret,
        input_output_aliases=dict(updated),
    )(*operands)
    return results


@dataclass(frozen=True, slots=True)
class Span:
    """Rows or columns of a matrix: the numbers from `index * count` to `(index + 1) * count - 1`; `index` is traced.

    A span begins inside of its matrix, so that spans which divide its size need no mask.
    """

    index: Any
    count: int

    def numbers(self) -> jax.Array:
        """The numbers, int32 `[count]`."""
        return self.index * self.count + iota(self.count)


def iota(count: int) -> jax.Array:
    """0 to `count - 1`, int32."""
    return jax.lax.iota(jnp.int32, count)


def load(ref: Any, rows: Span, columns: Span, stride: int = 1, offset: int = 0) -> jax.Array:
    """The elements `[rows, columns * stride + offset]` of the matrix `ref`, with zeros for what is outside of it."""
    view, mask = tile(ref, rows, columns, stride, offset)
    return triton.load(view, mask=mask, other=None if mask is None else jnp.zeros((), ref.dtype))


def store(ref: Any, rows: Span, columns: Span, values: jax.Array, stride: int = 1, offset: int = 0) -> None:
    """Writes `values` to the elements `[rows, columns * stride + offset]` of `ref`, but for what is outside of it."""
    view, mask = tile(ref, rows, columns, stride, offset)
    triton.store(view, values.astype(ref.dtype), mask=mask)


def tile(ref: Any, rows: Span, columns: Span, stride: int, offset: int) -> tuple[Any, jax.Array | None]:
    """The view of these elements, and which of them `ref` has; `None` if all."""
    row, column = rows.numbers()[:, None], columns.numbers()[None, :]
    height, width = ref.shape[0], ref.shape[1] // stride
    masks = [row < height] if height % rows.count else []
    masks += [column < width] if width % columns.count else []
    everywhere = (
        jnp.broadcast_to(functools.reduce(operator.and_, masks), (rows.count, columns.count)) if masks else None
    )
    return ref.at[row, column * stride + offset], everywhere


def round_to_even(x: jax.Array) -> jax.Array:
    """`jnp.round` of float32 magnitudes below 2 ** 22.

    By comparisons alone: a compiler may fuse a product with the addition of a number whose last bit is one, which would
    round a product that was never rounded to float32.
    """
    below = jnp.floor(x)
    half = below + np.float32(0.5)
    odd = (below.astype(jnp.int32) & 1) == 1
    return jnp.where((x > half) | ((x == half) & odd), below + np.float32(1), below)


def load_codes(ref: Any, bits: int, rows: Span, columns: Span) -> jax.Array:
    """The codes `[rows, columns]` of packed codes `ref`, int8 of eight bits, else int32; whole bytes are asked for.

    Beyond a row's last byte all codes are 0.
    """
    together, _ = unit(bits)
    words = _load_words(ref, bits, rows, columns)
    if together == 1:
        return words
    codes = (words[:, :, None] >> (bits * iota(together))) & (2**bits - 1)
    return codes.reshape(rows.count, columns.count)


def load_planes(ref: Any, bits: int, rows: Span, columns: Span) -> list[jax.Array]:
    """As `load_codes`, but apart: of each `unit` of codes the first, then of each the second, and so on."""
    words = _load_words(ref, bits, rows, columns)
    shifts = range(0, bits * unit(bits)[0], bits)
    return [words] if bits == 8 else [(words >> shift) & (2**bits - 1) for shift in shifts]


def _load_words(ref: Any, bits: int, rows: Span, columns: Span) -> jax.Array:
    """The codes `[rows, columns]` as they are packed: int32 with a `unit` in each, of eight bits int8."""
    together, apart = unit(bits)
    units = Span(columns.index, columns.count // together)
    if together == 1:
        return jax.lax.bitcast_convert_type(load(ref, rows, units), jnp.int8)
    words = load(ref, rows, units, apart).astype(jnp.int32)
    for byte in range(1, apart):
        words |= load(ref, rows, units, apart, byte).astype(jnp.int32) << (8 * byte)
    return words


def store_codes(ref: Any, bits: int, rows: Span, columns: Span, codes: jax.Array) -> None:
    """The inverse of `load_codes`: int32 `codes` into the bytes of `ref`."""
    together, apart = unit(bits)
    units = Span(columns.index, columns.count // together)
    if together == 1:
        store(ref, rows, units, codes & 255)
        return
    # No two codes share a bit, so that their sum is their union.
    word = jnp.sum(codes.reshape(rows.count, units.count, together) << (bits * iota(together)), axis=2)
    for byte in range(apart):
        store(ref, rows, units, (word >> (8 * byte)) & 255, apart, byte)


def group_of(columns: Span, scheme: GroupedScheme) -> Span:
    """The group that all of `columns` are in."""
    if not scheme.group_size:
        return Span(0, 1)
    return Span(jax.lax.div(columns.index, scheme.group_size // columns.count), 1)


def unit(bits: int) -> tuple[int, int]:
    """The least number of codes that fill bytes, and how many bytes that is."""
    shared = math.gcd(bits, 8)
    return 8 // shared, bits // shared


def from_float8(codes: jax.Array, native: bool | None = None) -> jax.Array:
    """The float32 values of the float8 e4m3fn whose bits `codes` are, of a byte; by the chip's cast where it has one.

    `native` says whether it has. A program that is kept (`jax.jit`) is to be told, as it is found by its arguments and
    not by the device that it was traced for.
    """
    if casts_float8() if native is None else native:
        return jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn).astype(jnp.float32)
    bits = codes.astype(jnp.int32)
    # Shifted to where a float16 has them, exponent and mantissa are a number 2 ** 8 times as small, denormal or not.
    shifted = ((bits & 0x80) << 8 | (bits & 0x7F) << 7).astype(jnp.uint16)
    values = jax.lax.bitcast_convert_type(shifted, jnp.float16).astype(jnp.float32) * np.float32(256)
    return jnp.where((bits & 0x7F) == FLOAT8_NAN, np.float32(np.nan), values)


def to_float8(x: jax.Array) -> jax.Array:
    """The bits of the float8 e4m3fn nearest to float32 `x`, int32; what is too large becomes the largest finite."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    magnitude = jnp.minimum(jnp.abs(x), np.float32(LARGEST_FLOAT8))
    wide = jax.lax.bitcast_convert_type(magnitude, jnp.int32)
    # To the nearest of those with 20 bits less, ties to the even one; then from one bias to the other.
    normal = ((wide + 0x7FFFF + ((wide >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    denormal = round_to_even(magnitude * np.float32(1 / FLOAT8_LEAST)).astype(jnp.int32)
    return jnp.where(magnitude < FLOAT8_LEAST_NORMAL, denormal, normal) | ((bits >> 24) & 0x80)
