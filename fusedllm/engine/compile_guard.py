"""`forbid_compile()`: after warm-up a compilation is a bug; inside this context it is an error."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import jax

from fusedllm.errors import CompileForbiddenError

# jax calls this for everything that it hands to XLA, also where the persistent cache then has the answer.
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class _Guard(threading.local):
    depth = 0


_guard = _Guard()
_registration = threading.Lock()
_registered = False


def compile_is_forbidden() -> bool:
    """Whether this thread is inside `forbid_compile()`."""
    return _guard.depth > 0


@contextlib.contextmanager
def forbid_compile() -> Iterator[None]:
    """Inside, any compilation in this thread raises; nests.

    Raises:
      CompileForbiddenError: something compiled; the message names the program, of a runner's also the shape.
    """
    _register()
    _guard.depth += 1
    try:
        yield
    finally:
        _guard.depth -= 1


def _register() -> None:
    global _registered
    with _registration:
        if not _registered:
            jax.monitoring.register_event_duration_secs_listener(_on_event)
            _registered = True


def _on_event(event: str, duration_secs: float, **details: str | int) -> None:
    if event == COMPILE_EVENT and compile_is_forbidden():
        name = details.get("fun_name", "a function outside the declared programs")
        raise CompileForbiddenError(
            f"{name} was compiled ({duration_secs:.2f} s) after warm-up, where nothing may compile."
        )
