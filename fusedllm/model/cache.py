"""The KV cache: one array of pages for K and one for V per layer, indexed through a page table."""

from __future__ import annotations

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fusedllm.config import ModelConfig
from fusedllm.kernels import e4m3
from fusedllm.kernels.write_pages import NULL_PAGE

__all__ = ["NULL_PAGE", "KVCache", "cache_shape", "empty_cache"]


@flax.struct.dataclass
class KVCache:
    """`k[layer]` and `v[layer]` are `[pages, kv_heads, page_size, head_dim]`.

    A cache of int8 has float32 scales of both, `[pages, kv_heads, page_size]`; any other has none. One of
    float8_e4m3fn holds its numbers' codes as uint8.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    k_scales: tuple[jax.Array, ...] = ()
    v_scales: tuple[jax.Array, ...] = ()

    def of_layer(self, layer: int) -> tuple[jax.Array, ...]:
        """The layer's arrays, as `cached_attention` takes them."""
        return tuple(arrays[layer] for arrays in (self.k, self.v, self.k_scales, self.v_scales) if arrays)

    @staticmethod
    def of_layers(layers: Sequence[tuple[jax.Array, ...]]) -> KVCache:
        """The cache of which `layers` are the arrays, as `cached_attention` returns them."""
        return KVCache(*zip(*layers, strict=True))


def cache_shape(config: ModelConfig, pages: int, page_size: int) -> tuple[int, int, int, int]:
    """Shape of one layer's K (or V) array."""
    return (pages, config.num_kv_heads, page_size, config.head_dim)


def empty_cache(config: ModelConfig, pages: int, page_size: int, dtype: DTypeLike) -> KVCache:
    """A cache of zeros of `dtype`, with scales if that is int8; page `NULL_PAGE` is one of `pages`."""
    shape = cache_shape(config, pages, page_size)

    def layers(shape: tuple[int, ...], dtype: DTypeLike) -> tuple[jax.Array, ...]:
        return tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers))

    if jnp.dtype(dtype) == e4m3.DTYPE:
        dtype = e4m3.CODES
    if jnp.dtype(dtype) != jnp.int8:
        return KVCache(k=layers(shape, dtype), v=layers(shape, dtype))
    scales = shape[:-1]
    return KVCache(
        k=layers(shape, dtype),
        v=layers(shape, dtype),
        k_scales=layers(scales, jnp.float32),
        v_scales=layers(scales, jnp.float32),
    )
