"""/v1/completions: prompts as text or tokens, several at once, echoed and scored where asked for."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from fusedllm.engine.request import TokenLogprob
from fusedllm.serve.documented import FINGERPRINT, documented
from fusedllm.serve.logprobs import LegacyFormat, join
from fusedllm.serve.prepare import Wanted, prepare
from fusedllm.serve.responses import dumps
from fusedllm.serve.schemas_completions import DEFAULT_MAX_TOKENS, CompletionBody, CompletionRequest
from fusedllm.serve.session import Piece, Session
from fusedllm.serve.state import Caller, Server, ServerState
from fusedllm.serve.streaming import Events, respond, usage
from fusedllm.stream import Stream

router = APIRouter()


@router.post("/v1/completions", responses=documented(CompletionBody, streams=True))
async def complete(request: Request, body: CompletionRequest, server: Server, key: Caller) -> Response:
    """Goes on with each prompt."""
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if body.max_tokens is None and server.settings.max_tokens is not None:
        max_tokens = min(max_tokens, server.settings.max_tokens)
    wanted = Wanted(
        encode=lambda: [server.llm.encode(prompt) for prompt in body.prompt],
        characters=sum(map(len, body.prompt)),
        prompts=len(body.prompt),
        # A prompt is read by asking for one token, which nobody sees.
        max_tokens=max(max_tokens, 1),
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
    )
    streams = await prepare(server, key, body, wanted)
    answer = CompletionAnswer(server, body, streams)
    return await respond(request, Session(server, streams), answer, bool(body.stream))


class CompletionAnswer:
    """The answer to one request, whole or in events."""

    def __init__(self, server: ServerState, body: CompletionRequest, streams: Sequence[Stream]) -> None:
        self._body = body
        self._streams = streams
        self._tokenizer = server.llm.tokenizer
        self._head = {
            "id": f"cmpl-{secrets.token_hex(16)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": server.model_name,
            "system_fingerprint": FINGERPRINT,
        }
        self._events = Events(self._head, body.include_usage)
        self._prompt_only = body.max_tokens == 0
        self._formats = [LegacyFormat(self._tokenizer, body.logprobs or 0) for _ in streams]
        self._echoed = [not body.echo for _ in streams]

    def begin(self) -> str:
        """Nothing: the first piece begins."""
        return ""

    def piece(self, piece: Piece) -> str:
        """An event with the text, the prompt before it where that is echoed, and one for the end."""
        text, logprobs = self._extend(piece.index, piece.text, piece.logprobs, piece.prompt_logprobs)
        shown = "null" if logprobs is None else dumps(logprobs)
        # With log-probabilities every token is shown, also one that makes no text yet.
        events = self._event(piece.index, text, shown) if text or piece.logprobs else ""
        return events + (self._event(piece.index, "", "null", self._reason(piece)) if piece.finish_reason else "")

    def end(self) -> str:
        """The usage where asked for, and the end."""
        return self._events.end(self._usage())

    def whole(self, prompt_logprobs: Mapping[int, Sequence[TokenLogprob]]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        choices = []
        for index, stream in enumerate(self._streams):
            result = stream.result
            text, logprobs = self._extend(index, result.text, result.logprobs, prompt_logprobs.get(index, ()))
            reason = "length" if self._prompt_only else result.finish_reason
            choices.append({"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason})
        return {**self._head, "choices": choices, "usage": self._usage()}

    def _extend(
        self, index: int, text: str, entries: Sequence[TokenLogprob], of_prompt: Sequence[TokenLogprob]
    ) -> tuple[str, dict[str, Any] | None]:
        """Text and log-probabilities to show next for a stream: the first time, after the prompt's."""
        if self._prompt_only:
            text, entries = "", ()
        wanted = self._body.logprobs is not None
        form = self._formats[index]
        if self._echoed[index]:
            return text, form.answer(entries) if wanted else None
        self._echoed[index] = True
        prompt = self._prompt_text(index)
        if not wanted:
            return prompt + text, None
        ids = self._streams[index].sequence.prompt
        if len(of_prompt) != len(ids) - 1:
            raise RuntimeError(f"{len(of_prompt)} log-probabilities came for a prompt of {len(ids)} tokens")
        return prompt + text, join(form.prompt(ids, of_prompt, prompt), form.answer(entries))

    def _prompt_text(self, index: int) -> str:
        prompt = self._body.prompt[index // (self._body.n or 1)]
        if isinstance(prompt, str):
            return prompt
        return "" if self._tokenizer is None else self._tokenizer.decode(prompt)

    def _event(self, index: int, text: str, logprobs: str, reason: str | None = None) -> str:
        return self._events.event(index, f'"text":{dumps(text)}', logprobs, reason)

    def _reason(self, piece: Piece) -> str | None:
        return "length" if self._prompt_only else piece.finish_reason

    def _usage(self) -> dict[str, Any]:
        return usage(self._streams, self._body.n or 1, 0 if self._prompt_only else None)
