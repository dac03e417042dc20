"""Where Pallas kernels can run, and what they can take; imports no Pallas, which costs a tenth of a second."""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fusedllm.kernels.grouped import GroupedScheme, grouped_scheme
from fusedllm.kernels.packed import PLAIN_NUMBERS
from fusedllm.qarray import QuantArray

# A matrix unit multiplies this many columns of int8 at least (16 of bfloat16), and a group is never cut smaller.
LEAST_GROUP = 32

# Of NVIDIA's GPUs. For older ones Triton multiplies without matrix units, and int8 not at all; Mosaic GPU is made of
# instructions that Hopper was the first to have.
LEAST_CAPABILITY = {"triton": 8.0, "mosaic": 9.0}

GENERATIONS = {8.0: "Ampere", 9.0: "Hopper"}

# Mosaic's kernels multiply with an instruction (wgmma) that Hopper has and its successors do not.
MOSAIC_BELOW = 10.0

# Operations whose Mosaic kernel is chosen where nothing is asked for. Those kernels wait for each other's barriers, and
# one that is wrong stops a GPU: so a kernel is entered here once `pytest -m gpu` and `benchmarks/gpu.py` have run it on
# a Hopper, and it was faster than Triton's. Until then `implementation="mosaic"` asks for it.
AUTOMATIC_MOSAIC: frozenset[str] = frozenset()

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

# That are multiplied without matrix units: beyond, the additions take as long as reading the weights.
MOST_FEW_TOKENS = 4

# That fill the shorter side of a matrix unit.
MOST_SOME_TOKENS = 16

_interpreting = contextvars.ContextVar("interpreting", default=False)
_automatic_mosaic = contextvars.ContextVar("automatic_mosaic", default=AUTOMATIC_MOSAIC)
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


@contextlib.contextmanager
def automatic_mosaic(*operations: str) -> Iterator[None]:
    """Inside, the Mosaic kernels of these operations are chosen where nothing is asked for, besides those of the table.

    For measuring a whole model with kernels that are not in `AUTOMATIC_MOSAIC` yet.
    """
    before = _automatic_mosaic.set(_automatic_mosaic.get().union(operations))
    try:
        yield
    finally:
        _automatic_mosaic.reset(before)


def is_automatic(operation: str, implementation: str) -> bool:
    """Whether this implementation of `operation` may be chosen where nothing is asked for."""
    return implementation != "mosaic" or operation in _automatic_mosaic.get()


def why_not_on(backend: str, lowering: str) -> str | None:
    """Why Pallas can't run a kernel on `backend` (jax's name for it) by way of `lowering`, or `None` if it can.

    `lowering` is `"triton"`, for GPUs of NVIDIA and AMD, or `"mosaic"`, for Hopper.
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
    if lowering == "mosaic" and found >= MOSAIC_BELOW:
        return f"mosaic multiplies with an instruction of Hopper alone, and this GPU has compute capability {found:.1f}"
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


def why_not_few_tokens(x: jax.Array, weight: jax.Array | QuantArray) -> str | None:
    """Why the kernels for few tokens can't multiply `x` `[..., in]` with `weight`, or `None` if they can."""
    tokens, scheme = math.prod(x.shape[:-1]), grouped_scheme(weight)
    if x.dtype.name not in PLAIN_NUMBERS:
        return f"it takes activations in {', '.join(PLAIN_NUMBERS)}, got {x.dtype}"
    if not 0 < tokens <= MOST_FEW_TOKENS:
        return f"it takes up to {MOST_FEW_TOKENS} tokens, got {tokens}"
    if scheme is None:
        if isinstance(weight, QuantArray):
            return f"it takes plain weights and grouped codes, got {weight.scheme.name}"
        return None if weight.dtype == x.dtype else f"it takes plain weights in {x.dtype}, got {weight.dtype}"
    if scheme.sums_integers or scheme.turned:
        return f"it rounds and turns no activations, which {scheme.name} does"
    return why_not_codes(scheme) if scheme.bits in (4, 8) else f"codes of {scheme.bits} bits, where 4 or 8 are needed"


def why_not_some_tokens(x: jax.Array, weight: jax.Array | QuantArray) -> str | None:
    """Why the kernel for some tokens can't multiply `x` `[..., in]` with `weight`, or `None` if it can."""
    tokens = math.prod(x.shape[:-1])
    if isinstance(weight, QuantArray) or weight.dtype != x.dtype:
        kind = weight.scheme.name if isinstance(weight, QuantArray) else weight.dtype
        return f"it takes plain weights in {x.dtype}, got {kind}"
    if not interprets() and compute_capability() is None:
        return "it takes more shared memory than GPUs have that are not NVIDIA's"
    # Matrix units round float32.
    if x.dtype.name not in ("bfloat16", "float16"):
        return f"it takes bfloat16 and float16, got {x.dtype}"
    return None if 0 < tokens <= MOST_SOME_TOKENS else f"it takes up to {MOST_SOME_TOKENS} tokens, got {tokens}"


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
