"""`paged_attention` with Pallas: FlashAttention over pages, for a tile of queries and heads at a time."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from fusedllm.kernels.attention_support import power_of_two
from fusedllm.kernels.attention_tiles import Keys, Layout, nothing_seen, weighted
from fusedllm.kernels.triton_tiles import iota, launch


@dataclass(frozen=True, slots=True)
class Tiles:
    """How attention is cut for heads of some size.

    Attributes:
      width: the most elements of a head that this is for.
      rows: of a tile at most; a query has as many as heads share its keys.
      keys: that are read at a time.
      warps: of a program.
      stages: blocks of keys that are under way at a time.
    """

    width: int
    rows: int
    keys: int
    warps: int
    stages: int


# Reasoned, not measured. Hopper's matrix unit takes 64 rows of four warps. What a row sums up stays in registers beside
# its scores, of which a thread has 255, and queries and the keys and values under way are in shared memory: 129 KiB at
# most of Hopper's 227, and 97 on other GPUs, where there are 99 at least.
TILES = (
    Tiles(width=64, rows=128, keys=64, warps=4, stages=3),
    Tiles(width=128, rows=128, keys=64, warps=8, stages=3),
    Tiles(width=256, rows=64, keys=32, warps=4, stages=2),
)

# Three operands for each float32 need three times the memory.
WIDE_TILES = (
    Tiles(width=64, rows=64, keys=32, warps=4, stages=2),
    Tiles(width=128, rows=32, keys=32, warps=4, stages=2),
    Tiles(width=256, rows=16, keys=16, warps=4, stages=1),
)


@dataclass(frozen=True, slots=True)
class Plan:
    """How one call is cut.

    Attributes:
      tiles: the row of the table.
      rows: of a tile.
      queries: of a tile; what is left of its rows is empty.
      grid: of KV heads, rows of the batch, and tiles.
    """

    tiles: Tiles
    rows: int
    queries: int
    grid: tuple[int, int, int]

    @classmethod
    def of(cls, batch: int, seq: int, kv_heads: int, layout: Layout) -> Plan:
        """For queries `[batch, seq]`."""
        table = WIDE_TILES if layout.wide == jnp.float32 else TILES
        tiles = next(tiles for tiles in table if layout.width <= tiles.width)
        rows = power_of_two(min(max(tiles.rows, layout.group), seq * layout.group))
        queries = rows // layout.group
        return cls(tiles, rows, queries, (kv_heads, batch, pl.cdiv(seq, queries)))


@functools.partial(jax.jit, static_argnames=("layout", "interpret"))
def attention_triton(
    q: jax.Array,
    pages: tuple[jax.Array, ...],
    page_table: jax.Array,
    start: jax.Array,
    *,
    layout: Layout,
    interpret: bool,
) -> jax.Array:
    """What `paged_attention` says, for what `why_not_attention` has nothing against; of `layout`."""
    batch, seq = q.shape[:2]
    plan = Plan.of(batch, seq, pages[0].shape[1], layout)
    kernel = functools.partial(attention_tile, layout=layout, plan=plan)
    out = jax.ShapeDtypeStruct(q.shape, q.dtype)
    operands = (q, page_table.astype(jnp.int32), start.astype(jnp.int32), *pages)
    warps, stages = plan.tiles.warps, plan.tiles.stages
    (mixed,) = launch(kernel, plan.grid, [out], *operands, warps=warps, stages=stages, interpret=interpret)
    return mixed


def attention_tile(*refs: Any, layout: Layout, plan: Plan) -> None:
    """Some queries of the heads that share one KV head."""
    q, page_table, start, *pages, out = refs
    head, row = pl.program_id(0), pl.program_id(1)
    # Those that see most begin first, and others fill what is left of the device when they end.
    tile = plan.grid[2] - 1 - pl.program_id(2)
    seq, count = q.shape[1], plan.tiles.keys

    number = iota(plan.rows)
    query = tile * plan.queries + jax.lax.div(number, layout.group)
    query_head = head * layout.group + jax.lax.rem(number, layout.group)
    column, inside = layout.columns()
    taken = (number < plan.queries * layout.group) & (query < seq)
    mask = taken[:, None] if inside is None else taken[:, None] & inside[None, :]
    mask = jnp.broadcast_to(mask, (plan.rows, layout.width))
    place = (row, query[:, None], query_head[:, None], column[None, :])
    queries = triton.load(q.at[place], mask=mask, other=jnp.zeros((), q.dtype))

    begin = start[row]
    position = begin + query
    first = begin + tile * plan.queries
    last = begin + jnp.minimum((tile + 1) * plan.queries, seq) - 1
    # A chunk's padding may reach past the table's end; positions there belong to nobody.
    bounds = layout.first_seen(first), jnp.minimum(last + 1, layout.positions)
    blocks = jax.lax.div(bounds[0], count), pl.cdiv(bounds[1], count)
    # Blocks that all queries of the tile see all of need no comparison.
    whole_end = jnp.minimum(jax.lax.div(jnp.minimum(first + 1, bounds[1]), count), blocks[1])
    whole_begin = jnp.minimum(pl.cdiv(layout.first_seen(last), count), blocks[1])
    whole_end = jnp.maximum(whole_begin, whole_end)
    keys = Keys(layout, tuple(pages), page_table, row, head, count, bounds)

    def visible(key: jax.Array) -> jax.Array:
        past = key <= position[:, None]
        return past if layout.window is None else past & (key > position[:, None] - layout.window)

    carry = nothing_seen(plan.rows, layout.width), keys.pages_of(blocks[0])
    if layout.window is not None:
        carry = keys.loop(queries, carry, (blocks[0], whole_begin), visible)
    carry = keys.loop(queries, carry, (whole_begin, whole_end), None)
    state, _ = keys.loop(queries, carry, (whole_end, blocks[1]), visible)
    triton.store(out.at[place], weighted(state).astype(out.dtype), mask=mask)
