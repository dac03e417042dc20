"""`run`: serves a model until it is told to stop; warms up, tells when it is ready, and ends what it has begun."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import uvicorn

from fusedllm.engine.compile_guard import watch_compiles
from fusedllm.errors import FusedLLMError, SettingsError
from fusedllm.serve import logs
from fusedllm.serve.app import create_app
from fusedllm.serve.connection import ConnectionLimits, guarded
from fusedllm.serve.listen import BACKLOG, allow_connections, check_certificate, listen, url_of
from fusedllm.serve.protect import protect
from fusedllm.serve.settings import ServerSettings
from fusedllm.serve.state import ServerState

if TYPE_CHECKING:
    from fusedllm.llm import LLM

# Idle connections are closed after this, a little more than the minute that common proxies keep theirs for: a proxy
# that closes first never sends a request into a connection that is just going away.
KEEP_ALIVE_SECONDS = 65

# For connections to close after everything was answered.
CLOSE_SECONDS = 3

# How often it is looked whether the engine still lives.
WATCH_SECONDS = 1.0

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class _Stopped(Exception):  # noqa: N818
    """The server was told to stop while it was warming up."""


class _Uvicorn(uvicorn.Server):
    """uvicorn, which leaves signals alone and tells when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Nothing: signals are handled by `_Server`."""
        yield

    async def startup(self, sockets: Any = None) -> None:
        """Begins to listen."""
        await super().startup(sockets)
        self.listening.set()


class _Server:
    """One server, from its socket to the end of its last request. `main` is its life."""

    def __init__(self, llm: LLM, settings: ServerSettings) -> None:
        check_certificate(settings)
        self.llm = llm
        self.settings = settings
        self.state: ServerState | None = None
        self.ready = threading.Event()
        self._listener = listen(settings)
        self.url = url_of(self._listener, settings)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = threading.Event()
        self._stopped: asyncio.Event | None = None
        self._drain_seconds = settings.drain_seconds

    def stop(self, drain_seconds: float | None = None) -> None:
        """Asks the server to end; safe in any thread, and at any time."""
        if drain_seconds is not None:
            self._drain_seconds = drain_seconds
        self._stop.set()
        if self._loop is not None and self._stopped is not None:
            # A loop that has closed needs to hear nothing.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._stopped.set)

    async def main(self, on_signals: bool) -> None:
        """Listens, warms up, serves, drains."""
        self._loop, self._stopped = asyncio.get_running_loop(), asyncio.Event()
        if on_signals:
            for number in SIGNALS:
                self._loop.add_signal_handler(number, self._on_signal, number)
        app = create_app(self.llm, self.settings)
        state = self.state = cast(ServerState, app.state.server)
        protected, admission = protect(app, state)
        server = _Uvicorn(self._uvicorn_config(protected))
        serving = asyncio.create_task(server.serve(sockets=[self._listener]))
        try:
            await _first(serving, server.listening.wait())
            await self._warm_up()
            with watch_compiles(self._on_compile):
                self.llm.engine.start()
                state.ready = True
                self.ready.set()
                print(f"ready at {self.url}", flush=True)
                watching = asyncio.create_task(self._watch_engine())
                await _first(serving, self._until_stopped())
                watching.cancel()
                state.draining = True
                logs.log(logging.INFO, "stopping", in_flight=admission.in_flight, drain_seconds=self._drain_seconds)
                cut = await admission.drain(self._drain_seconds)
                if cut:
                    logs.log(logging.WARNING, "requests were cut off at the end of the drain", requests=cut)
        except _Stopped:
            state.draining = True
        finally:
            server.should_exit = True
            await serving
            if self.llm.engine.alive:
                await asyncio.to_thread(self.llm.engine.stop)
            logs.log(logging.INFO, "stopped")

    def _uvicorn_config(self, app: Any) -> uvicorn.Config:
        settings = self.settings
        limits = ConnectionLimits(settings.body_seconds, settings.send_seconds, settings.max_connections)
        return uvicorn.Config(
            app,
            loop="uvloop" if sys.platform != "win32" else "auto",
            http=guarded(limits),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            # Whom to believe about a client's address is one more thing to configure wrong; nothing depends on it.
            proxy_headers=False,
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=CLOSE_SECONDS,
            ssl_certfile=settings.certificate,
            ssl_keyfile=settings.private_key,
        )

    async def _warm_up(self) -> None:
        def on_program(name: str) -> None:
            if self._stop.is_set():
                raise _Stopped
            logs.log(logging.INFO, "warming up", program=name)

        await asyncio.to_thread(self.llm.warm_up, on_program=on_program)

    async def _until_stopped(self) -> None:
        if not self._stop.is_set() and self._stopped is not None:
            await self._stopped.wait()

    async def _watch_engine(self) -> None:
        while self.llm.engine.alive:
            await asyncio.sleep(WATCH_SECONDS)
        logs.log(logging.CRITICAL, "the engine has died; /health answers 503 until the server is restarted")

    def _on_compile(self, name: str, seconds: float) -> None:
        """In the engine's thread."""
        logs.log(logging.WARNING, "compiled after ready, which is a bug", program=name, seconds=round(seconds, 3))
        if self._loop is not None and self.state is not None:
            self._loop.call_soon_threadsafe(self.state.metrics.observe_compile)

    def _on_signal(self, number: signal.Signals) -> None:
        if self._stop.is_set():
            logs.log(logging.WARNING, "told to stop again: exiting at once")
            logging.shutdown()
            # Nothing is waited for, the threads of the engine and of XLA included.
            os._exit(128 + number)
        self.stop()


class Handle:
    """A server that runs in a thread of its own. As a context manager it stops at the end."""

    def __init__(self, server: _Server, thread: threading.Thread, failure: list[BaseException]) -> None:
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
    server = _Server(llm, settings)
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


def _live(server: _Server, failure: list[BaseException]) -> None:
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


async def _first(serving: asyncio.Task[None], other: Any) -> None:
    """Waits for `other`, unless uvicorn ends before.

    Raises:
      FusedLLMError: uvicorn has ended, for a reason that it has logged.
    """
    waiting = asyncio.ensure_future(other)
    await asyncio.wait({serving, waiting}, return_when=asyncio.FIRST_COMPLETED)
    if not waiting.done():
        waiting.cancel()
        raise FusedLLMError("the HTTP server has ended by itself; its log lines say why.")
    waiting.result()
