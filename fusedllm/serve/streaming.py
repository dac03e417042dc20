"""Answers as they go out: whole, or as server-sent events in OpenAI's manner. A chunk is some text around a piece."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fusedllm.serve.errors import as_api_error
from fusedllm.serve.responses import JSON, dumps
from fusedllm.serve.session import Piece, Session
from fusedllm.stream import Stream

DONE = "data: [DONE]\n\n"

# What nginx has for a client that left before its answer; nobody reads it but our own log.
CLIENT_LEFT = 499

_LOG = logging.getLogger("fusedllm.serve")


class Answer(Protocol):
    """What an endpoint makes of its session."""

    def begin(self) -> str:
        """The events before the first piece."""
        ...

    def piece(self, piece: Piece) -> str:
        """The events of a piece; none where it shows nothing."""
        ...

    def end(self) -> str:
        """The events after the last piece."""
        ...

    def whole(self, prompt_logprobs: Mapping[int, Any]) -> dict[str, Any]:
        """The body of an answer that is not streamed, given the prompts' log-probabilities by stream."""
        ...


class Events:
    """Builds events of one answer. What is the same in all of them is made into text once.

    Args:
      head: fields of every event.
      usage: whether the last event brings the usage; the others have `null` for it then.
    """

    def __init__(self, head: Mapping[str, Any], usage: bool) -> None:
        self._head = f"data: {dumps(head)[:-1]}"
        self._start = f'{self._head},"choices":['
        self._stop = ',"usage":null}\n\n' if usage else "}\n\n"
        self._usage = usage

    def event(self, index: int, value: str, logprobs: str = "null", reason: str | None = None) -> str:
        """An event with one choice. `value` is its text or delta with its name, and like `logprobs` JSON."""
        end = "null" if reason is None else f'"{reason}"'
        choice = f'{{"index":{index},{value},"logprobs":{logprobs},"finish_reason":{end}}}'
        return f"{self._start}{choice}]{self._stop}"

    def end(self, usage: Mapping[str, Any]) -> str:
        """What comes after the last piece."""
        return f'{self._start}],"usage":{dumps(usage)}}}\n\n{DONE}' if self._usage else DONE


class EventStream(Response):
    """A response of server-sent events. What goes wrong before the first is an ordinary error response."""

    media_type = "text/event-stream"

    def __init__(self, session: Session, answer: Answer) -> None:
        self.status_code = 200
        self.background = None
        self.body = b""
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._session = session
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends events until the answer ends, fails, or the client leaves."""

        async def write(events: str, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": events.encode("ascii"), "more_body": more})

        with self._session as session, session.watching(receive):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                if begin := self._answer.begin():
                    await write(begin)
                while pieces := await session.next():
                    if events := "".join(map(self._answer.piece, pieces)):
                        await write(events)
                if session.disconnected:
                    return
                last = self._answer.end()
            except Exception as error:
                answer = as_api_error(error)
                if answer is not error:
                    _LOG.exception("a stream failed")
                last = f"data: {dumps(answer.body)}\n\n{DONE}"
            await write(last, more=False)


async def respond(request: Request, session: Session, answer: Answer, stream: bool) -> Response:
    """The response to a request, as a stream or whole.

    Raises:
      APIError, QueueFullError, EngineStoppedError: as `Session` does.
    """
    if stream:
        return EventStream(session, answer)
    prompt_logprobs: dict[int, Any] = {}
    with session, session.watching(request.receive):
        while pieces := await session.next():
            prompt_logprobs |= {piece.index: piece.prompt_logprobs for piece in pieces if piece.prompt_logprobs}
    if session.disconnected:
        return Response(status_code=CLIENT_LEFT)
    return JSON(answer.whole(prompt_logprobs))


def usage(streams: Sequence[Stream], n: int, completion_tokens: int | None = None) -> dict[str, Any]:
    """Tokens in and out: a prompt counts once, however many answers it gets. Streams of a prompt are side by side."""
    prompts = [stream.sequence for stream in streams[::n]]
    made = sum(len(stream.token_ids) for stream in streams) if completion_tokens is None else completion_tokens
    read = sum(len(sequence.prompt) for sequence in prompts)
    return {
        "prompt_tokens": read,
        "completion_tokens": made,
        "total_tokens": read + made,
        "prompt_tokens_details": {"cached_tokens": sum(sequence.cached_tokens for sequence in prompts)},
    }
