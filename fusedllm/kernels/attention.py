"""`paged_attention`: causal attention of consecutive queries over a KV cache that is read through a page table."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from fusedllm.errors import ImplementationError
from fusedllm.kernels.attention_support import why_not_attention
from fusedllm.kernels.choose import choose
from fusedllm.kernels.e4m3 import CODES, from_e4m3
from fusedllm.kernels.mosaic_limits import why_not_attention_mosaic
from fusedllm.kernels.pallas_support import interprets

# Queries and keys are visited in blocks of so many positions, so that scores take no more than their product per head,
# and keys in the future of a whole block of queries are not read. On a CPU 128 queries were 4 % faster than 256 in a
# prefill of 1,024 tokens (minima of five runs); larger blocks of keys gained nothing.
QUERY_BLOCK = 128
KEY_BLOCK = 256

# Instead of -inf, whose difference with itself is not a number.
MASKED = -1e30


def paged_attention(
    q: Float[Array, "batch seq heads head_dim"],
    k_pages: Shaped[Array, "pages kv_heads page_size head_dim"],
    v_pages: Shaped[Array, "pages kv_heads page_size head_dim"],
    page_table: Int[Array, "batch table"],
    start: Int[Array, " batch"],
    *,
    scales: tuple[Float[Array, "pages kv_heads page_size"], ...] | None = None,
    window: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "batch seq heads head_dim"]:
    """Softmax attention; query `i` of a row stands at position `start + i` and sees positions up to its own.

    With `window` it sees only the latest `window` positions, its own included. Scores, softmax and sums are float32,
    combined block by block (online softmax, arXiv:1805.02867; FlashAttention, arXiv:2205.14135). Keys and values of
    the queries themselves must be in the pages already. Position `p` of a row lies in page `page_table[row, p //
    page_size]`. Heads are grouped: query head `h` reads kv head `h // (heads // kv_heads)` (arXiv:2305.13245). With
    `scales`, of K and of V, what the pages hold is multiplied by its position's. Pages of uint8 hold codes of e4m3.

    Raises:
      ImplementationError: `implementation` names one that does not exist, can't run here, or can't take the operands.
    """
    implementations = {"xla": _attention_xla, "triton": _attention_triton, "mosaic": _attention_mosaic}
    return choose("paged_attention", implementations, implementation)(
        q, k_pages, v_pages, page_table, start, scales, window, implementation is not None
    )


def _attention_triton(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    start: jax.Array,
    scales: tuple[jax.Array, ...] | None,
    window: int | None,
    strict: bool,
) -> jax.Array:
    pages = (k_pages, v_pages, *(scales or ()))
    if problem := why_not_attention(q, pages):
        if strict:
            raise ImplementationError(f"paged_attention: the implementation 'triton' can't run: {problem}.")
        return _attention_xla(q, k_pages, v_pages, page_table, start, scales, window, strict)
    # They import Pallas: see `pallas_support`.
    from fusedllm.kernels.attention_tiles import Layout
    from fusedllm.kernels.attention_triton import attention_triton

    layout = Layout.of(q, pages, page_table, window)
    return attention_triton(q, pages, page_table, start, layout=layout, interpret=interprets())


def _attention_mosaic(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    start: jax.Array,
    scales: tuple[jax.Array, ...] | None,
    window: int | None,
    strict: bool,
) -> jax.Array:
    if problem := why_not_attention_mosaic(q, (k_pages, v_pages, *(scales or ()))):
        if strict:
            raise ImplementationError(f"paged_attention: the implementation 'mosaic' can't run: {problem}.")
        return _attention_triton(q, k_pages, v_pages, page_table, start, scales, window, strict)
    from fusedllm.kernels.attention_mosaic import attention_mosaic  # Imports Pallas: see `pallas_support`.

    return attention_mosaic(q, k_pages, v_pages, page_table, start, window, interprets())


def _attention_xla(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    start: jax.Array,
    scales: tuple[jax.Array, ...] | None,
    window: int | None,
    strict: bool,
) -> jax.Array:
    del strict
    batch, seq, heads, head_dim = q.shape
    kv_heads, page_size = k_pages.shape[1:3]
    grouped = q.reshape(batch, seq, kv_heads, heads // kv_heads, head_dim)
    # At least two blocks: the read of an only block does not depend on the loop, and XLA then fuses it with the write
    # of the newest position before it, for which it keeps a copy of the whole cache.
    pages_per_block = max(1, min(KEY_BLOCK // page_size, page_table.shape[1] // 2))
    padding = -page_table.shape[1] % pages_per_block
    table = jnp.pad(page_table, ((0, 0), (0, padding)))
    blocks = []
    for first in range(0, seq, QUERY_BLOCK):
        part = grouped[:, first : first + QUERY_BLOCK]
        # Constants stay constants, for what depends on them below.
        with jax.ensure_compile_time_eval():
            part_start = start + first
        blocks.append(_query_block(part, (k_pages, v_pages), scales, table, part_start, pages_per_block, window))
    return jnp.concatenate(blocks, axis=1).reshape(batch, seq, heads, head_dim)


def _query_block(
    q: jax.Array,
    pages: tuple[jax.Array, jax.Array],
    scales: tuple[jax.Array, ...] | None,
    table: jax.Array,
    start: jax.Array,
    pages_per_block: int,
    window: int | None,
) -> jax.Array:
    batch, seq, kv_heads, group, head_dim = q.shape
    block = pages_per_block * pages[0].shape[2]
    q_position = start[:, None] + jnp.arange(seq)
    # A narrow cache is widened to the queries' precision, never the other way round.
    wide = q.dtype if pages[0].dtype.itemsize == 1 else jnp.promote_types(q.dtype, pages[0].dtype)
    precision = lax.Precision.HIGHEST if wide == jnp.float32 else None
    out_dtype = q.dtype
    q = q.astype(wide).transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, group * seq, head_dim)

    def read(ids: jax.Array, of: int) -> jax.Array:
        """Keys or values of a block: [batch, pages, kv_heads, page_size, ...] -> [batch, kv_heads, block, ...]."""
        held = pages[of][ids].swapaxes(1, 2).reshape(batch, kv_heads, block, head_dim)
        numbers = from_e4m3(held, wide) if held.dtype == CODES else held.astype(wide)
        if scales is None:
            return numbers
        return numbers * scales[of][ids].swapaxes(1, 2).reshape(batch, kv_heads, block, 1).astype(wide)

    def visit(
        index: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        total, weight_sum, highest = carry
        ids = lax.dynamic_slice_in_dim(table, index * pages_per_block, pages_per_block, axis=1)
        k, v = (read(ids, of) for of in range(2))
        k_position = index * block + jnp.arange(block)
        # What an earlier request left in a page may be no number, which a weight of zero would not silence.
        v = jnp.where((k_position <= q_position[:, -1:])[:, None, :, None], v, 0)
        scores = jnp.einsum("bkqd,bktd->bkqt", q, k, precision=precision, preferred_element_type=jnp.float32)
        scores = scores.reshape(batch, kv_heads, group, seq, block) * (1 / math.sqrt(head_dim))
        visible = k_position <= q_position[:, :, None]
        if window is not None:
            visible &= k_position > q_position[:, :, None] - window
        scores = jnp.where(visible[:, None, None], scores, MASKED)
        new_highest = jnp.maximum(highest, scores.max(axis=-1))
        # A row without a visible key in this block keeps its sums: its scores are exp(MASKED - highest) = 0, and
        # before its first visible key whatever was summed is cleared by rescale = exp(MASKED - highest) = 0.
        weights = jnp.exp(scores - new_highest[..., None])
        rescale = jnp.exp(highest - new_highest)
        partial = jnp.einsum(
            "bkqt,bktd->bkqd",
            weights.astype(wide).reshape(batch, kv_heads, group * seq, block),
            v,
            precision=precision,
            preferred_element_type=jnp.float32,
        ).reshape(total.shape)
        return total * rescale[..., None] + partial, weight_sum * rescale + weights.sum(axis=-1), new_highest

    # Where `start` is a constant these are numbers: only a loop of known length can be differentiated backwards.
    with jax.ensure_compile_time_eval():
        last_block = (jnp.max(start) + seq - 1) // block
        first_block = jnp.int32(0) if window is None else jnp.maximum(jnp.min(start) - window + 1, 0) // block
        # A chunk's padding may reach past the table's end; positions there belong to nobody.
        end = jnp.minimum(last_block + 1, table.shape[1] // pages_per_block)
    initial = (
        jnp.zeros((batch, kv_heads, group, seq, head_dim), jnp.float32),
        jnp.zeros((batch, kv_heads, group, seq), jnp.float32),
        jnp.full((batch, kv_heads, group, seq), MASKED, jnp.float32),
    )
    total, weight_sum, _ = lax.fori_loop(first_block, end, visit, initial)
    # [batch, kv_heads, group, seq, head_dim] -> [batch, seq, kv_heads, group, head_dim]
    return (total / weight_sum[..., None]).transpose(0, 3, 1, 2, 4).astype(out_dtype)
