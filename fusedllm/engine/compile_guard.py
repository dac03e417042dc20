"""`forbid_compile()`: after warm-up a compilation is a bug; inside this context it is an error.

`watch_compiles()` is for a server, which tells of the bug and goes on.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import jax

from fusedllm.errors import CompileForbiddenError

# jax calls this for everything that it hands to XLA, also where the persistent cache then has the answer.
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"

# The name of the thread that launches programs for a server.
ENGINE_THREAD = "fusedllm-engine"

# Hears of a compilation: the program's name, and seconds.
OnCompile = Callable[[str, float], object]


class _Guard(threading.local):
    depth = 0


_guard = _Guard()
_registration = threading.Lock()
_registered = False
_watchers: list[tuple[str, OnCompile]] = []


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


@contextlib.contextmanager
def watch_compiles(on_compile: OnCompile, thread: str = ENGINE_THREAD) -> Iterator[None]:
    """Inside, `on_compile` hears of every compilation in threads of the name `thread`, and in that thread.

    Other threads of the process may compile what they like: a notebook beside its server does.
    """
    _register()
    watcher = (thread, on_compile)
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def _register() -> None:
    global _registered
    with _registration:
        if not _registered:
            jax.monitoring.register_event_duration_secs_listener(_on_event)
            _registered = True


def _on_event(event: str, duration_secs: float, **details: str | int) -> None:
    if event != COMPILE_EVENT:
        return
    name = str(details.get("fun_name", "a function outside the declared programs"))
    for thread, on_compile in tuple(_watchers):
        if threading.current_thread().name == thread:
            on_compile(name, duration_secs)
    if compile_is_forbidden():
        raise CompileForbiddenError(
            f"{name} was compiled ({duration_secs:.2f} s) after warm-up, where nothing may compile."
        )
