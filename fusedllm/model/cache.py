"""The KV cache: one array of pages for K and one for V per layer, indexed through a page table."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from fusedllm.config import ModelConfig

# Writes of padding and of finished requests go here; no page table hands it out.
NULL_PAGE = 0


@flax.struct.dataclass
class KVCache:
    """`k[layer]` and `v[layer]` are `[pages, kv_heads, page_size, head_dim]`."""

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]


def cache_shape(config: ModelConfig, pages: int, page_size: int) -> tuple[int, int, int, int]:
    """Shape of one layer's K (or V) array."""
    return (pages, config.num_kv_heads, page_size, config.head_dim)


def empty_cache(config: ModelConfig, pages: int, page_size: int, dtype: DTypeLike) -> KVCache:
    """A cache of zeros; page `NULL_PAGE` is one of `pages`."""
    shape = cache_shape(config, pages, page_size)
    return KVCache(
        k=tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers)),
        v=tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers)),
    )


def write_pages(
    pages: Float[Array, "pages kv_heads page_size head_dim"],
    values: Float[Array, "batch seq kv_heads head_dim"],
    page_table: Int[Array, "batch table"],
    start: Int[Array, " batch"],
) -> Float[Array, "pages kv_heads page_size head_dim"]:
    """`pages` with `values` at positions `start, start + 1, ...` of each row.

    Where `seq` is a multiple of the page size, each `start` must be one too: whole pages are written then, which takes
    a scatter of `seq / page_size` rather than `seq` windows. Positions past the table's end go to the null page.
    """
    page_size = pages.shape[2]
    batch, seq, kv_heads, head_dim = values.shape
    values = values.astype(pages.dtype)
    if seq % page_size == 0:
        count = seq // page_size
        index = start[:, None] // page_size + jnp.arange(count)
        ids = _look_up(page_table, index).reshape(-1)
        whole = values.reshape(batch, count, page_size, kv_heads, head_dim).transpose(0, 1, 3, 2, 4)
        return pages.at[ids].set(whole.reshape(-1, kv_heads, page_size, head_dim), mode="promise_in_bounds")
    position = start[:, None] + jnp.arange(seq)
    ids = _look_up(page_table, position // page_size)
    return pages.at[ids, :, position % page_size].set(values, mode="promise_in_bounds")


def _look_up(page_table: jax.Array, index: jax.Array) -> jax.Array:
    inside = index < page_table.shape[1]
    found = jnp.take_along_axis(page_table, jnp.where(inside, index, 0), axis=1, mode="promise_in_bounds")
    return jnp.where(inside, found, NULL_PAGE)
