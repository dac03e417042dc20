"""`run`: serves a model until it is told to stop, in a terminal or beside a notebook."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fusedllm.errors import SettingsError
from fusedllm.serve import logs
from fusedllm.serve.lifecycle import Lifecycle
from fusedllm.serve.listen import allow_connections
from fusedllm.serve.settings import ServerSettings

if TYPE_CHECKING:
    from fusedllm.llm import LLM


class Handle:
    """A server that runs in a thread of its own. As a context manager it stops at the end."""

    def __init__(self, server: Lifecycle, thread: threading.Thread, failure: list[BaseException]) -> None:
        self._server = server
        self._thread = thread
        self._failure = failure

    @property
    def url(self) -> str:
        """Where it is found; `/v1` behind it is what clients call the base URL."""
        return self._server.url

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._thread.is_alive()

    def stop(self, drain_seconds: float | None = None) -> None:
        """Stops admitting, lets what is in flight end for up to `drain_seconds` (the settings' by default), and waits.

        Raises whatever the server has failed with.
        """
        self._server.stop(drain_seconds)
        self._thread.join()
        if self._failure:
            raise self._failure[0]

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<fusedllm server at {self.url}, {'running' if self.alive else 'stopped'}>"


def run(llm: LLM, settings: ServerSettings | None = None, *, block: bool | None = None, **keywords: Any) -> Handle:
    """Serves `llm`; `keywords` are fields of `ServerSettings` and override those of `settings`.

    In a script it returns when the server has stopped: by SIGTERM or SIGINT, which let what is in flight end; a second
    one exits at once. In a notebook, and in any thread but the main one, it returns a `Handle` as soon as the server is
    ready. `block` decides otherwise.

    The server takes the engine of `llm` over, and stops it at the end: the model can't be served again, and `generate`
    should wait until then.

    Raises:
      SettingsError: a setting that can't be, or a place where the server can't listen.
    """
    settings = settings_from_keywords(settings, keywords)
    if block is None:
        block = threading.current_thread() is threading.main_thread() and not _in_event_loop()
    if block and _in_event_loop():
        raise SettingsError("run(block=True) was called inside an event loop, which it would hold up; leave block out.")
    logs.set_up(settings.log_format)
    server = Lifecycle(llm, settings)
    allow_connections(settings.max_connections)
    if not settings.is_loopback and not settings.api_keys:
        logs.log(logging.WARNING, "no API key is set: whoever reaches this host may use it", url=server.url)
    failure: list[BaseException] = []
    thread = threading.Thread(target=_live, args=(server, failure), name="fusedllm-server", daemon=True)
    if not block:
        thread.start()
        while not server.ready.wait(0.05):
            if not thread.is_alive():
                raise failure[0] if failure else SettingsError("the server stopped before it was ready.")
        return Handle(server, thread, failure)
    main_thread = threading.current_thread() is threading.main_thread()
    _run_loop(lambda: server.main(main_thread))
    return Handle(server, thread, failure)


def settings_from_keywords(settings: ServerSettings | None, keywords: dict[str, Any]) -> ServerSettings:
    """`settings`, or the defaults, with `keywords` replaced in it.

    Raises:
      SettingsError: a keyword that is no setting, or a value that can't be.
    """
    known = {field.name for field in dataclasses.fields(ServerSettings)}
    unknown = sorted(set(keywords) - known)
    if unknown:
        raise SettingsError(f"unknown setting {unknown[0]!r}; known are: {', '.join(sorted(known))}.")
    return dataclasses.replace(settings or ServerSettings(), **keywords)


def _live(server: Lifecycle, failure: list[BaseException]) -> None:
    try:
        _run_loop(lambda: server.main(False))
    except BaseException as error:
        failure.append(error)


def _run_loop(main: Callable[[], Any]) -> None:
    if sys.platform == "win32":
        asyncio.run(main())
        return
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def _in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
