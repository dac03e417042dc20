"""The HTTP connection with limits that uvicorn's has not: on headers, on the time for them, and on slow readers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fusedllm.serve.refusal import UNAVAILABLE, Refusal

# Of all headers of a request with its target; what common proxies and servers allow is 8 to 64 KiB.
MOST_HEADER_BYTES = 2**15
MOST_HEADERS = 100


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Seconds for a client to send headers, and to take what was sent to it; and how many connections may be open."""

    receive_seconds: float
    send_seconds: float
    most_connections: int


class _Clock:
    """Calls back once, so many seconds after its last start, unless it is stopped."""

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float, callback: Callable[[], object]) -> None:
        self._loop, self._seconds, self._callback = loop, seconds, callback
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self.stop()
        self._timer = self._loop.call_later(self._seconds, self._callback)

    def start_once(self) -> None:
        """Starts unless it is running already."""
        if self._timer is None:
            self.start()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class GuardedProtocol(HttpToolsProtocol):
    """One connection. Slow or endless headers end it, and so does a reader that takes nothing for too long.

    A reader is watched only while the transport's buffer is above its high-water mark, and after a response has
    ended, so that a chunk that is taken costs nothing.
    """

    limits: ClassVar[ConnectionLimits]

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._receiving = _Clock(self.loop, self.limits.receive_seconds, self._give_up)
        self._sending = _Clock(self.loop, self.limits.send_seconds, self._abandon)
        self._in_headers = True
        self._received = 0
        self._header_bytes = 0
        self._refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Counts the connection, and begins to wait for its first headers."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.most_connections:
            self._refuse(Refusal(503, "too many connections are open.", UNAVAILABLE, headers={"Retry-After": "1"}))
            return
        self._receiving.start()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the clocks."""
        self._receiving.stop()
        self._sending.stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bounds what can pile up before the parser has a whole header to tell of."""
        if self._refused:
            return
        begun_before = self._in_headers
        super().data_received(data)
        if self.cycle is not None and self.cycle.response_complete and not self._in_headers and not self._refused:
            # Nothing that begins a request, such as line breaks: uvicorn took it for one, and no longer counts how long
            # the connection has been idle.
            self._receiving.start_once()
        # Data in which a request begins may hold the end of another one's body.
        if begun_before and self._in_headers and not self._refused:
            self._received += len(data)
            if self._received > MOST_HEADER_BYTES:
                self._refuse(_TOO_MANY_HEADERS)

    def on_message_begin(self) -> None:
        """Headers of a request begin."""
        super().on_message_begin()
        self._in_headers, self._received, self._header_bytes = True, 0, 0
        if not self.flow.write_paused:
            self._sending.stop()
        self._receiving.start()

    def on_url(self, url: bytes) -> None:
        """A part of the request's target."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header of the request, or one that follows a chunked body."""
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The request can be handed to the app, which has a clock of its own for the body."""
        self._in_headers = False
        self._receiving.stop()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The request is whole."""
        self._receiving.stop()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """The answer has been written, and perhaps neither taken nor the request's body sent to its end."""
        super().on_response_complete()
        if self.transport.get_write_buffer_size():
            self._sending.start()
        if self.cycle.more_body and not self.transport.is_closing():
            self._receiving.start()

    def pause_writing(self) -> None:
        """The client does not keep up."""
        super().pause_writing()
        self._sending.start()

    def resume_writing(self) -> None:
        """It does again."""
        self._sending.stop()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """What the parser could not read, or what a callback refused."""
        if not self._refused:
            self._refuse(Refusal(400, "this is no HTTP request that the server understands."))

    def _count(self, more: int) -> None:
        self._header_bytes += more
        if self._header_bytes > MOST_HEADER_BYTES or len(self.headers) >= MOST_HEADERS:
            self._refuse(_TOO_MANY_HEADERS)
            raise ValueError("too many headers")

    def _give_up(self) -> None:
        if self.cycle is None and not self._received:
            # A browser's, in advance; there is nothing to answer.
            self.transport.close()
        elif self._in_headers:
            self._refuse(Refusal(408, f"no whole request came in {self.limits.receive_seconds:g} s."))
        else:
            self.transport.abort()

    def _abandon(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()

    def _refuse(self, refusal: Refusal) -> None:
        """Answers without the app, unless it has begun to answer an earlier request, and closes."""
        self._refused = True
        self._receiving.stop()
        if self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.abort()
            return
        body = refusal.body()
        head = f"HTTP/1.1 {refusal.status} \r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        head += "".join(f"{name.lower()}: {value}\r\n" for name, value in refusal.headers.items())
        self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        self.transport.close()


_TOO_MANY_HEADERS = Refusal(
    431,
    f"the request's headers have more than {MOST_HEADER_BYTES:,} bytes or are more than {MOST_HEADERS}.",
    code="headers_too_large",
)


def guarded(limits: ConnectionLimits) -> type[GuardedProtocol]:
    """The protocol class with these limits, for uvicorn to make one of for each connection."""
    return type("GuardedProtocol", (GuardedProtocol,), {"limits": limits})
