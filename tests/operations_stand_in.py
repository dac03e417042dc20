"""A stand-in for the model and the app, so that the server around them can be tested alone; and raw clients."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from fusedllm.engine.stats import EngineStats
from fusedllm.partition.ledger import Ledger
from fusedllm.partition.pad_supply import PadReport
from fusedllm.partition.policies import POLICIES, Policy
from fusedllm.serve import health, lifecycle, metrics, server
from fusedllm.serve.auth import caller
from fusedllm.serve.settings import ServerSettings


class Engine:
    """Lives from `start` to `stop`."""

    def __init__(self) -> None:
        self.alive = False
        self.counters = EngineStats(pages_total=100)

    def start(self, max_queue: int | None = None) -> None:
        self.alive = True

    def stop(self) -> None:
        self.alive = False

    def stats(self) -> EngineStats:
        return self.counters


@dataclass
class Model:
    """Warms up in `programs` steps of `seconds` each; counts the requests that run."""

    engine: Engine = field(default_factory=Engine)
    programs: int = 1
    seconds: float = 0.0
    running: int = 0
    policy: Policy = POLICIES["plain"]
    boundary: Ledger = field(default_factory=Ledger)
    pads: dict[str, PadReport] = field(default_factory=dict)

    def warm_up(self, on_program: Any) -> None:
        for number in range(self.programs):
            on_program(f"program {number}")
            time.sleep(self.seconds)


def create_app(llm: Model, settings: ServerSettings) -> FastAPI:
    """`/v1/completions` takes `stream`, `events`, their `bytes`, the `pause` between them, `padding` of an answer."""
    app = FastAPI()
    app.state.server = SimpleNamespace(
        llm=llm, settings=settings, metrics=metrics.Metrics(llm), ready=False, draining=False, in_flight=set()
    )
    app.include_router(health.router)
    app.include_router(metrics.router)

    @app.get("/")
    async def page() -> str:
        return "page"

    @app.get("/running")
    async def running() -> int:
        return llm.running

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, str]:
        return {"caller": caller(request)}

    @app.post("/v1/completions", dependencies=[Depends(caller)], response_model=None)
    async def completions(request: Request) -> Response:
        body = await request.json() if await request.body() else {}

        async def events():
            llm.running += 1
            try:
                for number in range(body.get("events", 1)):
                    yield b"data: " + b"%d" % number * body.get("bytes", 1) + b"\n\n"
                    await asyncio.sleep(body.get("pause", 0))
                yield b"data: [DONE]\n\n"
            finally:
                llm.running -= 1

        if body.get("stream"):
            return StreamingResponse(events(), media_type="text/event-stream")
        async for _ in events():
            pass
        padding = {"padding": "x" * body["padding"]} if "padding" in body else {}
        return JSONResponse({"caller": caller(request), "bytes": len(await request.body()), **padding})

    return app


@contextlib.contextmanager
def serving(llm: Any = None, app: Any = create_app, **settings: Any) -> Iterator[server.Handle]:
    """A server in a thread, on a free port, that is stopped at the end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lifecycle, "create_app", app)
        handle = server.run(llm or Model(), **{"port": 0, "drain_seconds": 0.0, **settings}, block=False)
    try:
        yield handle
    finally:
        handle.stop()


def connect(handle: server.Handle, window: int | None = None) -> socket.socket:
    """A connection, with a limit on waiting that fails a test; `window` is of what its kernel takes unread."""
    connection = socket.socket()
    connection.settimeout(10)
    if window is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
    connection.connect((urlsplit(handle.url).hostname, urlsplit(handle.url).port))
    return connection


def exchange(handle: server.Handle, parts: Iterable[bytes], pause: float = 0.0) -> bytes:
    """What the server sends until it closes, if `parts` are sent with `pause` seconds after each."""
    with connect(handle) as connection:
        sender = threading.Thread(target=_send, args=(connection, parts, pause))
        sender.start()
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(2**16):
                received += part
        sender.join()
        return received


def _send(connection: socket.socket, parts: Iterable[bytes], pause: float) -> None:
    with contextlib.suppress(OSError):
        for part in parts:
            connection.sendall(part)
            time.sleep(pause)


def status_of(response: bytes) -> int:
    """The status of a raw response; 0 if there is none."""
    return int(response.split(b" ", 2)[1]) if response.startswith(b"HTTP/1.1 ") else 0


def wait_until(condition: Any, seconds: float = 10.0) -> None:
    """Waits for something that must come."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{condition} did not come true in {seconds} s"
        time.sleep(0.01)


def main(programs: str = "1", seconds: str = "0", **settings: Any) -> None:
    """A server in the main thread of a process, as a terminal would run it."""
    lifecycle.create_app = create_app
    server.run(Model(programs=int(programs), seconds=float(seconds)), port=0, **settings)


if __name__ == "__main__":
    words = dict(word.split("=") for word in sys.argv[1:])
    drain = float(words.pop("drain_seconds", 30))
    main(**words, drain_seconds=drain)
