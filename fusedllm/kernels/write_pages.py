"""`write_pages`: new positions' values put into the pages of a KV cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

# Writes of padding and of finished requests go here; no page table hands it out.
NULL_PAGE = 0


def write_pages(
    pages: Shaped[Array, "pages kv_heads page_size *head_dim"],
    values: Shaped[Array, "batch seq kv_heads *head_dim"],
    page_table: Int[Array, "batch table"],
    start: Int[Array, " batch"],
) -> Shaped[Array, "pages kv_heads page_size *head_dim"]:
    """`pages` with `values` at positions `start, start + 1, ...` of each row.

    Where `seq` is a multiple of the page size, each `start` must be one too: whole pages are written then, which takes
    a scatter of `seq / page_size` rather than `seq` windows. Positions past the table's end go to the null page.
    """
    page_size = pages.shape[2]
    batch, seq, kv_heads, *rest = values.shape
    values = values.astype(pages.dtype)
    if seq % page_size == 0:
        count = seq // page_size
        index = start[:, None] // page_size + jnp.arange(count)
        ids = _look_up(page_table, index).reshape(-1)
        whole = jnp.moveaxis(values.reshape(batch, count, page_size, kv_heads, *rest), 3, 2)
        return pages.at[ids].set(whole.reshape(-1, kv_heads, page_size, *rest), mode="promise_in_bounds")
    position = start[:, None] + jnp.arange(seq)
    ids = _look_up(page_table, position // page_size)
    return pages.at[ids, :, position % page_size].set(values, mode="promise_in_bounds")


def _look_up(page_table: jax.Array, index: jax.Array) -> jax.Array:
    inside = index < page_table.shape[1]
    found = jnp.take_along_axis(page_table, jnp.where(inside, index, 0), axis=1, mode="promise_in_bounds")
    return jnp.where(inside, found, NULL_PAGE)
