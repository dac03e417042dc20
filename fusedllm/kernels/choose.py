"""Which implementation of an operation runs: the automatic choice, and the refusal of an impossible one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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


def choose(operation: str, implementations: Mapping[str, Function], implementation: str | None) -> Function:
    """The function to run for `implementation`, or for the default backend where it is `None`.

    Raises:
      ImplementationError: the operation has no implementation of that name, or it can't run here.
    """
    backend = jax.default_backend()
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
