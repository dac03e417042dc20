"""`Refusal`: an answer to a request that never gets to the app, in the shape of OpenAI's error object."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from starlette.types import Receive, Scope, Send

# A body up to this size is on its way already, and reading past it keeps the connection usable.
SMALL_BODY = 2**16

# How long a client that is still sending may take to notice the answer: closing at once would reset the connection,
# and the answer would be lost with it.
LINGER_SECONDS = 1.0

INVALID = "invalid_request_error"
UNAVAILABLE = "service_unavailable_error"


@dataclass(frozen=True, slots=True)
class Refusal:
    """A status, a sentence, and what a program may want to know of the reason."""

    status: int
    message: str
    type: str = INVALID
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> bytes:
        """The error object, as JSON."""
        error = {"message": self.message, "type": self.type, "param": None, "code": self.code}
        return json.dumps({"error": error}).encode()

    def event(self) -> bytes:
        """The error object, as the events that end a stream."""
        return b"data: " + self.body() + b"\n\ndata: [DONE]\n\n"

    async def send(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers with this; a connection on which much more is to come is closed, after a moment."""
        body = self.body()
        close = not _is_small(scope)
        headers = [(name.lower().encode(), value.encode()) for name, value in self.headers.items()]
        headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        if close:
            headers.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": close})
        if close:
            await _discard(receive)
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def declared_length(scope: Scope) -> int | None:
    """The `Content-Length` of a request; `None` where it has none."""
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value)
    return None


def _is_small(scope: Scope) -> bool:
    chunked = any(name == b"transfer-encoding" for name, _ in scope["headers"])
    return not chunked and (declared_length(scope) or 0) <= SMALL_BODY


async def _discard(receive: Receive) -> None:
    try:
        async with asyncio.timeout(LINGER_SECONDS):
            more = True
            while more:
                message = await receive()
                more = message["type"] == "http.request" and message.get("more_body", False)
    except TimeoutError:
        pass
