"""Log lines: one a request, for people or as JSON, with the request's id, and never with what was asked unless told."""

from __future__ import annotations

import contextvars
import json
import logging
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fusedllm.serve.metrics import Metrics
from fusedllm.serve.settings import LogFormat

# Of the request that the running code belongs to.
REQUEST_ID: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="")

LOGGER = logging.getLogger("fusedllm.serve")
UVICORN = "uvicorn.error"

# Asked for every few seconds by programs; a line for each would be most of the log.
PROBES = frozenset({"/health", "/ready", "/metrics"})

# Of a body in the log.
MOST_LOGGED = 2**16


def set_up(log_format: LogFormat) -> None:
    """Sends the lines of the server, and uvicorn's of what went wrong, to standard error; the root logger stays."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if log_format == "json" else HumanLines())
    for name, level in ((LOGGER.name, logging.INFO), (UVICORN, logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level)
        logger.propagate = False


class JsonLines(logging.Formatter):
    """A JSON object a line: `time` (UTC), `level`, `message`, `request_id`, its fields, a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry: dict[str, Any] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


class HumanLines(logging.Formatter):
    """`12:00:00 INFO message name=value ... [request id]`; a traceback follows on lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, and the traceback's."""
        fields = _fields(record)
        request_id = fields.pop("request_id", "")
        parts = [time.strftime("%H:%M:%S", time.localtime(record.created)), record.levelname, record.getMessage()]
        parts += [f"{name}={value}" for name, value in fields.items()]
        line = " ".join(parts) + (f" [{request_id}]" if request_id else "")
        # Whatever a client has sent, it can't write a line of its own.
        line = "".join(char if char.isprintable() else repr(char)[1:-1] for char in line)
        return line if not record.exc_info else f"{line}\n{self.formatException(record.exc_info)}"


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields = dict(getattr(record, "fields", {}))
    request_id = fields.pop("request_id", None) or REQUEST_ID.get()
    return {**fields, **({"request_id": request_id} if request_id else {})}


def log(level: int, message: str, **fields: object) -> None:
    """A line of the server with `fields`."""
    LOGGER.log(level, message, extra={"fields": fields})


def log_body(body: bytes) -> None:
    """A request's body, for those who asked for it (`log_prompts`); cut where it is long."""
    shown = body[:MOST_LOGGED].decode("utf-8", "replace")
    log(logging.INFO, "body", body=shown if len(body) <= MOST_LOGGED else f"{shown}... ({len(body)} bytes)")


class AccessLog:
    """A line for each request when it has ended: method, path without query, status, seconds, bytes and caller."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        status, sent = 0, 0

        async def counted(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                sent += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, receive, counted)
        finally:
            self._metrics.observe_response(status)
            level = logging.DEBUG if scope["path"] in PROBES and status == 200 else logging.INFO
            fields = {
                "method": scope["method"],
                "path": scope["path"],
                # 0: the client left before there was an answer.
                "status": status,
                "seconds": round(time.perf_counter() - started, 4),
                "bytes": sent,
            }
            who = scope.get("state", {}).get("caller")
            log(level, "request", **fields, **({"caller": who} if who else {}))
