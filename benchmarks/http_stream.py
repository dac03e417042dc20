"""A streaming client of OpenAI's completions that costs little, so that it can share the cores with its server.

HTTP/1.1 and server-sent events are read from raw asyncio streams: an event costs some 20 microseconds here. What comes
out is when each event arrived and what text it carried; what can be said of tokens is said by the server's usage.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

REQUEST_SECONDS = 600.0
_LINE_LIMIT = 1 << 20


@dataclass
class Answer:
    """One request. Times are seconds of `time.perf_counter()`.

    Attributes:
      sent: when the request was written.
      events: when each event with text arrived, and how many characters it carried.
      ended: when the last byte arrived.
      prompt_tokens, cached_tokens, tokens: what the server's usage says; without one, a token for each event.
      error: what went wrong; empty if nothing did.
    """

    sent: float
    events: list[tuple[float, int]] = field(default_factory=list)
    ended: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    error: str = ""

    @property
    def first_token_seconds(self) -> float:
        """From the request until its first text."""
        return self.events[0][0] - self.sent

    def event_gaps(self) -> list[float]:
        """Seconds between events that carry text."""
        return [later[0] - earlier[0] for earlier, later in zip(self.events, self.events[1:], strict=False)]

    def token_gaps(self) -> list[float]:
        """The same divided over the tokens of the event, once for each of them.

        How many tokens an event carries is not in it: those of the answer are shared out by the events' characters.
        """
        per_character = self.tokens / max(sum(characters for _, characters in self.events), 1)
        gaps = []
        for gap, (_, characters) in zip(self.event_gaps(), self.events[1:], strict=True):
            count = max(1, round(characters * per_character))
            gaps += [gap / count] * count
        return gaps


class Connection:
    """A connection to a server that is used again for the next request where the server allows it."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self._address = (host, port)
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def complete(self, body: dict[str, Any], path: str = "/v1/completions") -> Answer:
        """Sends a streaming request and reads it to its end; never raises for what a server does."""
        answer = Answer(time.perf_counter())
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                await self._complete(path, json.dumps(body).encode(), answer)
        except (OSError, EOFError, ValueError, TimeoutError) as error:
            answer.error = f"{type(error).__name__}: {error}"
        answer.ended = time.perf_counter()
        # A server that sends no usage in a stream sends a token an event (llama-cpp-python's).
        answer.tokens = answer.tokens or len(answer.events)
        if answer.error:
            self.close()
        elif not answer.events:
            answer.error = "an answer without text"
        return answer

    async def get(self, path: str) -> tuple[int, bytes]:
        """Status and body of a plain request."""
        status, parts = await self._request(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        return status, b"".join([part async for part in parts])

    def close(self) -> None:
        """Gives the connection up; the next request opens another."""
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None

    async def _complete(self, path: str, body: bytes, answer: Answer) -> None:
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        status, parts = await self._request(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        if status != 200:
            content = b"".join([part async for part in parts])
            answer.error = f"status {status}: {content[:200].decode(errors='replace')}"
            return
        buffer = b""
        async for part in parts:
            now = time.perf_counter()
            *lines, buffer = (buffer + part).split(b"\n")
            for line in lines:
                if line.startswith(b"data: {"):
                    _take(answer, json.loads(line[6:]), now)
                elif line.startswith(b"error:"):
                    answer.error = line.decode(errors="replace")

    async def _request(self, message: bytes) -> tuple[int, AsyncIterator[bytes]]:
        status_line = await self._send(message) if self._writer is not None else b""
        if not status_line:
            # There is none, or the server had closed it meanwhile, as it may between two requests.
            self.close()
            self._reader, self._writer = await asyncio.open_connection(*self._address, limit=_LINE_LIMIT)
            status_line = await self._send(message)
        if not status_line:
            raise EOFError("the server has closed the connection")
        status = int(status_line.split()[1])
        headers = {}
        while line := await self._line():
            name, _, value = line.partition(b":")
            headers[name.strip().lower()] = value.strip().lower()
        return status, self._body(headers)

    async def _send(self, message: bytes) -> bytes:
        """Writes a request; the first line of the answer, empty where the connection is closed."""
        assert self._reader
        assert self._writer
        try:
            self._writer.write(message)
            await self._writer.drain()
            return await self._reader.readline()
        except ConnectionError:
            return b""

    async def _body(self, headers: dict[bytes, bytes]) -> AsyncIterator[bytes]:
        assert self._reader
        if headers.get(b"transfer-encoding") == b"chunked":
            while size := int((await self._line()).split(b";")[0], 16):
                yield await self._reader.readexactly(size)
                await self._line()
            await self._line()
        elif b"content-length" in headers:
            yield await self._reader.readexactly(int(headers[b"content-length"]))
        else:
            while part := await self._reader.read(1 << 16):
                yield part
        if headers.get(b"connection") == b"close":
            self.close()

    async def _line(self) -> bytes:
        assert self._reader
        line = await self._reader.readline()
        if not line:
            raise EOFError("the server has closed the connection")
        return line.rstrip(b"\r\n")


def _take(answer: Answer, event: dict[str, Any], now: float) -> None:
    if "error" in event:
        answer.error = json.dumps(event["error"])[:200]
    for choice in event.get("choices") or ():
        text = choice.get("text") or (choice.get("delta") or {}).get("content")
        if text:
            answer.events.append((now, len(text)))
    usage = event.get("usage")
    if usage:
        answer.prompt_tokens, answer.tokens = usage["prompt_tokens"], usage["completion_tokens"]
        answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
