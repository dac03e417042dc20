"""What OpenAPI says of the answers, and what every answer says of the server."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from fusedllm import __version__
from fusedllm.serve.schemas_completions import ErrorBody

FINGERPRINT = f"fusedllm-{__version__}"

_ERRORS = {
    400: "The request can't be answered as it is.",
    401: "No key, or a wrong one.",
    404: "No such model.",
    413: "The body is too large.",
    429: "Too many requests with this key.",
    500: "The server failed.",
    503: "The queue is full, or the server starts or ends.",
    504: "The request was not answered in time.",
}


def documented(body: type[BaseModel], streams: bool = False) -> dict[int | str, dict[str, Any]]:
    """The `responses` of an endpoint that answers with `body`, or also with a stream of events."""
    answer: dict[str, Any] = {"model": body}
    if streams:
        answer["content"] = {"text/event-stream": {"schema": {"type": "string"}}}
    errors: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorBody, "description": text} for status, text in _ERRORS.items()
    }
    return {200: answer, **errors}
