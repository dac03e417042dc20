"""The first half of `cached_attention` of a chunk with Pallas: queries rotated, keys and values put into the cache."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from fusedllm.kernels.attention_tiles import Layout
from fusedllm.kernels.rotation_tiles import Held, Rotation, load, places, together, write
from fusedllm.kernels.triton_tiles import iota, launch

# Positions and warps of a program. Reasoned, not measured: a chunk of 512 tokens and 8 KV heads gives an H200's 132
# processors one each.
POSITIONS = 32
WARPS = 4


@functools.partial(jax.jit, static_argnames=("layout", "interpret"))
def rotate_and_write_triton(
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
    """`rotate` of `q`, and `pages` with rotated `k` and `v` in them, but for the null page; in place."""
    batch, seq, kv_heads, _ = k.shape
    operands = (*together(q, k, v), cos, sin, page_table.astype(jnp.int32), start.astype(jnp.int32))
    rotated, *updated = launch(
        functools.partial(rotate_and_write_tile, layout=layout),
        (kv_heads, batch, pl.cdiv(seq, POSITIONS)),
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, *pages)],
        *operands,
        *pages,
        warps=WARPS,
        stages=1,
        interpret=interpret,
        updated={len(operands) + i: 1 + i for i in range(len(pages))},
    )
    return rotated, tuple(updated)


def rotate_and_write_tile(*refs: Any, layout: Layout) -> None:
    """Some positions of one KV head, and of the query heads that share it."""
    (q, k, v), (q_head, k_head, v_head), (cos, sin, page_table, start, *rest) = places(refs, layout)
    rotated, *pages = rest[4 if layout.scaled else 2 :]
    head, row = pl.program_id(0), pl.program_id(1)
    number = pl.program_id(2) * POSITIONS + iota(POSITIONS)
    there = number < k.shape[1]
    column, exists = layout.columns()
    mask = there[:, None] if exists is None else there[:, None] & exists[None, :]
    mask = jnp.broadcast_to(mask, (POSITIONS, layout.width))
    turn = Rotation.of(cos, sin, (row, number[:, None]), mask, layout)
    key = turn(k, (row, number[:, None], k_head + head), mask)
    value = load(v, (row, number[:, None], v_head + head, column[None, :]), mask)
    held = Held.of(key, pages[0].dtype), Held.of(value, pages[0].dtype)
    write(held, pages, page_table, row, head, start[row] + number, there, layout)

    def rotate_query(index: Any, nothing: jax.Array) -> jax.Array:
        query_head = head * layout.group + index
        query = turn(q, (row, number[:, None], q_head + query_head), mask).astype(rotated.dtype)
        triton.store(rotated.at[row, number[:, None], query_head, column[None, :]], query, mask=mask)
        return nothing

    jax.lax.fori_loop(0, layout.group, rotate_query, jnp.int32(0))
