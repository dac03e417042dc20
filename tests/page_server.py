"""A server that says what a test told it to: the page under test, and the API it speaks with, on a port of its own."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from fusedllm.serve.page import router

MODEL = "smollm2-135m"

METRICS = """\
# HELP fusedllm:num_requests_running Requests in the batch.
# TYPE fusedllm:num_requests_running gauge
fusedllm:num_requests_running{model_name="smollm2-135m"} 3.0
fusedllm:num_requests_waiting{model_name="smollm2-135m"} 2.0
fusedllm:kv_cache_usage_perc{model_name="smollm2-135m"} 0.25
fusedllm:prefix_cache_queries_total{model_name="smollm2-135m"} 1000.0
fusedllm:prefix_cache_hits_total{model_name="smollm2-135m"} 820.0
fusedllm:time_to_first_token_seconds_bucket{le="0.5",model_name="smollm2-135m"} 7.0
"""


@dataclass(frozen=True)
class Answer:
    """One scripted answer: pieces of text with a pause before each, or a failure before or inside the stream."""

    pieces: tuple[str, ...] = ("Hello", " there", ", friend.")
    first: float = 0.02
    pause: float = 0.01
    status: int = 200
    sentence: str = ""
    retry_after: int | None = None
    breaks: bool = False
    usage: dict[str, Any] | None = None
    finish_reason: str = "stop"


@dataclass
class FakeServer:
    """What the test says (`script`, `key`, `metrics`) and what the page did (`requests`, `abandoned`, `polls`)."""

    script: list[Answer] = field(default_factory=list)
    key: str | None = None
    metrics: str = METRICS
    requests: list[dict[str, Any]] = field(default_factory=list)
    abandoned: int = 0
    polls: int = 0
    url: str = ""

    def reset(self) -> None:
        """As at the start of a test."""
        self.__init__(url=self.url)  # type: ignore[misc]


def error(status: int, sentence: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """OpenAI's error object."""
    return JSONResponse({"error": {"message": sentence, "type": "error", "param": None, "code": None}}, status, headers)


def create_app(fake: FakeServer) -> FastAPI:
    """The page's router and the three endpoints that it uses."""
    app = FastAPI()
    app.include_router(router)

    @app.middleware("http")
    async def authorize(request: Request, call_next: Any) -> Response:
        protected = request.url.path.startswith(("/v1", "/metrics"))
        if fake.key and protected and request.headers.get("authorization") != f"Bearer {fake.key}":
            return error(401, "This API key is not known; ask whoever runs the server for one.")
        response: Response = await call_next(request)
        return response

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "fusedllm"}]}

    @app.get("/metrics")
    async def metrics() -> Response:
        fake.polls += 1
        return Response(fake.metrics, media_type="text/plain; version=0.0.4")

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        fake.requests.append(await request.json())
        answer = fake.script.pop(0) if fake.script else Answer()
        if answer.status != 200:
            wait = {} if answer.retry_after is None else {"Retry-After": str(answer.retry_after)}
            return error(answer.status, answer.sentence, wait)
        return StreamingResponse(_stream(fake, answer), media_type="text/event-stream")

    return app


async def _stream(fake: FakeServer, answer: Answer) -> AsyncIterator[bytes]:
    def event(delta: dict[str, str] | None, finish_reason: str | None = None, **more: Any) -> bytes:
        choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish_reason}]
        chunk = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": MODEL, "choices": choices, **more}
        return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode()

    whole = False
    try:
        yield event({"role": "assistant", "content": ""})
        for index, piece in enumerate(answer.pieces):
            await asyncio.sleep(answer.pause if index else answer.first)
            yield event({"content": piece})
        whole = True
        if answer.breaks:
            return
        if answer.sentence:
            yield f"data: {json.dumps({'error': {'message': answer.sentence, 'type': 'server_error'}})}\n\n".encode()
            return
        yield event({}, answer.finish_reason)
        usage = {"prompt_tokens": 20, "completion_tokens": len(answer.pieces), **(answer.usage or {})}
        yield event(None, usage={**usage, "total_tokens": usage["prompt_tokens"] + usage["completion_tokens"]})
        yield b"data: [DONE]\n\n"
    finally:
        fake.abandoned += not whole


@contextmanager
def serving(fake: FakeServer) -> Iterator[FakeServer]:
    """Serves on a free port of the loopback interface, in a thread, until the block ends."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        fake.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = uvicorn.Config(create_app(fake), log_level="error", ws="none", lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield fake
        finally:
            server.should_exit = server.force_exit = True
            thread.join(10)
