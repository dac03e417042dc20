"""Which implementation of an operation runs: the automatic choice, and the refusal of an impossible one."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import jax

from fusedllm.errors import ImplementationError
from fusedllm.kernels import native, pallas_support

Function = TypeVar("Function", bound=Callable[..., object])

# Best first, by jax's name for the backend; a name that an operation does not have is passed over.
PREFERENCE: Mapping[str, tuple[str, ...]] = {
    "cpu": ("ffi", "xla"),
    "gpu": ("pallas", "xla"),
    "tpu": ("xla",),
}

_platform: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


def platform() -> str:
    """Jax's name for what is being traced for: that of `traced_for`, or else the default backend."""
    return _platform.get() or jax.default_backend()


@contextlib.contextmanager
def traced_for(name: str | None) -> Iterator[None]:
    """Inside, operations choose implementations for the platform `name`, or for the default backend's with `None`.

    For programs that run on another device than the default one: a policy has a trusted CPU beside an accelerator.
    """
    before = _platform.set(name)
    try:
        yield
    finally:
        _platform.reset(before)


def choose(operation: str, implementations: Mapping[str, Function], implementation: str | None) -> Function:
    """The function to run for `implementation`, or the best one for `platform()` where it is `None`.

    Raises:
      ImplementationError: the operation has no implementation of that name, or it can't run here.
    """
    backend = platform()
    if implementation is None:
        preferred = PREFERENCE.get(backend, ("xla",))
        implementation = next(name for name in preferred if name in implementations and _runs(name, backend))
    if implementation not in implementations:
        raise ImplementationError(
            f"{operation} has no implementation {implementation!r}; it has: {', '.join(sorted(implementations))}."
        )
    if implementation == "ffi":
        if backend != "cpu":
            raise ImplementationError(f"{operation}: the implementation 'ffi' runs on the CPU, jax runs on: {backend}.")
        if problem := native.why_unavailable():
            raise ImplementationError(f"{operation}: the implementation 'ffi' can't run: {problem}.")
    if implementation == "pallas" and (problem := pallas_support.why_not_on(backend)):
        raise ImplementationError(f"{operation}: the implementation 'pallas' can't run: {problem}.")
    return implementations[implementation]


def _runs(implementation: str, backend: str) -> bool:
    if implementation == "ffi":
        return native.available()
    return implementation != "pallas" or pallas_support.why_not_on(backend) is None
