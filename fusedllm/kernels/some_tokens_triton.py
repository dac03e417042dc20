"""Products of 5 to 16 tokens with plain weights with Pallas, several in one launch, and SwiGLU of two.

As many tokens as fill the shorter side of a matrix unit: reading the weights still takes longest, but adding up in
registers would take as long. Each program of the grid multiplies some whole rows of a weight with all tokens, so that
there are no partial sums. The norm is a kernel of its own here (`rms_norm_triton.py`): every program would read
activations as large as its part of the weights once more for it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from fusedllm.kernels.triton_tiles import Span, iota, launch, load


@dataclass(frozen=True, slots=True)
class Tile:
    """How a program reads.

    Attributes:
      rows: of each weight.
      columns: of them in one dot; where there are two weights, half as many.
      warps: of the program.
      stages: dots whose operands are under way at a time.
    """

    rows: int
    columns: int
    warps: int
    stages: int


# Reasoned, not measured. 16 rows are the fewest of a matrix unit, and make 128 programs of a 2048 x 2048 weight, for
# the 132 processors of an H200; each has to have 25 KB under way: four of its five stages have 8 KB of
# weights each. Higher weights have enough programs of twice as many rows, which read the activations half as often.
# What is under way has to fit the 99 KB that processors of the smallest GPUs (compute capability 8.6) have for it.
TILES = (
    Tile(rows=32, columns=256, warps=4, stages=5),
    Tile(rows=16, columns=256, warps=4, stages=5),
)

# That there should be.
PROGRAMS = 256

# The shorter side of a matrix unit.
TOKENS = 16


@functools.partial(jax.jit, static_argnames=("gated", "out_dtype", "interpret"))
def tiles_triton(
    x: jax.Array,
    weights: tuple[jax.Array, ...],
    *,
    biases: tuple[jax.Array | None, ...] = (),
    gated: bool = False,
    out_dtype: np.dtype,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """The products of `x` `[tokens, in]`, up to 16 tokens, with `weights` `[out, in]` of its dtype, in one launch.

    If `gated` there are two weights, and the result is one: SwiGLU of their products, each with its bias.
    """
    tokens = x.shape[0]
    together = len(weights) if gated else 1
    heights = [weight.shape[0] for weight in weights[::together]]
    enough = (tile for tile in TILES if sum(pl.cdiv(height, tile.rows) for height in heights) >= PROGRAMS)
    tile = next(enough, TILES[-1])
    ends = np.cumsum([pl.cdiv(height, tile.rows) for height in heights])
    firsts = [0, *ends[:-1].tolist()]
    given = [bias for bias in biases if bias is not None]

    # What a profile calls it.
    def some_tokens(*refs: Any) -> None:
        matrices, results = refs[1 : 1 + len(weights)], refs[len(refs) - len(heights) :]
        left = iter(refs[1 + len(weights) :])
        offsets = [None if bias is None else next(left) for bias in biases or (None,) * len(weights)]
        number = pl.program_id(0)
        for at, (result, first, end) in enumerate(zip(results, firsts, ends.tolist(), strict=True)):
            some = slice(at * together, (at + 1) * together)
            multiply = functools.partial(
                _multiply, tile, refs[0], matrices[some], offsets[some], result, Span(number - first, tile.rows)
            )
            if len(heights) == 1:
                multiply()
            else:
                pl.when((number >= first) & (number < end))(multiply)

    out = [jax.ShapeDtypeStruct((tokens, height), out_dtype) for height in heights]
    operands = (x, *weights, *given)
    grid = (int(ends[-1]),)
    return tuple(launch(some_tokens, grid, out, *operands, warps=tile.warps, stages=tile.stages, interpret=interpret))


def _multiply(tile: Tile, x: Any, weights: Any, offsets: Any, result: Any, rows: Span) -> None:
    tokens, wide = Span(0, TOKENS), tile.columns // len(weights)

    def turn(index: Any, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        columns = Span(index, wide)
        right = load(x, tokens, columns)
        return tuple(
            total
            + jax.lax.dot_general(
                load(weight, rows, columns), right, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
            )
            for total, weight in zip(sums, weights, strict=True)
        )

    nothing = tuple(jnp.zeros((tile.rows, TOKENS), jnp.float32) for _ in weights)
    made = list(jax.lax.fori_loop(0, pl.cdiv(x.shape[1], wide), turn, nothing))
    place = rows.numbers()
    there = place < result.shape[1]
    for at, offset in enumerate(offsets):
        if offset is not None:
            bias = triton.load(offset.at[place], mask=there, other=jnp.zeros((), offset.dtype))
            made[at] = made[at] + bias.astype(jnp.float32)[:, None]
    product = made[0] if len(made) == 1 else made[0] / (1 + jnp.exp(-made[0])) * made[1]
    token = iota(TOKENS)
    mask = (token[:, None] < result.shape[0]) & there[None, :]
    triton.store(result.at[token[:, None], place[None, :]], product.T.astype(result.dtype), mask=mask)
