"""PLACEHOLDER: the app, with one endpoint that streams."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Body, Depends, FastAPI
from fastapi.responses import JSONResponse, Response, StreamingResponse

from fusedllm.config import SamplingParams
from fusedllm.engine.request import Chunk
from fusedllm.serve import errors, health, metrics
from fusedllm.serve.auth import caller
from fusedllm.serve.settings import ServerSettings
from fusedllm.serve.state import ServerState

if TYPE_CHECKING:
    from fusedllm.llm import LLM


def create_app(llm: LLM, settings: ServerSettings) -> FastAPI:
    """The app."""
    app = FastAPI()
    app.state.server = state = ServerState(llm, settings, metrics.Metrics(llm))
    errors.install(app)
    app.include_router(health.router)
    app.include_router(metrics.router)

    @app.post("/v1/completions", response_model=None)
    async def completions(body: Annotated[dict[str, Any], Body()], who: Annotated[str, Depends(caller)]) -> Response:
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Chunk] = asyncio.Queue()
        sampling = SamplingParams(max_tokens=body.get("max_tokens", 16), ignore_eos=True)
        stream = llm.prepare(body["prompt"], sampling)
        came = time.perf_counter()

        def deliver(chunk: Chunk) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, chunk)

        llm.engine.submit(stream.sequence, deliver)

        async def events() -> AsyncIterator[bytes]:
            before = came
            try:
                while not stream.sequence.finished or not queue.empty():
                    chunk = await queue.get()
                    stream.push(chunk)
                    now = time.perf_counter()
                    if before == came:
                        state.metrics.observe_first_token(now - came)
                    else:
                        state.metrics.observe_inter_token(now - before, len(chunk.tokens))
                    before = now
                    yield b"data: " + json.dumps({"tokens": chunk.tokens}).encode() + b"\n\n"
                    await asyncio.sleep(body.get("pause", 0))
                yield b"data: [DONE]\n\n"
            finally:
                llm.engine.cancel(stream.sequence)
                result = stream.result
                usage = result.usage
                state.metrics.observe_request(
                    result.finish_reason, usage.prompt_tokens, usage.completion_tokens, time.perf_counter() - came
                )

        if body.get("stream"):
            return StreamingResponse(events(), media_type="text/event-stream")
        async for _ in events():
            pass
        return JSONResponse({"tokens": stream.token_ids, "caller": who})

    return app
