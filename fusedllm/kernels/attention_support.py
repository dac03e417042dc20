"""What Triton's attention kernels take; imports no Pallas, which costs a tenth of a second."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

# Elements of a head, and of all query heads that share a KV head, which a program of attention has in registers; of
# float32 half as many.
MOST_HEAD_DIM = 256
MOST_TILE = 8192

# Rows and columns that a matrix unit multiplies at least.
LEAST_ROWS = 16

# Of queries, and of a KV cache: int8 with scales, uint8 as codes of e4m3.
QUERY_DTYPES = ("bfloat16", "float16", "float32")
CACHE_DTYPES = (*QUERY_DTYPES, "int8", "uint8")

# Bytes of an array that offsets of 32 bits reach where elements are bytes; beyond twice that Pallas takes 64.
BYTES_OF_SIGNED_OFFSETS = 2**31
BYTES_OF_UNSIGNED_OFFSETS = 2**32


def power_of_two(least: int) -> int:
    """The least power of two from `least` on of which a matrix unit takes rows and columns, 16 or more."""
    return max(LEAST_ROWS, 1 << (least - 1).bit_length())


def multiplied_in(queries: DTypeLike, held: DTypeLike) -> np.dtype:
    """The dtype of attention's products: a narrow cache is widened, and the other way round nothing is."""
    return np.dtype(queries if np.dtype(held).itemsize == 1 else jnp.promote_types(queries, held))


def why_not_attention(q: jax.Array, pages: tuple[jax.Array, ...]) -> str | None:
    """Why Triton's attention kernels can't take queries and pages like these, or `None` if they can."""
    held, head_dim, group = pages[0], q.shape[3], q.shape[2] // pages[0].shape[1]
    if q.dtype.name not in QUERY_DTYPES:
        return f"it takes queries in {', '.join(QUERY_DTYPES)}, got {q.dtype}"
    if held.dtype.name not in CACHE_DTYPES:
        return f"it reads caches of {', '.join(CACHE_DTYPES)}, got {held.dtype}"
    if head_dim > MOST_HEAD_DIM or head_dim % 2:
        return f"heads of {head_dim} elements, where an even number up to {MOST_HEAD_DIM} is needed"
    most = MOST_TILE // (2 if multiplied_in(q.dtype, held.dtype) == jnp.float32 else 1) // power_of_two(head_dim)
    if power_of_two(group) > most:
        return f"{group} query heads of {head_dim} elements share a KV head, where at most {most} may"
    # Pallas adds up offsets of elements in 32 signed bits for arrays of up to 4 GiB, whatever the size of an element.
    if held.dtype.itemsize == 1 and BYTES_OF_SIGNED_OFFSETS < held.size <= BYTES_OF_UNSIGNED_OFFSETS:
        return f"pages of {held.size} bytes, whose offsets Pallas does not reach"
    return None
