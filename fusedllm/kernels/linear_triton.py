"""`linear` with Pallas: products with grouped codes, which become numbers in registers and are scaled after the dot.

A code without its scale is a small integer or a float8, so that it is exact in the dtype of the activations; the dot
adds up in float32, and the scale of a group multiplies that sum. Nothing is rounded but sums and the result, and the
activations of a scheme that asks for it (`w8a8`).
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from fusedllm.kernels.grouped import GroupedScheme
from fusedllm.kernels.quantize import round_activations
from fusedllm.kernels.triton_tiles import (
    Span,
    from_float8,
    group_of,
    launch,
    load,
    load_codes,
    load_planes,
    store,
    unit,
)
from fusedllm.qarray import QuantArray


@dataclass(frozen=True, slots=True)
class Blocks:
    """How a product is cut for some numbers of tokens.

    Attributes:
      up_to: the most tokens that this is for.
      tokens: of a program.
      rows: of the weight, of a program.
      columns: of the weight in one dot; a group's, where that is less.
      row_bytes: of a row of codes that a turn of the loop reads, if one dot does not; 0 for no more than that.
      programs: that there should be: where rows and tokens give fewer, columns are divided among several.
      warps: of a program.
      stages: turns that are under way at a time.
    """

    up_to: float
    tokens: int
    rows: int
    columns: int
    row_bytes: int
    programs: int
    warps: int
    stages: int


# Reasoned, not measured. A few tokens are a matter of reading the weights: 16 tokens are the least that is worth a
# matrix unit, memory is read best in lines of 128 bytes, and a 2048 x 2048 matrix must be read by more programs than it
# has blocks of rows (an H200 has 132 processors, and each can have several). Many tokens are a matter of arithmetic:
# larger blocks use what they read more often, and partial sums would cost traffic.
BLOCKS = (
    Blocks(up_to=16, tokens=16, rows=64, columns=128, row_bytes=128, programs=264, warps=4, stages=4),
    Blocks(up_to=64, tokens=64, rows=64, columns=64, row_bytes=0, programs=132, warps=4, stages=4),
    Blocks(up_to=float("inf"), tokens=128, rows=128, columns=64, row_bytes=0, programs=1, warps=8, stages=3),
)

# Blocks for more tokens than this, with three operands for each float32, need more registers and memory than there are.
MOST_FLOAT32_TOKENS = 64

# Columns of the narrowest product of bfloat16 that matrix units make.
LEAST_DEPTH = 16

# A program that adds up fewer turns than this costs more in partial sums than it gains.
LEAST_TURNS = 4


@dataclass(frozen=True, slots=True)
class Plan:
    """How one product is cut.

    Attributes:
      blocks: the row of the table.
      columns: that share a scale and are read at a time.
      planes: of those columns, each multiplied by a dot of its own: the first of every few codes that are packed in the
        same bytes, the second of every few, and so on. 1 for columns in their order.
      dots: in a turn of the loop, times planes.
      turns: of the loop, in all.
      parts: that the turns are divided in.
      grid: of blocks of tokens and rows.
    """

    blocks: Blocks
    columns: int
    planes: int
    dots: int
    turns: int
    parts: int
    grid: tuple[int, int]

    @classmethod
    def of(cls, tokens: int, shape: tuple[int, ...], scheme: GroupedScheme, wide: bool) -> Plan:
        """For `tokens` and a weight of `shape`; `wide` says that the activations are float32."""
        bounded = min(tokens, MOST_FLOAT32_TOKENS) if wide else tokens
        blocks = next(row for row in BLOCKS if bounded <= row.up_to)
        columns = min(scheme.group_size or blocks.columns, blocks.columns)
        steps = pl.cdiv(shape[1], columns)
        wanted = 1 if wide else max(1, 8 * blocks.row_bytes // (columns * scheme.bits))
        # All turns have equally many dots, and loops that are unrolled by a power of two divide most widths.
        dots = math.gcd(steps, 1 << (wanted.bit_length() - 1))
        grid = (pl.cdiv(tokens, blocks.tokens), pl.cdiv(shape[0], blocks.rows))
        planes, _ = unit(scheme.bits)
        if columns // planes < LEAST_DEPTH:
            planes = 1
        turns = steps // dots
        parts = min(pl.cdiv(blocks.programs, grid[0] * grid[1]), turns // LEAST_TURNS)
        return cls(blocks, columns, planes, dots, turns, max(1, parts), grid)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def product_triton(
    x: jax.Array, weight: QuantArray, out_dtype: np.dtype, interpret: bool, native_float8: bool | None = None
) -> jax.Array:
    """`x @ weight.T` for `x` `[tokens, in]` in bfloat16, float16 or float32, as `out_dtype` `[tokens, out]`.

    The scheme of `weight` is one that `why_not_codes` has nothing against. `native_float8` is what `from_float8` asks.
    """
    scheme = weight.scheme
    assert isinstance(scheme, GroupedScheme)
    assert weight.scales is not None
    tokens, rows = x.shape[0], weight.shape[0]
    plan = Plan.of(tokens, weight.shape, scheme, x.dtype == jnp.float32)
    blocks = plan.blocks
    if scheme.sums_integers:
        codes, scale = round_activations(x)
        operands = [codes, weight.values, weight.scales, scale]
    else:
        operands = [_in_planes(x, plan), weight.values, weight.scales]
        operands += [] if weight.zeros is None else [weight.zeros]
    # Partial sums lie side by side, in whole blocks.
    width = rows if plan.parts == 1 else plan.parts * plan.grid[1] * blocks.rows
    out = jax.ShapeDtypeStruct((tokens, width), out_dtype if plan.parts == 1 else np.dtype(np.float32))
    kernel = functools.partial(_product_tile, scheme=scheme, plan=plan, native_float8=native_float8)
    grid = (*plan.grid, plan.parts)
    (sums,) = launch(kernel, grid, [out], *operands, warps=blocks.warps, stages=blocks.stages, interpret=interpret)
    if plan.parts == 1:
        return sums
    return sums.reshape(tokens, plan.parts, -1).sum(1)[:, :rows].astype(out_dtype)


def _product_tile(*refs: Any, scheme: GroupedScheme, plan: Plan, native_float8: bool | None) -> None:
    x, values, scales, *other, out = refs
    zeros = None if scheme.symmetric else other[0]
    tokens, rows = Span(pl.program_id(0), plan.blocks.tokens), Span(pl.program_id(1), plan.blocks.rows)
    total = jnp.int32 if scheme.sums_integers else jnp.float32

    def dot(index: Any) -> jax.Array:
        columns = Span(index, plan.columns)
        # Contracted along the columns of both: the weight's rows are many, and so the matrix unit's longer side.
        terms = [
            jax.lax.dot_general(left, right, (((1,), (1,)), ((), ())), preferred_element_type=total)
            for plane, codes in enumerate(_planes(values, zeros, scheme, rows, columns, plan.planes, native_float8))
            for left in as_terms(codes, x.dtype, 1 if zeros is None else 2)
            for right in as_terms(_plane(x, tokens, columns, plan.planes, plane), x.dtype, 3)
        ]
        product = functools.reduce(operator.add, terms)
        if scheme.group_size:
            product = product * load(scales, rows, group_of(columns, scheme)).astype(jnp.float32)
        return product

    def turn(index: Any, sums: jax.Array) -> jax.Array:
        for number in range(plan.dots):
            sums = sums + dot(index * plan.dots + number)
        return sums

    nothing = jnp.zeros((rows.count, tokens.count), total)
    if plan.parts == 1:
        sums, place = jax.lax.fori_loop(0, plan.turns, turn, nothing), rows
    else:
        part, each = pl.program_id(2), pl.cdiv(plan.turns, plan.parts)
        last = jnp.minimum((part + 1) * each, plan.turns)
        sums = jax.lax.fori_loop(part * each, last, turn, nothing)
        place = Span(part * plan.grid[1] + rows.index, rows.count)
    if not scheme.group_size:
        sums = sums.astype(jnp.float32) * load(scales, rows, Span(0, 1)).astype(jnp.float32)
    if scheme.sums_integers:
        sums = sums * load(other[0], tokens, Span(0, 1)).reshape(1, tokens.count)
    store(out, tokens, place, sums.T)


def _in_planes(x: jax.Array, plan: Plan) -> jax.Array:
    """The columns of `x` in the order in which dots take them, with zeros up to a whole number of dots."""
    if plan.planes == 1:
        return x
    steps = plan.turns * plan.dots
    padded = jnp.pad(x, ((0, 0), (0, steps * plan.columns - x.shape[1])))
    return padded.reshape(len(x), steps, -1, plan.planes).swapaxes(2, 3).reshape(len(x), -1)


def _plane(x: Any, tokens: Span, columns: Span, planes: int, number: int) -> jax.Array:
    """Plane `number` of `columns` of what `_in_planes` returned."""
    return load(x, tokens, Span(columns.index * planes + number, columns.count // planes))


def _planes(
    values: Any,
    zeros: Any,
    scheme: GroupedScheme,
    rows: Span,
    columns: Span,
    planes: int,
    native_float8: bool | None,
) -> Iterator[jax.Array]:
    """The codes `[rows, columns]` without their zero points, one plane after the other."""
    if planes == 1:
        codes = [load_codes(values, scheme.bits, rows, columns)]
    else:
        codes = load_planes(values, scheme.bits, rows, columns)
    for plane in codes:
        if scheme.codes == "float8":
            yield from_float8(plane, native_float8)
        elif zeros is not None:
            yield plane.astype(jnp.float32) - load(zeros, rows, group_of(columns, scheme)).astype(jnp.float32)
        elif scheme.center:
            yield plane.astype(jnp.float32) - np.float32(scheme.center)
        else:
            yield plane


def as_terms(x: jax.Array, dtype: Any, count: int) -> list[jax.Array]:
    """`x` as operands of a matrix unit, for activations in `dtype`: numbers that add up to it.

    Matrix units multiply float32 only after rounding it to TF32's eleven bits; three bfloat16 add up to a float32, and
    two to the distance of a code from a zero point that is no integer. They are cut off rather than rounded, because
    the distance of a number from itself rounded to bfloat16 is what compilers that keep excess precision take for zero.
    """
    if dtype != jnp.float32:
        return [x.astype(dtype)]
    if x.dtype in (jnp.int8, jnp.bfloat16):
        return [x.astype(jnp.bfloat16)]
    parts = []
    x = x.astype(jnp.float32)
    for _ in range(count):
        bits = jax.lax.bitcast_convert_type(x, jnp.int32) & np.int32(-(2**16))
        head = jax.lax.bitcast_convert_type(bits, jnp.float32)
        parts.append(head.astype(jnp.bfloat16))
        x = x - head
    return parts
