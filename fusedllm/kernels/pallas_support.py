"""Where Pallas kernels can run, and what they can take; imports no Pallas, which costs a tenth of a second."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import jax

from fusedllm.kernels.grouped import GroupedScheme

# A matrix unit multiplies this many columns of int8 at least (16 of bfloat16), and a group is never cut smaller.
LEAST_GROUP = 32

# Of NVIDIA's GPUs. For older ones Triton multiplies without matrix units, and int8 not at all.
LEAST_CAPABILITY = 8.0

_interpreting = contextvars.ContextVar("interpreting", default=False)


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


def why_not_on(backend: str) -> str | None:
    """Why a Pallas kernel can't run on `backend` (jax's name for it), or `None` if it can."""
    if interprets():
        return None
    if backend == "cpu":
        return "Pallas has no lowering for the CPU"
    if backend != "gpu":
        return f"these kernels are lowered by Triton, for a GPU, and jax runs on: {backend}"
    found = compute_capability()
    if found is not None and found < LEAST_CAPABILITY:
        return (
            f"Triton's products need compute capability {LEAST_CAPABILITY:.1f} (Ampere), and this GPU has {found:.1f}"
        )
    return None


def compute_capability() -> float | None:
    """That of the first GPU here if it is one of NVIDIA; AMD's are named otherwise."""
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
