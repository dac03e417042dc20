"""Where Pallas kernels can run, and what they can take; imports no Pallas, which costs a tenth of a second."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import jax

from fusedllm.kernels.grouped import GroupedScheme

# A matrix unit multiplies this many columns of int8 at least (16 of bfloat16), and a group is never cut smaller.
LEAST_GROUP = 32

# Of NVIDIA's GPUs. For older ones Triton multiplies without matrix units, and int8 not at all; Mosaic GPU is made of
# instructions that Hopper was the first to have.
LEAST_CAPABILITY = {"triton": 8.0, "mosaic": 9.0}

# GPUs of NVIDIA from Ada on convert float8.
FLOAT8_CAPABILITY = 8.9

GENERATIONS = {8.0: "Ampere", 9.0: "Hopper"}

# Mosaic's kernels multiply with an instruction (wgmma) that Hopper has and its successors do not.
MOSAIC_BELOW = 10.0

# Operations whose Mosaic kernel is chosen where nothing is asked for. Those kernels wait for each other's barriers, and
# one that is wrong stops a GPU: so a kernel is entered here once `pytest -m gpu` and `benchmarks/gpu.py` have run it on
# a Hopper, and it was faster than Triton's. Until then `implementation="mosaic"` asks for it.
AUTOMATIC_MOSAIC: frozenset[str] = frozenset()

_interpreting = contextvars.ContextVar("interpreting", default=False)
_automatic_mosaic = contextvars.ContextVar("automatic_mosaic", default=AUTOMATIC_MOSAIC)
_preferred: contextvars.ContextVar[str | None] = contextvars.ContextVar("preferred", default=None)
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


@contextlib.contextmanager
def preferring(way: str | None) -> Iterator[None]:
    """Inside, where nothing is asked for, Pallas takes the `way` `"triton"` or `"mosaic"` for what has one.

    With `"pallas"` or `None` it takes the better one.
    """
    before = _preferred.set(way)
    try:
        yield
    finally:
        _preferred.reset(before)


def surroundings() -> tuple[object, ...]:
    """What contexts of this file say here: a program that was traced elsewhere may be another one."""
    return tuple(variable.get() for variable in (_interpreting, _automatic_mosaic, _preferred, _supposed))


def is_automatic(operation: str, implementation: str) -> bool:
    """Whether this implementation of `operation` may be chosen where nothing is asked for."""
    if implementation != "mosaic":
        return True
    preferred = _preferred.get()
    return preferred == "mosaic" or (preferred != "triton" and operation in _automatic_mosaic.get())


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


def casts_float8() -> bool:
    """Whether the GPU has an instruction that makes numbers of float8."""
    return (compute_capability() or 0) >= FLOAT8_CAPABILITY


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
