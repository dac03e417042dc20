"""`cached_attention` of one new token with Pallas: rotation, the write of its key and value, and attention, at once.

Keys are divided among as many programs as fill the device, and a second kernel adds up what they found (FlashDecoding,
https://pytorch.org/blog/flash-decoding/). The newest position is never read from the pages: who writes it has it in
registers, and nobody else looks there.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from fusedllm.kernels.attention import MASKED
from fusedllm.kernels.attention_support import power_of_two
from fusedllm.kernels.attention_tiles import Keys, Layout, State, from_held, nothing_seen, weighted
from fusedllm.kernels.rotation_tiles import Held, Rotation, load, places, together, write
from fusedllm.kernels.triton_tiles import iota, launch


@dataclass(frozen=True, slots=True)
class Blocks:
    """How keys are read for heads of some size.

    Attributes:
      width: the most elements of a head that this is for.
      keys: that are read at a time.
      warps: of a program.
      stages: blocks of keys that are under way at a time.
    """

    width: int
    keys: int
    warps: int
    stages: int


# Reasoned, not measured: reading is all that counts, and 48 KiB under way on each of 132 processors are more than an
# H200's memory answers in its latency (4.3 TB/s, 0.8 microseconds).
BLOCKS = (
    Blocks(width=64, keys=64, warps=4, stages=4),
    Blocks(width=128, keys=64, warps=4, stages=3),
    Blocks(width=256, keys=32, warps=4, stages=3),
)

# Of float32, three operands for each.
WIDE_BLOCKS = (
    Blocks(width=64, keys=32, warps=4, stages=2),
    Blocks(width=128, keys=32, warps=4, stages=2),
    Blocks(width=256, keys=16, warps=4, stages=2),
)

# Reasoned, not measured. An H200 has 132 processors, and the shared memory of each has room for four programs: some
# read while others begin or end, and the parts of a long row of a batch run beside those of short ones.
PROGRAMS = 528

# A program that adds up holds a part of each in registers.
MOST_SPLITS = 64

# Keys that are worth a program of their own; and of a table that is so short that one program for each KV head takes no
# longer than the launch of a second kernel.
LEAST_KEYS = 256
MOST_KEYS_ALONE = 1024

# Warps of a program that adds up.
SUM_WARPS = 4


@dataclass(frozen=True, slots=True)
class Plan:
    """How one call is cut.

    Attributes:
      blocks: the row of the table.
      rows: of a tile; the group's, and empty ones.
      splits: programs that the keys of one KV head are divided among, at most.
      least: blocks of keys of such a program, where there is more than one.
    """

    blocks: Blocks
    rows: int
    splits: int
    least: int

    @classmethod
    def of(cls, batch: int, kv_heads: int, layout: Layout) -> Plan:
        """For `batch` tokens."""
        table = WIDE_BLOCKS if layout.wide == jnp.float32 else BLOCKS
        blocks = next(blocks for blocks in table if layout.width <= blocks.width)
        most = layout.positions if layout.window is None else min(layout.window, layout.positions)
        wanted = 1 if most <= MOST_KEYS_ALONE else PROGRAMS // (batch * kv_heads)
        splits = max(1, min(wanted, most // LEAST_KEYS, MOST_SPLITS))
        return cls(blocks, power_of_two(layout.group), splits, LEAST_KEYS // blocks.keys)

    def range_of(self, split: Any, begin: Any, end: Any) -> tuple[Any, Any, Any]:
        """The first block of `split` and the one behind its last, for keys at `begin` to `end - 1`; and how many
        splits have any, or 1."""
        first = jax.lax.div(begin, self.blocks.keys)
        blocks = jnp.maximum(pl.cdiv(end, self.blocks.keys) - first, 0)
        each = blocks if self.splits == 1 else jnp.maximum(pl.cdiv(blocks, self.splits), self.least)
        used = 1 if self.splits == 1 else jnp.maximum(pl.cdiv(blocks, each), 1)
        return first + split * each, first + jnp.minimum((split + 1) * each, blocks), used


@functools.partial(jax.jit, static_argnames=("layout", "interpret"))
def decode_attention_triton(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    pages: tuple[jax.Array, ...],
    page_table: jax.Array,
    start: jax.Array,
    *,
    layout: Layout,
    interpret: bool,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """What `cached_attention` says of one new position a row, for what `why_not_attention` has nothing against.

    Nothing is written to the null page.
    """
    batch, _, heads, head_dim = q.shape
    kv_heads = pages[0].shape[1]
    plan = Plan.of(batch, kv_heads, layout)
    token = [x.reshape(batch, *x.shape[2:]) for x in (*together(q, k, v), cos, sin)]
    positions = [page_table.astype(jnp.int32), start.astype(jnp.int32)]
    mixed = jax.ShapeDtypeStruct((batch, heads, head_dim), q.dtype)
    parts = [
        jax.ShapeDtypeStruct((batch, heads, plan.splits, head_dim), jnp.float32),
        jax.ShapeDtypeStruct((batch, heads, plan.splits), jnp.float32),
    ]
    results = [mixed] if plan.splits == 1 else parts
    before = len(token) + len(positions)
    *found, = launch(
        functools.partial(decode_attention_split, layout=layout, plan=plan),
        (kv_heads, batch, plan.splits),
        [*results, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in pages)],
        *token, *positions, *pages,
        warps=plan.blocks.warps,
        stages=plan.blocks.stages,
        interpret=interpret,
        updated={before + i: len(results) + i for i in range(len(pages))},
    )  # fmt: skip
    updated = tuple(found[len(results) :])
    if plan.splits > 1:
        kernel = functools.partial(decode_attention_sum, layout=layout, plan=plan)
        operands = (positions[1], *found[: len(results)])
        grid = (heads, batch)
        found[:1] = launch(kernel, grid, [mixed], *operands, warps=SUM_WARPS, stages=1, interpret=interpret)
    return found[0].reshape(q.shape), updated


def decode_attention_split(*refs: Any, layout: Layout, plan: Plan) -> None:
    """A part of the keys of one KV head; the first one's program has the newest position beside its part."""
    (q, k, v), (q_head, k_head, v_head), (cos, sin, page_table, start, *rest) = places(refs, layout)
    arrays = 4 if layout.scaled else 2
    pages, results, updated = rest[:arrays], rest[arrays:-arrays], rest[-arrays:]
    head, row, split = (pl.program_id(axis) for axis in range(3))
    begin = start[row]
    bounds = layout.first_seen(begin), jnp.minimum(begin, layout.positions)
    first, behind, used = plan.range_of(split, *bounds)

    number = iota(plan.rows)
    column, inside = layout.columns()
    taken = number < layout.group
    mask = taken[:, None] if inside is None else taken[:, None] & inside[None, :]
    mask = jnp.broadcast_to(mask, (plan.rows, layout.width))
    query_head = head * layout.group + number

    @pl.when(split < used)
    def _() -> None:
        turn = Rotation.of(cos, sin, (row,), inside, layout)
        queries = turn(q, (row, q_head + query_head[:, None]), mask).astype(q.dtype)
        key, value = turn(k, (row, k_head + head), inside), load(v, (row, v_head + head, column), inside)
        newest = Held.of(key, pages[0].dtype), Held.of(value, pages[0].dtype)
        write(newest, updated, page_table, row, head, begin, split == 0, layout)
        state = _where(split == 0, _newest_seen(queries, newest, layout), nothing_seen(plan.rows, layout.width))
        keys = Keys(layout, tuple(pages), page_table, row, head, plan.blocks.keys, bounds)

        def visible(key: jax.Array) -> jax.Array:
            return (key >= bounds[0]) & (key < bounds[1])

        state, _ = keys.loop(queries, (state, keys.pages_of(first)), (first, behind), visible)
        if plan.splits == 1:
            (mixed,) = results
            triton.store(
                mixed.at[row, query_head[:, None], column[None, :]], weighted(state).astype(mixed.dtype), mask=mask
            )
        else:
            parts, sizes = results
            triton.store(parts.at[row, query_head[:, None], split, column[None, :]], weighted(state), mask=mask)
            size = state[2] + jnp.log(state[1]) * np.float32(math.log2(math.e))
            triton.store(sizes.at[row, query_head, split], size, mask=taken)


def decode_attention_sum(start: Any, parts: Any, sizes: Any, mixed: Any, *, layout: Layout, plan: Plan) -> None:
    """What all splits of one query head found, each weighted by the sum of its weights."""
    head, row = pl.program_id(0), pl.program_id(1)
    begin = start[row]
    _, _, used = plan.range_of(0, layout.first_seen(begin), jnp.minimum(begin, layout.positions))
    split = iota(power_of_two(plan.splits))
    column, inside = layout.columns()
    there = split < used
    mask = there[:, None] if inside is None else there[:, None] & inside[None, :]
    mask = jnp.broadcast_to(mask, (split.shape[0], layout.width))
    size = triton.load(sizes.at[row, head, split], mask=there, other=np.float32(MASKED))
    weights = jnp.exp2(size - jnp.max(size))
    values = triton.load(parts.at[row, head, split[:, None], column[None, :]], mask=mask, other=np.float32(0))
    total = jnp.sum(values * weights[:, None], axis=0) / jnp.sum(weights)
    triton.store(mixed.at[row, head, column], total.astype(mixed.dtype), mask=inside)


def _newest_seen(queries: jax.Array, newest: tuple[Held, Held], layout: Layout) -> State:
    """The state after the newest position alone."""
    key, value = (
        from_held(held.numbers, layout).astype(jnp.float32) * (np.float32(1) if held.scale is None else held.scale)
        for held in newest
    )
    scores = jnp.sum(queries.astype(jnp.float32) * key[None, :], axis=1) * layout.scale
    return jnp.broadcast_to(value[None, :], queries.shape), jnp.ones_like(scores), scores


def _where(condition: Any, some: State, others: State) -> State:
    total, weight_sum, highest = (jnp.where(condition, x, y) for x, y in zip(some, others, strict=True))
    return total, weight_sum, highest
