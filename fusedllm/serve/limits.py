"""Limits on what a request may bring, as pure ASGI middlewares: its id, and its body's size, time and nesting."""

from __future__ import annotations

import asyncio
import re
import secrets

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fusedllm.serve.logs import REQUEST_ID, log_body
from fusedllm.serve.refusal import UNAVAILABLE, Refusal, declared_length
from fusedllm.serve.settings import ServerSettings

ID_HEADER = b"x-request-id"
# What may go into a log and back into a header as it is.
WELL_FORMED_ID = re.compile(rb"[A-Za-z0-9._:-]{1,64}")

# Levels of arrays and objects in each other. A chat request needs 6, a JSON schema in it some 20, and what parses them
# is recursive.
MOST_NESTED = 64

# Bodies of the largest size that may be held at once, before their requests are running.
MOST_BODIES = 64

# A string of JSON, its end missing or not: a scan over the text meets each character once, whatever is in it.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_NO_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")


class RequestId:
    """Gives every request an id: the client's, where it sent a well-formed one. It is in the answer and in the log."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == ID_HEADER), b"")
        request_id = given if WELL_FORMED_ID.fullmatch(given) else b"req-" + secrets.token_hex(12).encode()
        scope.setdefault("state", {})["request_id"] = request_id.decode()

        async def with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                others = [(name, value) for name, value in message.get("headers", ()) if name.lower() != ID_HEADER]
                message["headers"] = [*others, (ID_HEADER, request_id)]
            await send(message)

        token = REQUEST_ID.set(request_id.decode())
        try:
            await self.app(scope, receive, with_id)
        finally:
            REQUEST_ID.reset(token)


class Body:
    """Receives the whole body before the app sees the request, so that what is wrong with it has one answer.

    413 for one that is too large, be that declared or streamed; 408 for one that takes too long; 400 for one that is no
    UTF-8 or nested too deeply for a recursive parser; 503 where the bodies of too many requests are arriving.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self.app = app
        self._most = settings.max_body_bytes
        self._seconds = settings.body_seconds
        self._log = settings.log_prompts
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = bytearray()
        try:
            refusal = await self._receive(scope, receive, body)
            if refusal is None and body:
                refusal = _refuse_content(bytes(body))
        except ConnectionError:
            return
        finally:
            self._held -= len(body)
        if refusal is not None:
            await refusal.send(scope, receive, send)
            return
        if self._log and body:
            log_body(bytes(body))
        await self.app(scope, _replay(bytes(body), receive), send)

    async def _receive(self, scope: Scope, receive: Receive, body: bytearray) -> Refusal | None:
        """Fills `body`. Raises `ConnectionError` when the client leaves before its end."""
        if (declared_length(scope) or 0) > self._most:
            return self._too_large()
        try:
            async with asyncio.timeout(self._seconds):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ConnectionResetError
                    part = message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) + len(part) > self._most:
                        return self._too_large()
                    body += part
                    self._held += len(part)
                    if more and self._held > MOST_BODIES * self._most:
                        return Refusal(
                            503,
                            "too many large requests are arriving at once; try again in a second.",
                            type=UNAVAILABLE,
                            headers={"Retry-After": "1"},
                        )
        except TimeoutError:
            return Refusal(
                408, f"the request's body had not come in whole after {self._seconds:g} s.", code="body_timeout"
            )
        return None

    def _too_large(self) -> Refusal:
        return Refusal(
            413, f"the request's body has more than the {self._most:,} bytes that are allowed.", code="body_too_large"
        )


def is_nested_deeper(text: bytes, most: int) -> bool:
    """Whether arrays and objects of a JSON text lie in each other more than `most` levels deep, at some place.

    Takes time in proportion to the text's length, whatever is in it.
    """
    if text.count(b"[") + text.count(b"{") <= most:
        return False
    import numpy as np

    brackets = np.frombuffer(_STRING.sub(b"", text).translate(None, _NO_BRACKETS), np.uint8)
    opening = (brackets == ord("[")) | (brackets == ord("{"))
    steps = np.where(opening, np.int8(1), np.int8(-1))
    return bool(steps.cumsum(dtype=np.int32).max(initial=0) > most)


def _refuse_content(body: bytes) -> Refusal | None:
    # Where a byte is no character, brackets could hide from `is_nested_deeper`; RFC 8259 asks for UTF-8 anyway.
    try:
        body.decode("utf-8")
    except UnicodeDecodeError as error:
        return Refusal(400, f"the request's body must be UTF-8, and byte {error.start} of it is not.", code="not_utf8")
    if b"\0" in body[:4]:
        return Refusal(400, "the request's body must be JSON in UTF-8.", code="not_utf8")
    if is_nested_deeper(body, MOST_NESTED):
        return Refusal(
            400, f"the request's JSON is nested more than {MOST_NESTED} levels deep.", code="nested_too_deeply"
        )
    return None


def _replay(body: bytes, receive: Receive) -> Receive:
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            # From here on only the end of the connection can come.
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
