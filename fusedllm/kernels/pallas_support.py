"""Where Pallas kernels can run, and what they can take; imports no Pallas, which costs a tenth of a second."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from fusedllm.kernels.grouped import GroupedScheme

# A matrix unit multiplies this many columns of int8 at least (16 of bfloat16), and a group is never cut smaller.
LEAST_GROUP = 32

# Of NVIDIA's GPUs. For older ones Triton multiplies without matrix units, and int8 not at all; Mosaic GPU is made of
# instructions that Hopper was the first to have.
LEAST_CAPABILITY = {"triton": 8.0, "mosaic": 9.0}

GENERATIONS = {8.0: "Ampere", 9.0: "Hopper"}

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

_interpreting = contextvars.ContextVar("interpreting", default=False)
_supposed: contextvars.ContextVar[float | None] = contextvars.ContextVar("supposed", default=None)


@contextlib.contextmanager
def interpreting() -> Iterator[None]:
    """Inside, `implementation="pallas"` runs on the CPU, each program of the grid one after the other as XLA code.

    For tests: it is hundreds of times slower than anything else. What is traced inside keeps being interpreted.
    """
    before = _interpreting.set(True)
    try:
        yield
    finally:
        _interpreting.reset(before)


def interprets() -> bool:
    """Whether this is inside `interpreting()`."""
    return _interpreting.get()


def why_not_on(backend: str, lowering: str) -> str | None:
    """Why Pallas can't run a kernel on `backend` (jax's name for it) by way of `lowering`, or `None` if it can.

    `lowering` is `"triton"`, for GPUs of NVIDIA and AMD, or `"mosaic"`, for NVIDIA's from Hopper on.
    """
    if interprets():
        return None
    if backend == "cpu":
        return "Pallas has no lowering for the CPU"
    if backend != "gpu":
        return f"Pallas kernels are made for GPUs here, and jax runs on: {backend}"
    found, least = compute_capability(), LEAST_CAPABILITY[lowering]
    if found is None:
        return "Mosaic GPU is for GPUs of NVIDIA, and this is none" if lowering == "mosaic" else None
    if found < least:
        return f"{lowering} needs compute capability {least:.1f} ({GENERATIONS[least]}), and this GPU has {found:.1f}"
    return None


@contextlib.contextmanager
def supposing(capability: float | None) -> Iterator[None]:
    """Inside, the GPU is one of NVIDIA's of this compute capability; with `None` it is the one that is here."""
    before = _supposed.set(capability)
    try:
        yield
    finally:
        _supposed.reset(before)


def compute_capability() -> float | None:
    """That of `supposing`, or of the first GPU here if it is one of NVIDIA; AMD's are named otherwise."""
    if (supposed := _supposed.get()) is not None:
        return supposed
    name = getattr(jax.local_devices()[0], "compute_capability", "")
    return float(name) if name.replace(".", "", 1).isdecimal() else None


def why_not_codes(scheme: GroupedScheme) -> str | None:
    """Why Pallas kernels can't read and write codes of `scheme`, or `None` if they can."""
    size = scheme.group_size
    # Triton's tensors have sizes that are powers of two.
    if size and (size < LEAST_GROUP or size & (size - 1)):
        return f"groups of {size} weights, where a power of two from {LEAST_GROUP} on is needed"
    # Eight codes of five or seven bits take more than the 32 of a register.
    if scheme.bits not in (3, 4, 6, 8):
        return f"codes of {scheme.bits} bits, where 3, 4, 6 or 8 are needed"
    return None


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
