"""What Mosaic GPU's kernels take; imports no Pallas, which costs a tenth of a second."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fusedllm.kernels.grouped import grouped_scheme
from fusedllm.qarray import QuantArray

# What Mosaic's attention takes: elements of a head, and queries, with fewer of which most of a tile would be empty.
MOSAIC_HEAD_DIMS = (64, 128)
MOSAIC_DTYPES = ("bfloat16", "float16")
MOSAIC_LEAST_QUERIES = 64
# Its blocks of keys; pages fill one, or are cut into some.
MOSAIC_KEYS = 128
MOSAIC_LEAST_PAGE = 8

# Columns that Mosaic's products take in a turn, and the least of a group; rows of a program, and tokens, with fewer of
# which reading the weights is what takes the time.
MOSAIC_DEPTH = 128
MOSAIC_LEAST_GROUP = 64
MOSAIC_ROWS = 128
MOSAIC_LEAST_TOKENS = 128


def why_not_attention_mosaic(q: jax.Array, pages: tuple[jax.Array, ...]) -> str | None:
    """Why Mosaic's attention kernel can't take queries and pages like these, or `None` if it can."""
    held, (_, seq, _, head_dim) = pages[0], q.shape
    page_size = held.shape[2]
    if q.dtype.name not in MOSAIC_DTYPES or held.dtype != q.dtype or len(pages) > 2:
        return f"it takes queries and caches in one of {', '.join(MOSAIC_DTYPES)}, got {q.dtype} and {held.dtype}"
    if head_dim not in MOSAIC_HEAD_DIMS:
        return f"heads of {head_dim} elements, where {' or '.join(map(str, MOSAIC_HEAD_DIMS))} are needed"
    if page_size < MOSAIC_LEAST_PAGE or (MOSAIC_KEYS % page_size and page_size % MOSAIC_KEYS):
        return (
            f"pages of {page_size} positions, where a power of two from {MOSAIC_LEAST_PAGE} on or a multiple of "
            f"{MOSAIC_KEYS} is needed"
        )
    if seq < MOSAIC_LEAST_QUERIES:
        return f"it is for prefills of {MOSAIC_LEAST_QUERIES} positions or more, got {seq}"
    from fusedllm.kernels.mosaic_support import why_not_compiled

    return why_not_compiled()


def why_not_linear_mosaic(x: jax.Array, weight: Any, out_dtype: DTypeLike) -> str | None:
    """Why Mosaic's product can't take activations and a weight like these, or `None` if it can."""
    scheme = grouped_scheme(weight)
    if scheme is None or scheme.codes != "integer" or scheme.bits not in (4, 8) or scheme.sums_integers:
        kind = weight.scheme.name if isinstance(weight, QuantArray) else weight.dtype
        return f"it multiplies with grouped integers of four or eight bits, got {kind}"
    if x.dtype.name not in MOSAIC_DTYPES or jnp.dtype(out_dtype).name not in MOSAIC_DTYPES:
        return f"it takes and gives numbers in {', '.join(MOSAIC_DTYPES)}, got {x.dtype} and {jnp.dtype(out_dtype)}"
    if scheme.group_size not in (0, MOSAIC_LEAST_GROUP) and scheme.group_size % MOSAIC_DEPTH:
        needed = f"{MOSAIC_LEAST_GROUP} or a multiple of {MOSAIC_DEPTH}"
        return f"groups of {scheme.group_size} weights, where {needed} is needed"
    rows, columns = weight.shape
    depth = min(scheme.group_size or MOSAIC_DEPTH, MOSAIC_DEPTH)
    if rows % MOSAIC_ROWS or columns % depth:
        return f"a weight of {rows} x {columns}, where multiples of {MOSAIC_ROWS} and of {depth} are needed"
    if (tokens := x.size // columns) < MOSAIC_LEAST_TOKENS:
        return f"it is for {MOSAIC_LEAST_TOKENS} tokens or more, got {tokens}"
    return None
