"""`cached_attention`: rotates new queries and keys, puts keys and values into the cache, and attends over it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from fusedllm.errors import ImplementationError
from fusedllm.kernels.attention import paged_attention
from fusedllm.kernels.attention_support import why_not_attention
from fusedllm.kernels.choose import choose
from fusedllm.kernels.e4m3 import CODES, to_e4m3
from fusedllm.kernels.mosaic_limits import why_not_attention_mosaic
from fusedllm.kernels.pallas_support import interprets
from fusedllm.kernels.rotate import rotate
from fusedllm.kernels.write_pages import write_pages

# K and V, and for int8 the scales of K and of V.
Pages = tuple[jax.Array, ...]

# What the native implementation reads and writes: int8 with its scales, uint8 as codes of e4m3.
NATIVE_DTYPES = ("bfloat16", "float16", "float32", "int8", "uint8")

# The largest code of int8. -128 is left out, so that a number and its negative have the same magnitude.
MOST = 127


def cached_attention(
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch seq kv_heads head_dim"],
    v: Float[Array, "batch seq kv_heads head_dim"],
    cos: Float[Array, "batch seq half"],
    sin: Float[Array, "batch seq half"],
    pages: tuple[Shaped[Array, "pages kv_heads page_size *_"], ...],
    page_table: Int[Array, "batch table"],
    start: Int[Array, " batch"],
    *,
    window: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "batch seq heads head_dim"], tuple[Shaped[Array, "pages kv_heads page_size *_"], ...]]:
    """Attention of new positions, and the cache with their keys and values in it.

    `q` and `k` are not rotated yet; `cos` and `sin` are those of positions `start, start + 1, ...`. `pages` is a
    layer's cache: K and V `[pages kv_heads page_size head_dim]`, and where they are int8 the scales of K and of V,
    float32 `[pages kv_heads page_size]`. Keys and values are rounded to the cache's dtype and attended to as they are
    there. int8 is symmetric, with a scale for each position and head: its largest magnitude / 127. uint8 are codes of
    e4m3 (`to_e4m3` says how numbers become them), without a scale: a scale moves the exponent, and what is lost is
    fraction. What `paged_attention` says of positions, window and heads holds here, and what `write_pages` says of
    `start`.

    The native implementation (`"ffi"`) updates the cache in place if it is donated, writes nothing to the null page,
    and refuses positions below zero and pages that the cache does not have when it runs. So does `"triton"`, but
    that it refuses nothing; it is one kernel or two. `"mosaic"` writes as `"triton"` does, and leaves what it can't
    take to it where nothing was asked for.

    Raises:
      ImplementationError: `implementation` names one that does not exist, can't run here, or can't take the operands.
      ValueError: `window` is no positive integer.
    """
    if window is not None:
        if isinstance(window, bool) or not isinstance(window, int | np.integer) or not 1 <= window < 2**31:
            raise ValueError(f"cached_attention: window must be a positive integer or None, got {window!r}.")
        window = int(window)
    implementations = {
        "xla": _cached_attention_xla,
        "ffi": _cached_attention_ffi,
        "triton": _cached_attention_triton,
        "mosaic": _cached_attention_mosaic,
    }
    return choose("cached_attention", implementations, implementation)(
        q, k, v, cos, sin, pages, page_table, start, window, implementation is not None
    )


def _cached_attention_xla(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    pages: Pages,
    page_table: jax.Array,
    start: jax.Array,
    window: int | None,
    strict: bool,
) -> tuple[jax.Array, Pages]:
    del strict
    # Wide, so that a key is rounded once.
    new: tuple[jax.Array, ...] = (rotate(k.astype(jnp.float32), cos, sin), v.astype(jnp.float32))
    if len(pages) == 4:
        (k_codes, k_scales), (v_codes, v_scales) = map(_quantize, new)
        new = k_codes, v_codes, k_scales, v_scales
    elif pages[0].dtype == CODES:
        new = tuple(map(to_e4m3, new))
    pages = tuple(write_pages(old, values, page_table, start) for old, values in zip(pages, new, strict=True))
    k_pages, v_pages, *scales = pages
    mixed = paged_attention(
        rotate(q, cos, sin),
        k_pages,
        v_pages,
        page_table,
        start,
        scales=tuple(scales) or None,
        window=window,
        implementation="xla",
    )
    return mixed, pages


def _quantize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Codes, and the scale of each position and head."""
    scale = jnp.abs(x).max(axis=-1) * jnp.float32(1 / MOST)
    # A scale that is no number, or infinite, alone makes what is read no number; the inverse of one below the least
    # normal number might be infinite.
    usable = ((scale >= np.finfo(np.float32).tiny) & jnp.isfinite(scale))[..., None]
    codes = jnp.where(usable, jnp.round(x * (1 / scale)[..., None]), 0)
    return jnp.clip(codes, -MOST, MOST).astype(jnp.int8), scale


def _cached_attention_triton(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    pages: Pages,
    page_table: jax.Array,
    start: jax.Array,
    window: int | None,
    strict: bool,
) -> tuple[jax.Array, Pages]:
    operands = (q, k, v, cos, sin, pages, page_table, start)
    if problem := why_not_attention(q, pages):
        if strict:
            raise ImplementationError(f"cached_attention: the implementation 'triton' can't run: {problem}.")
        return _cached_attention_xla(*operands, window, strict)
    # They import Pallas: see `pallas_support`.
    from fusedllm.kernels.attention_tiles import Layout
    from fusedllm.kernels.attention_triton import attention_triton
    from fusedllm.kernels.decode_attention_triton import decode_attention_triton
    from fusedllm.kernels.rotate_and_write_triton import rotate_and_write_triton

    call: dict[str, Any] = {"layout": Layout.of(q, pages, page_table, window), "interpret": interprets()}
    if q.shape[1] == 1:
        return decode_attention_triton(*operands, **call)
    q, pages = rotate_and_write_triton(*operands, **call)
    return attention_triton(q, pages, page_table, start, **call), pages


def _cached_attention_mosaic(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    pages: Pages,
    page_table: jax.Array,
    start: jax.Array,
    window: int | None,
    strict: bool,
) -> tuple[jax.Array, Pages]:
    operands = (q, k, v, cos, sin, pages, page_table, start)
    if problem := why_not_attention_mosaic(q, pages):
        if strict:
            raise ImplementationError(f"cached_attention: the implementation 'mosaic' can't run: {problem}.")
        return _cached_attention_triton(*operands, window, strict)
    # They import Pallas: see `pallas_support`.
    from fusedllm.kernels.attention_mosaic import attention_mosaic
    from fusedllm.kernels.attention_tiles import Layout
    from fusedllm.kernels.rotate_and_write_triton import rotate_and_write_triton

    layout = Layout.of(q, pages, page_table, window)
    q, pages = rotate_and_write_triton(*operands, layout=layout, interpret=interprets())
    return attention_mosaic(q, *pages, page_table, start, window, interprets()), pages


def _cached_attention_ffi(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    pages: Pages,
    page_table: jax.Array,
    start: jax.Array,
    window: int | None,
    strict: bool,
) -> tuple[jax.Array, Pages]:
    if pages[0].dtype.name not in NATIVE_DTYPES:
        if strict:
            raise ImplementationError(
                f"cached_attention: the implementation 'ffi' reads caches of {', '.join(NATIVE_DTYPES)}; "
                f"got {pages[0].dtype.name}."
            )
        return _cached_attention_xla(q, k, v, cos, sin, pages, page_table, start, window, strict)
    wide = [x.astype(jnp.float32) for x in (q, k, v, cos, sin)]
    positions = [x.astype(jnp.int32) for x in (page_table, start)]
    results = (jax.ShapeDtypeStruct(q.shape, jnp.float32), *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in pages))
    before = len(wide) + len(positions)
    call = jax.ffi.ffi_call(
        "fusedllm_attention", results, input_output_aliases={before + i: 1 + i for i in range(len(pages))}
    )
    mixed, *updated = call(*wide, *positions, *pages, window=window or 0)
    return mixed.astype(q.dtype), tuple(updated)
