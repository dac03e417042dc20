"""/v1/chat/completions: conversations, rendered by the model's own template."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from fusedllm.engine.request import FinishReason, TokenLogprob
from fusedllm.serve.documented import FINGERPRINT, documented
from fusedllm.serve.logprobs import chat_logprobs
from fusedllm.serve.prepare import Wanted, prepare
from fusedllm.serve.responses import dumps
from fusedllm.serve.schemas_chat import ChatBody, ChatRequest
from fusedllm.serve.session import Piece, Session
from fusedllm.serve.state import Caller, Server, ServerState
from fusedllm.serve.streaming import Events, respond, usage
from fusedllm.stream import Stream

router = APIRouter()


@router.post("/v1/chat/completions", responses=documented(ChatBody, streams=True))
async def chat(request: Request, body: ChatRequest, server: Server, key: Caller) -> Response:
    """Goes on with a conversation."""
    wanted = Wanted(
        encode=lambda: [server.llm.render([message.for_template for message in body.messages])],
        characters=sum(len(message.content) for message in body.messages),
        prompts=1,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    streams = await prepare(server, key, body, wanted)
    answer = ChatAnswer(server, body, streams)
    return await respond(request, Session(server, streams), answer, bool(body.stream))


class ChatAnswer:
    """The answer to one request, whole or in events."""

    def __init__(self, server: ServerState, body: ChatRequest, streams: Sequence[Stream]) -> None:
        self._body = body
        self._streams = streams
        self._tokenizer = server.llm.tokenizer
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(16)}",
            "created": int(time.time()),
            "model": server.model_name,
            "system_fingerprint": FINGERPRINT,
        }
        self._events = Events({**self._head, "object": "chat.completion.chunk"}, body.include_usage)

    def begin(self) -> str:
        """Who speaks, and no text yet."""
        role = '"delta":{"role":"assistant","content":""}'
        return "".join(self._events.event(index, role) for index in range(len(self._streams)))

    def piece(self, piece: Piece) -> str:
        """An event with the text, and one for the end."""
        logprobs = self._logprobs(piece.index, piece.logprobs, piece.finish_reason)
        events = ""
        # With log-probabilities every token is shown, also one that makes no text yet.
        if piece.text or (logprobs and logprobs["content"]):
            delta = f'"delta":{{"content":{dumps(piece.text)}}}'
            events = self._events.event(piece.index, delta, "null" if logprobs is None else dumps(logprobs))
        if piece.finish_reason:
            events += self._events.event(piece.index, '"delta":{}', "null", piece.finish_reason)
        return events

    def end(self) -> str:
        """The usage where asked for, and the end."""
        return self._events.end(self._usage())

    def whole(self, prompt_logprobs: Mapping[int, Any]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        choices = []
        for index, stream in enumerate(self._streams):
            result = stream.result
            choices.append(
                {
                    "index": index,
                    "message": {"role": "assistant", "content": result.text, "refusal": None},
                    "logprobs": self._logprobs(index, result.logprobs, result.finish_reason),
                    "finish_reason": result.finish_reason,
                }
            )
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": self._usage()}

    def _logprobs(
        self, index: int, entries: Sequence[TokenLogprob], reason: FinishReason | None
    ) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        # A token that only ends the answer is no part of the message.
        if reason == "stop" and entries and entries[-1].token_id in self._streams[index].sequence.stop_ids:
            entries = entries[:-1]
        return chat_logprobs(self._tokenizer, entries)

    def _usage(self) -> dict[str, Any]:
        return usage(self._streams, self._body.n or 1)
