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

from fusedllm.kernels import e4m3
from fusedllm.kernels.attention import MASKED
from fusedllm.kernels.attention_tiles import Keys, Layout, State, from_held, nothing_seen, power_of_two, weighted
from fusedllm.kernels.triton_tiles import FLOAT8_NAN, iota, launch, round_to_even, to_float8
from fusedllm.kernels.write_pages import NULL_PAGE


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

# Reasoned, not measured. An H200 has 132 processors, and with two programs each one reads while the other begins or ends.
PROGRAMS = 264

# Keys that are worth a program of their own; and of a table that is so short that one program for each KV head takes no
# longer than the launch of a second kernel.
LEAST_KEYS = 256
MOST_KEYS_ALONE = 1024

# The largest code of int8.
MOST = 127

# Warps of a program that adds up.
SUM_WARPS = 2


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
        splits = max(1, min(wanted, most // LEAST_KEYS))
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
    token = [x.reshape(batch, *x.shape[2:]) for x in (q, k, v, cos, sin)]
    positions = [page_table.astype(jnp.int32), start.astype(jnp.int32)]
    mixed = jax.ShapeDtypeStruct((batch, heads, head_dim), q.dtype)
    parts = [
        jax.ShapeDtypeStruct((batch, heads, plan.splits, head_dim), jnp.float32),
        jax.ShapeDtypeStruct((batch, heads, plan.splits), jnp.float32),
    ]
    results = [mixed] if plan.splits == 1 else parts
    before = len(token) + len(positions)
    *found, = launch(
        functools.partial(_split, layout=layout, plan=plan),
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
        kernel = functools.partial(_sum, layout=layout, plan=plan)
        operands = (positions[1], *found[: len(results)])
        found = launch(kernel, (heads, batch), [mixed], *operands, warps=SUM_WARPS, stages=1, interpret=interpret)
    return found[0].reshape(q.shape), updated


def _split(*refs: Any, layout: Layout, plan: Plan) -> None:
    """A part of the keys of one KV head; the first one's program has the newest position beside its part."""
    q, k, v, cos, sin, page_table, start, *rest = refs
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
        turn = _Rotation.of(cos, sin, row, layout)
        queries = turn(q, (row, query_head[:, None]), mask).astype(q.dtype)
        newest = [
            _as_held(x, held.dtype)
            for x, held in zip(
                (turn(k, (row, head), inside), _load(v, (row, head, column), inside)), pages, strict=False
            )
        ]
        _write(newest, updated, page_table, row, head, begin, split == 0, layout)
        state = _where(split == 0, _newest_seen(queries, newest, layout), nothing_seen(plan.rows, layout.width))
        keys = Keys(layout, tuple(pages), page_table, row, head)

        def visible(key: jax.Array) -> jax.Array:
            return (key >= bounds[0]) & (key < bounds[1])

        def visit(index: Any, state: State) -> State:
            return keys.visit(queries, state, index, plan.blocks.keys, bounds, visible)

        state = jax.lax.fori_loop(first, behind, visit, state)
        if plan.splits == 1:
            (mixed,) = results
            place = (row, query_head[:, None], column[None, :])
            triton.store(mixed.at[place], weighted(state).astype(mixed.dtype), mask=mask)
        else:
            parts, sizes = results
            place = (row, query_head[:, None], split, column[None, :])
            triton.store(parts.at[place], weighted(state), mask=mask)
            size = state[2] + jnp.log(state[1]) * np.float32(math.log2(math.e))
            triton.store(sizes.at[row, query_head, split], size, mask=taken)


def _sum(start: Any, parts: Any, sizes: Any, mixed: Any, *, layout: Layout, plan: Plan) -> None:
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


@dataclass(frozen=True, slots=True)
class _Rotation:
    """`rotate` at the position of one row: of each element the cosine, and the sine as the pair's other half takes it.

    Attributes:
      cos: `[width]`.
      sin: `[width]`, negative in the first half.
      column: of an element.
      other: the column of the other element of its pair.
    """

    cos: jax.Array
    sin: jax.Array
    column: jax.Array
    other: jax.Array

    @classmethod
    def of(cls, cos: Any, sin: Any, row: Any, layout: Layout) -> _Rotation:
        half = layout.head_dim // 2
        column, inside = layout.columns()
        angle = jax.lax.rem(column, half)
        cosines, sines = (_load(x, (row, angle), inside) for x in (cos, sin))
        return cls(
            cosines, jnp.where(column < half, -sines, sines), column, jax.lax.rem(column + half, layout.head_dim)
        )

    def __call__(self, ref: Any, place: tuple[Any, ...], mask: jax.Array | None) -> jax.Array:
        """The elements at `place` of `ref`, rotated, float32."""
        along = (lambda column: column) if mask is None or mask.ndim == 1 else (lambda column: column[None, :])
        cos, sin, column, other = map(along, (self.cos, self.sin, self.column, self.other))
        return _load(ref, (*place, column), mask) * cos + _load(ref, (*place, other), mask) * sin


def _load(ref: Any, place: tuple[Any, ...], mask: jax.Array | None) -> jax.Array:
    """What lies at `place`, float32."""
    other = None if mask is None else jnp.zeros((), ref.dtype)
    return triton.load(ref.at[place], mask=mask, other=other).astype(jnp.float32)


def _as_held(x: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array | None]:
    """A key or value as pages of `dtype` have it, and its scale; as XLA's `cached_attention` rounds it."""
    if dtype == e4m3.CODES:
        sign = (jax.lax.bitcast_convert_type(x, jnp.int32) >> 24) & 0x80
        return jnp.where(x == x, to_float8(x), sign | FLOAT8_NAN).astype(dtype), None
    if dtype != jnp.int8:
        return x.astype(dtype), None
    # Triton's maximum passes over what is no number.
    unknown = jnp.max(jnp.where(x == x, 0, 1)) > 0
    scale = jnp.where(unknown, np.float32(np.nan), jnp.max(jnp.abs(x)) * np.float32(1 / MOST))
    usable = (scale >= np.finfo(np.float32).tiny) & (scale < np.float32(np.inf))
    codes = jnp.where(usable, round_to_even(x * (1 / scale)), 0)
    return jnp.clip(codes, -MOST, MOST).astype(jnp.int8), scale


def _write(
    newest: list[tuple[jax.Array, jax.Array | None]],
    updated: list[Any],
    page_table: Any,
    row: Any,
    head: Any,
    position: Any,
    writes: Any,
    layout: Layout,
) -> None:
    """Puts the newest key and value where the table says, if this program `writes`, and that is not the null page."""
    inside = position < layout.positions
    page = page_table[row, jnp.where(inside, jax.lax.div(position, layout.page_size), 0)]
    place = (page, head, jax.lax.rem(position, layout.page_size))
    column, exists = layout.columns()
    writes = writes & inside & (page != NULL_PAGE)
    mask = jnp.broadcast_to(writes, column.shape) if exists is None else writes & exists
    for of, (numbers, scale) in enumerate(newest):
        triton.store(updated[of].at[(*place, column)], numbers, mask=mask)
        if scale is not None:
            triton.store(updated[2 + of].at[place], scale, mask=writes)


def _newest_seen(queries: jax.Array, newest: list[tuple[jax.Array, jax.Array | None]], layout: Layout) -> State:
    """The state after the newest position alone."""
    key, value = (
        from_held(held, layout).astype(jnp.float32) * (np.float32(1) if scale is None else scale)
        for held, scale in newest
    )
    scores = jnp.sum(queries.astype(jnp.float32) * key[None, :], axis=1) * layout.scale
    return jnp.broadcast_to(value[None, :], queries.shape), jnp.ones_like(scores), scores


def _where(condition: Any, some: State, others: State) -> State:
    total, weight_sum, highest = (jnp.where(condition, x, y) for x, y in zip(some, others, strict=True))
    return total, weight_sum, highest
