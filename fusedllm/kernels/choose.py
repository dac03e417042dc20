"""Which implementation of an operation runs: the automatic choice, and the refusal of an impossible one."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import jax

from fusedllm.errors import ImplementationError
from fusedllm.kernels import native, pallas_support

Function = TypeVar("Function", bound=Callable[..., object])

# Best first, by jax's name for the backend; a name that an operation does not have is passed over.
PREFERENCE: Mapping[str, tuple[str, ...]] = {
    "cpu": ("ffi", "xla"),
    "gpu": ("mosaic", "triton", "xla"),
    "tpu": ("xla",),
}

# What `"pallas"` stands for: its two ways to a GPU, the first that an operation has and that runs here; Mosaic's is the
# last where it is not automatic.
PALLAS = ("mosaic", "triton")

# What may be said of a whole model, some of whose operations have no kernel of Pallas: those are XLA's.
WAYS = ("pallas", *PALLAS)

_platform: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


def platform() -> str:
    """Jax's name for what is being traced for: that of `traced_for`, or else the default backend."""
    return _platform.get() or jax.default_backend()


# Of a process without contexts.
_NOWHERE = (None, *pallas_support.surroundings())


@functools.lru_cache(maxsize=64)
def _apart(function: Function, surroundings: tuple[object, ...]) -> Function:
    del surroundings

    @functools.wraps(function)
    def traced(*operands: Any, **named: Any) -> object:
        return function(*operands, **named)

    return cast(Function, traced)


def traced_here(function: Function) -> Function:
    """`function` as `jax.jit` tells it apart from the same in other contexts, where it is another program."""
    surroundings = (_platform.get(), *pallas_support.surroundings())
    return function if surroundings == _NOWHERE else _apart(function, surroundings)


@contextlib.contextmanager
def traced_for(name: str | None, capability: float | None = None) -> Iterator[None]:
    """Inside, operations choose implementations for the platform `name`, or for the default backend's with `None`.

    For programs that run on another device than the default one: a policy has a trusted CPU beside an accelerator, and
    a program can be compiled for a GPU that is not here, of the compute capability `capability`.
    """
    before = _platform.set(name)
    # Who names a platform alone, as a placement does for its part, goes on with the GPU that is supposed around it.
    supposed = contextlib.nullcontext() if capability is None else pallas_support.supposing(capability)
    try:
        with supposed:
            yield
    finally:
        _platform.reset(before)


def choose(operation: str, implementations: Mapping[str, Function], implementation: str | None) -> Function:
    """The function to run for `implementation`, or the best one for `platform()` where it is `None`.

    `"pallas"` asks for the best of `PALLAS`. A Mosaic kernel is chosen automatically for what is in
    `pallas_support.AUTOMATIC_MOSAIC`.

    Raises:
      ImplementationError: the operation has no implementation of that name, or it can't run here.
    """
    backend = platform()
    if implementation is None:
        preferred = PREFERENCE.get(backend, ("xla",))
        return next(
            implementations[name]
            for name in preferred
            if name in implementations and pallas_support.is_automatic(operation, name) and _runs(name, backend)
        )
    wanted: Sequence[str] = (implementation,)
    if implementation == "pallas":
        wanted = sorted(PALLAS, key=lambda name: not pallas_support.is_automatic(operation, name))
    there = [name for name in wanted if name in implementations]
    if not there:
        raise ImplementationError(
            f"{operation} has no implementation {implementation!r}; it has: {', '.join(sorted(implementations))}."
        )
    problems = [_why_not(name, backend) for name in there]
    if None in problems:
        return implementations[there[problems.index(None)]]
    raise ImplementationError(f"{operation}: the implementation {implementation!r} can't run: {problems[-1]}.")


def _why_not(implementation: str, backend: str) -> str | None:
    if implementation in PALLAS:
        return pallas_support.why_not_on(backend, implementation)
    if implementation != "ffi":
        return None
    return native.why_unavailable() if backend == "cpu" else f"it is for the CPU, and jax runs on: {backend}"


def _runs(implementation: str, backend: str) -> bool:
    # Who did not ask for native kernels is warned where they are missing.
    return native.available() if implementation == "ffi" else _why_not(implementation, backend) is None
