"""Which requests may begin, which of them run, and how the rest ends when the server stops."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fusedllm.serve.health import problem
from fusedllm.serve.refusal import UNAVAILABLE, Refusal
from fusedllm.serve.state import ServerState

# What a client should wait for a server that starts or stops.
RETRY_SECONDS = "5"

# To tell a client that its stream has ended; it may have stopped reading.
LAST_WORDS_SECONDS = 2.0

STOPPED = Refusal(
    503, "the server stopped before this request was finished.", UNAVAILABLE, "server_stopped", {"Retry-After": "5"}
)


class _InFlight:
    """A request that runs, with what must be known to end it in a way that its client understands."""

    def __init__(self, task: asyncio.Task[Any], send: Send) -> None:
        self.interrupted = False
        self._task = task
        self._send = send
        self._started = False
        self._streams = False
        self._ended = False
        self._last = b""

    async def send(self, message: Message) -> None:
        """Passes on what the app sends, and remembers how far it has come."""
        if message["type"] == "http.response.start":
            self._started = True
            kinds = [value for name, value in message.get("headers", ()) if name.lower() == b"content-type"]
            self._streams = any(kind.startswith(b"text/event-stream") for kind in kinds)
        else:
            self._last = message.get("body", b"") or self._last
            self._ended = not message.get("more_body", False)
        await self._send(message)

    def interrupt(self) -> None:
        """Ends the app's part of it."""
        self.interrupted = True
        self._task.cancel()

    async def apologize(self, scope: Scope, receive: Receive) -> None:
        """Sends an error in place of what is missing. A response that is neither new nor a stream is cut off."""
        self._task.uncancel()
        if self._ended:
            return
        # Who takes nothing any more gets no words either.
        async with _at_most(LAST_WORDS_SECONDS):
            if not self._started:
                await STOPPED.send(scope, receive, self._send)
            elif self._streams:
                # An event that was cut in two is ended first.
                gap = b"" if not self._last or self._last.endswith(b"\n\n") else b"\n\n"
                await self._send({"type": "http.response.body", "body": gap + STOPPED.event(), "more_body": False})


class Admission:
    """Refuses work while the server starts or stops, with 503, and knows what is in flight.

    Work is what is sent by POST; reading (probes, metrics, models, the page) is always answered.
    """

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self.app = app
        self._state = state
        self._running: set[_InFlight] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        reason = problem(self._state)
        if reason is not None:
            refusal = Refusal(503, f"{reason}.", UNAVAILABLE, headers={"Retry-After": RETRY_SECONDS})
            await refusal.send(scope, receive, send)
            return
        task = asyncio.current_task()
        assert task is not None
        request = _InFlight(task, send)
        self._running.add(request)
        self._idle.clear()
        try:
            await self.app(scope, receive, request.send)
        except asyncio.CancelledError:
            if not request.interrupted:
                raise
            await request.apologize(scope, receive)
        finally:
            self._running.discard(request)
            if not self._running:
                self._idle.set()

    @property
    def in_flight(self) -> int:
        """How many requests run."""
        return len(self._running)

    async def drain(self, seconds: float) -> int:
        """Waits up to `seconds` for what runs, then ends the rest with an error each; how many those were.

        Sessions end themselves, in the words of their endpoint. What does not, or is none, is ended from here.
        """
        await self._wait(seconds)
        rest = len(self._running)
        for session in list(self._state.in_flight):
            session.cancel()
        await self._wait(LAST_WORDS_SECONDS if self._state.in_flight else 0.0)
        for request in list(self._running):
            request.interrupt()
        await self._wait(2 * LAST_WORDS_SECONDS)
        return rest

    async def _wait(self, seconds: float) -> None:
        async with _at_most(seconds):
            await self._idle.wait()


@contextlib.asynccontextmanager
async def _at_most(seconds: float) -> AsyncIterator[None]:
    """Inside, what takes longer is given up."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            yield
