"""`ring_linear` with Pallas: a product of int8 with int8 whose rows of one side are limbs, put together at the end.

The four limbs of a token are neighbouring rows, so that they share a tile: a tile of weights is read once for all of
them, and the least tile of a matrix unit, sixteen rows, is four tokens and not sixteen.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from fusedllm.kernels.ring_linear import LIMBS, split
from fusedllm.kernels.triton_tiles import Span, iota, launch, load, store


@dataclass(frozen=True, slots=True)
class Blocks:
    """How a product is cut for some numbers of tokens.

    Attributes:
      up_to: the most tokens that this is for.
      tokens: of a program, each four rows of limbs.
      rows: of the weight, of a program.
      columns: of one dot.
      programs: that there should be: where rows and tokens give fewer, columns are divided among several.
      warps: of a program.
      stages: turns that are under way at a time.
    """

    up_to: float
    tokens: int
    rows: int
    columns: int
    programs: int
    warps: int
    stages: int


# Reasoned, not measured, as those of `linear_triton.py` are, whose tiles these are: a row of limbs costs what a token
# of `w8a8` does.
BLOCKS = (
    Blocks(up_to=4, tokens=4, rows=64, columns=128, programs=264, warps=4, stages=4),
    Blocks(up_to=16, tokens=16, rows=64, columns=64, programs=132, warps=4, stages=4),
    Blocks(up_to=float("inf"), tokens=32, rows=128, columns=64, programs=1, warps=8, stages=3),
)

# A program that adds up fewer turns than this costs more in partial sums than it gains.
LEAST_TURNS = 4


@dataclass(frozen=True, slots=True)
class Plan:
    """How one product is cut.

    Attributes:
      blocks: the row of the table.
      turns: dots, in all.
      parts: that the turns are divided in.
      grid: of blocks of tokens and rows.
    """

    blocks: Blocks
    turns: int
    parts: int
    grid: tuple[int, int]

    @classmethod
    def of(cls, tokens: int, shape: tuple[int, ...]) -> Plan:
        """For `tokens` and a weight of `shape`."""
        blocks = next(row for row in BLOCKS if tokens <= row.up_to)
        turns = pl.cdiv(shape[1], blocks.columns)
        grid = (pl.cdiv(tokens, blocks.tokens), pl.cdiv(shape[0], blocks.rows))
        parts = min(pl.cdiv(blocks.programs, grid[0] * grid[1]), turns // LEAST_TURNS)
        return cls(blocks, turns, max(1, parts), grid)


@functools.partial(jax.jit, static_argnums=2)
def ring_linear_triton(x: jax.Array, weight: jax.Array, interpret: bool) -> jax.Array:
    """`x` int32 `[tokens, in]` times int8 `[out, in]` transposed, modulo 2^32."""
    tokens, rows = x.shape[0], weight.shape[0]
    if tokens == 0:
        return jnp.zeros((0, rows), jnp.int32)
    plan = Plan.of(tokens, weight.shape)
    blocks = plan.blocks
    limbs = split(x).swapaxes(0, 1).reshape(LIMBS * tokens, -1)
    # Partial sums lie side by side, in whole blocks.
    width = rows if plan.parts == 1 else plan.parts * plan.grid[1] * blocks.rows
    out = jax.ShapeDtypeStruct((tokens, width), jnp.int32)
    kernel = functools.partial(_product_tile, plan=plan)
    grid = (*plan.grid, plan.parts)
    (sums,) = launch(kernel, grid, [out], limbs, weight, warps=blocks.warps, stages=blocks.stages, interpret=interpret)
    if plan.parts == 1:
        return sums
    return sums.reshape(tokens, plan.parts, -1).sum(1)[:, :rows]


def _product_tile(limbs: Any, weight: Any, out: Any, *, plan: Plan) -> None:
    blocks = plan.blocks
    tokens, rows = Span(pl.program_id(0), blocks.tokens), Span(pl.program_id(1), blocks.rows)
    limb_rows = Span(tokens.index, LIMBS * tokens.count)

    def turn(index: Any, sums: jax.Array) -> jax.Array:
        columns = Span(index, blocks.columns)
        # Contracted along the columns of both: the weight's rows are many, and so the matrix unit's longer side.
        return sums + jax.lax.dot_general(
            load(weight, rows, columns),
            load(limbs, limb_rows, columns),
            (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.int32,
        )

    nothing = jnp.zeros((rows.count, limb_rows.count), jnp.int32)
    if plan.parts == 1:
        sums, place = jax.lax.fori_loop(0, plan.turns, turn, nothing), rows
    else:
        part, each = pl.program_id(2), pl.cdiv(plan.turns, plan.parts)
        last = jnp.minimum((part + 1) * each, plan.turns)
        sums = jax.lax.fori_loop(part * each, last, turn, nothing)
        place = Span(part * plan.grid[1] + rows.index, rows.count)
    together = sums.reshape(rows.count, tokens.count, LIMBS) << (8 * iota(LIMBS))
    store(out, tokens, place, jnp.sum(together, axis=2).T)
