"""The life of a server: it listens, warms up, tells when it is ready, and ends what it has begun when told to."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import uvicorn

from fusedllm.engine.compile_guard import watch_compiles
from fusedllm.errors import FusedLLMError
from fusedllm.serve import logs
from fusedllm.serve.app import create_app
from fusedllm.serve.connection import ConnectionLimits, guarded
from fusedllm.serve.listen import BACKLOG, check_certificate, listen, url_of
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
        """Nothing: signals are handled by `Lifecycle`."""
        yield

    async def startup(self, sockets: Any = None) -> None:
        """Begins to listen."""
        await super().startup(sockets)
        self.listening.set()


class Lifecycle:
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
                self.llm.engine.start(self.settings.max_queue)
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
