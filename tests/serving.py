"""An application around a model for tests: in this process, or on a port of this machine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import fastapi
import httpx
import uvicorn

from fusedllm.llm import LLM
from fusedllm.serve.app import create_app
from fusedllm.serve.settings import ServerSettings

MODEL = "smollm2-135m"
JSON_TYPE = {"content-type": "application/json"}


def app_of(llm: LLM, **settings: Any) -> fastapi.FastAPI:
    app = create_app(llm, ServerSettings(model_name=MODEL, **settings))
    app.state.server.ready = True
    return app


def with_client(app: fastapi.FastAPI, work: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
    """Runs `work` with a client of `app`, without a socket in between."""

    async def run() -> Any:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server", timeout=60) as client:
            return await work(client)

    return asyncio.run(run())


def ask(app: fastapi.FastAPI, path: str, body: Any = None, **options: Any) -> httpx.Response:
    """One request: POST with a body, otherwise GET."""

    async def work(client: httpx.AsyncClient) -> httpx.Response:
        if body is None and not options:
            return await client.get(path)
        if body is None:
            return await client.post(path, **options)
        # ASCII, as httpx's own can't write half of a surrogate pair.
        return await client.post(path, content=json.dumps(body), headers=JSON_TYPE, **options)

    return with_client(app, work)


def events_of(response: httpx.Response) -> list[Any]:
    """The events of a stream, which must end with `[DONE]` and hold nothing but events."""
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8", response.text
    parts = response.text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    assert all(part.startswith("data: ") and "\n" not in part for part in parts[:-1])
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def the_error(response: httpx.Response) -> Any:
    """The error object of a response, which holds nothing else."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"].endswith((".", "...")), body
    return body["error"]


@contextlib.contextmanager
def on_a_port(app: fastapi.FastAPI, pair: tuple[Path, Path] | None = None) -> Iterator[str]:
    """The address of `app`, served by uvicorn in a thread; behind TLS with a `pair` of certificate and key."""
    files: dict[str, Any] = {} if pair is None else {"ssl_certfile": pair[0], "ssl_keyfile": pair[1]}
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off", **files))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http{'' if pair is None else 's'}://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def settle(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Waits until something is so that follows, a moment later, from what was done."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never became so"
        time.sleep(0.005)
