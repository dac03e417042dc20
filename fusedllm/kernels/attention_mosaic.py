"""`paged_attention` with Mosaic GPU, for prefills on Hopper: the copy engine brings pages, and two warpgroups multiply.

The manner is that of FlashAttention-3 (arXiv:2407.08608), learned from the kernel of unpaged attention that jax ships
(`jax.experimental.pallas.ops.gpu.attention_mgpu`): a warpgroup starts copies of keys and values into a ring of stages,
two others multiply what has landed and free it. Here a stage is filled by as many copies as it has pages, each of a
contiguous `[page_size, head_dim]`, and both computing warpgroups have the same kv head, so that they read one stage.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as gpu

from fusedllm.kernels import mosaic_support as support

# Instead of -inf, whose difference with itself is not a number.
MASKED = -1e30

# Warpgroups that compute; one more copies.
WORKERS = 2

# Turns of the ring. Reasoned, not measured: shared memory of a program is 227 KB, and these take 112 and 160 KB with
# queries; a processor has registers for one program.
STAGES = {64: 3, 128: 2}

# Keys of a turn. Reasoned, not measured: their scores are 64 registers of a thread, and half as many once rounded.
KEYS = 128


@dataclass(frozen=True, slots=True)
class Plan:
    """How an attention is cut.

    Attributes:
      seq: queries of a batch row, without what fills the last tile.
      group: query heads of a kv head.
      heads: query heads of a program: one for each worker, or one for all, which then have consecutive queries.
      tiles: blocks of queries of a batch row.
      page_size: positions of a page.
      copied: positions of one copy.
      table: pages of a batch row.
      head_dim: of a head.
      window: as `paged_attention` has it.
    """

    seq: int
    group: int
    heads: int
    tiles: int
    page_size: int
    copied: int
    table: int
    head_dim: int
    window: int | None

    @classmethod
    def of(cls, q: Any, k_pages: Any, page_table: Any, window: int | None) -> Plan:
        """For these operands, or their shapes."""
        _, seq, heads, head_dim = q.shape
        kv_heads, page_size = k_pages.shape[1:3]
        group = heads // kv_heads
        together = WORKERS if group % WORKERS == 0 else 1
        tiles = pl.cdiv(seq, support.LEAST_ROWS * WORKERS // together)
        copied = min(page_size, KEYS)
        return cls(seq, group, together, tiles, page_size, copied, page_table.shape[1], head_dim, window)

    @property
    def queries(self) -> int:
        """Queries of a program."""
        return support.LEAST_ROWS * WORKERS // self.heads

    @property
    def stages(self) -> int:
        """Of the ring."""
        return STAGES[self.head_dim]

    @property
    def copies(self) -> int:
        """That fill a stage with keys, and as many with values."""
        return KEYS // self.copied

    @property
    def capacity(self) -> int:
        """Positions that the page table has."""
        return self.table * self.page_size


@functools.partial(jax.jit, static_argnums=(5, 6))
def attention_mosaic(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    start: jax.Array,
    window: int | None,
    interpret: bool,
) -> jax.Array:
    """What `paged_attention` returns, for operands that `why_not_attention_mosaic` has nothing against."""
    plan = Plan.of(q, k_pages, page_table, window)
    batch, _, heads, head_dim = q.shape
    padded = jnp.pad(q, ((0, 0), (0, plan.tiles * plan.queries - plan.seq), (0, 0), (0, 0)))
    # The longest tiles first: the last programs to start should be short.
    grid = {"tile": plan.tiles, "batch": batch, "head": heads // plan.heads}
    out = support.launch(
        functools.partial(_program, plan=plan, interpret=interpret),
        jax.ShapeDtypeStruct(padded.shape, q.dtype),
        padded,
        k_pages,
        v_pages,
        page_table.astype(jnp.int32),
        start.astype(jnp.int32),
        grid=grid,
        scratch={
            "q_shared": support.shared((WORKERS, support.LEAST_ROWS, head_dim), q.dtype),
            "k_shared": support.shared((plan.stages, KEYS, head_dim), q.dtype),
            "v_shared": support.shared((plan.stages, KEYS, head_dim), q.dtype),
            "q_landed": support.barriers(WORKERS),
            "k_landed": support.barriers(plan.stages, plan.copies),
            "v_landed": support.barriers(plan.stages, plan.copies),
            "k_free": support.barriers(plan.stages, WORKERS),
            "v_free": support.barriers(plan.stages, WORKERS),
        },
        warpgroups=WORKERS + 1,
        interpret=interpret,
    )
    return out[:, : plan.seq]


def _program(
    q: Any,
    k_pages: Any,
    v_pages: Any,
    page_table: Any,
    start: Any,
    out: Any,
    *,
    q_shared: Any,
    k_shared: Any,
    v_shared: Any,
    q_landed: Any,
    k_landed: Any,
    v_landed: Any,
    k_free: Any,
    v_free: Any,
    plan: Plan,
    interpret: bool,
) -> None:
    row = lax.axis_index("batch")
    tile = plan.tiles - 1 - lax.axis_index("tile")
    head = lax.axis_index("head") * plan.heads
    begin = start[row]
    # What all of a program's warpgroups go through, whatever they see of it: so the ring needs no other order.
    first, end = _blocks(plan, begin, tile * plan.queries)
    turns = jnp.maximum(end - first, 0)

    def slot(turn: Any) -> Any:
        return lax.rem(turn, jnp.int32(plan.stages))

    def copying() -> None:
        kv_head = lax.div(head, jnp.int32(plan.group))

        def fill(turn: Any, carry: None) -> None:
            begins = [(first + turn) * KEYS + number * plan.copied for number in range(plan.copies)]
            # All numbers of pages are read before the first is waited for. Beyond the table nothing is visible.
            within = [jnp.minimum(lax.div(at, jnp.int32(plan.page_size)), plan.table - 1) for at in begins]
            ids = [page_table[row, page] for page in within]
            for pages, ring, landed, free in (
                (k_pages, k_shared, k_landed, k_free),
                (v_pages, v_shared, v_landed, v_free),
            ):

                @pl.when(turn >= plan.stages)
                def _(free: Any = free) -> None:
                    gpu.barrier_wait(free.at[slot(turn)])

                for number, (page, at) in enumerate(zip(ids, begins, strict=True)):
                    inside = pl.ds(lax.rem(at, jnp.int32(plan.page_size)), plan.copied)
                    gpu.copy_gmem_to_smem(
                        pages.at[page, kv_head, inside],
                        ring.at[slot(turn), pl.ds(number * plan.copied, plan.copied)],
                        landed.at[slot(turn)],
                    )
            return carry

        lax.fori_loop(0, turns, fill, None)

        def drain(turn: Any, carry: None) -> None:
            gpu.barrier_wait(k_free.at[slot(turn)])
            gpu.barrier_wait(v_free.at[slot(turn)])
            return carry

        # So that every arrival at a barrier has been waited for.
        lax.fori_loop(jnp.maximum(turns - plan.stages, 0), turns, drain, None)

    def computing(worker: Any) -> None:
        rows, head_dim = support.LEAST_ROWS, plan.head_dim
        together = plan.heads > 1
        at = tile * plan.queries + (0 if together else worker * rows)
        place = (row, pl.ds(at, rows), head + worker if together else head)
        queries = q_shared.at[worker]
        gpu.copy_gmem_to_smem(q.at[place], queries, q_landed.at[worker])
        gpu.barrier_wait(q_landed.at[worker])
        lowest = begin + at
        shape = (rows, KEYS)

        def visit(turn: Any, carry: tuple[jax.Array, ...], masked: bool, last: bool) -> tuple[jax.Array, ...]:
            total, weight_sum, highest = carry
            block = (first + turn) * KEYS
            gpu.barrier_wait(k_landed.at[slot(turn)])
            scores = support.product(queries, k_shared.at[slot(turn)], True, interpret)
            gpu.barrier_arrive(k_free.at[slot(turn)])
            # Powers of two are what the processor has.
            scores = scores * (math.log2(math.e) / math.sqrt(head_dim))
            if masked:
                scores = jnp.where(_visible(plan, lowest, block, interpret), scores, MASKED)
            new_highest = jnp.maximum(highest, scores.max(axis=1))
            # A row without a visible key in this block keeps its sums: its scores are 2 ** (MASKED - highest) = 0, and
            # before its first visible key whatever was summed is cleared by rescale = 2 ** (MASKED - highest) = 0.
            rescale = jnp.exp2(highest - new_highest)
            weights = jnp.exp2(scores - support.along_rows(new_highest, shape))
            total = total * support.along_rows(rescale, total.shape)
            weight_sum = weight_sum * rescale + weights.sum(axis=1)
            rounded = weights.astype(q.dtype)
            gpu.barrier_wait(v_landed.at[slot(turn)])
            values = v_shared.at[slot(turn)]
            if last:
                _clear_beyond(values, begin + plan.seq - block, interpret)
            total = support.product(rounded, values, False, interpret, total)
            gpu.barrier_arrive(v_free.at[slot(turn)])
            return total, weight_sum, new_highest

        carry = (
            support.filled((rows, head_dim), 0, interpret),
            support.filled((rows,), 0, interpret),
            support.filled((rows,), MASKED, interpret),
        )
        whole_from, whole_to = _whole_blocks(plan, lowest)
        whole_to = jnp.clip(whole_to - first, 0, turns)
        whole_from = jnp.clip(whole_from - first, 0, whole_to)
        if plan.window is not None:
            carry = lax.fori_loop(0, whole_from, functools.partial(visit, masked=True, last=False), carry)
        carry = lax.fori_loop(whole_from, whole_to, functools.partial(visit, masked=False, last=False), carry)
        carry = lax.fori_loop(whole_to, turns, functools.partial(visit, masked=True, last=True), carry)
        total, weight_sum, _ = carry
        # A tile that is all beyond the page table has seen nothing.
        weight_sum = jnp.where(weight_sum == 0, 1.0, weight_sum)
        support.write_out(total / support.along_rows(weight_sum, total.shape), queries, out.at[place])

    support.roles(interpret, copying, computing, WORKERS)


def _blocks(plan: Plan, begin: Any, query: Any) -> tuple[Any, Any]:
    """The first block of keys that any query of a program from `query` on sees, and the one after the last."""
    latest = begin + jnp.minimum(query + plan.queries, plan.seq) - 1
    end = jnp.minimum(lax.div(latest, jnp.int32(KEYS)) + 1, pl.cdiv(plan.capacity, KEYS))
    if plan.window is None:
        return jnp.int32(0), end
    return lax.div(jnp.maximum(begin + query - plan.window + 1, 0), jnp.int32(KEYS)), end


def _whole_blocks(plan: Plan, lowest: Any) -> tuple[Any, Any]:
    """Of the blocks that all of a worker's queries see whole the first, and the one after the last; or none between."""
    end = jnp.minimum(lax.div(lowest + 1, jnp.int32(KEYS)), plan.capacity // KEYS)
    if plan.window is None:
        return jnp.int32(0), end
    oldest = jnp.maximum(lowest + support.LEAST_ROWS - plan.window, 0)
    return lax.div(oldest + KEYS - 1, jnp.int32(KEYS)), end


def _visible(plan: Plan, lowest: Any, block: Any, interpret: bool) -> jax.Array:
    """Which keys of the block that begins at position `block` a worker's queries see."""
    shape = (support.LEAST_ROWS, KEYS)
    query = support.numbered(shape, 0, interpret) + lowest
    key = support.numbered(shape, 1, interpret) + block
    visible = key <= query
    if plan.window is not None:
        visible &= key > query - plan.window
    if plan.capacity % KEYS:
        visible &= key < plan.capacity
    return visible


def _clear_beyond(values: Any, end: Any, interpret: bool) -> None:
    """Zeros what `values` of a block holds from its position `end` on.

    What an earlier request left in a page may be no number, which a weight of zero would not silence. Both workers do
    it: each writes what the other does, and over its own values nothing else.
    """
    rows = support.LEAST_ROWS  # All at once would not fit into registers.

    def clear(held: jax.Array, offset: int) -> jax.Array:
        return jnp.where(support.numbered(held.shape, 0, interpret) < end - offset, held, jnp.zeros_like(held))

    for offset in range(0, KEYS, rows):

        @pl.when(end < offset + rows)
        def _(offset: int = offset) -> None:
            support.rewrite(values.at[pl.ds(offset, rows)], functools.partial(clear, offset=offset), interpret)
