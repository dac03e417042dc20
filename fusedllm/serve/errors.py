"""Errors as OpenAI's clients expect them: one object, with the right status, whatever went wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request

from fusedllm.errors import (
    AttestationError,
    AttestationUnavailableError,
    ContextLengthError,
    EngineStoppedError,
    FusedLLMError,
    QueueFullError,
    RequestError,
    TokenizerError,
)
from fusedllm.serve.responses import JSON

# A message may quote what was sent, and that may have the size of a body.
MAX_MESSAGE = 1_000

# What a client should wait before it tries again, in seconds: about the time of one answer.
RETRY_AFTER = {"Retry-After": "1"}

INVALID = "invalid_request_error"
UNAVAILABLE = "service_unavailable_error"
SERVER = "server_error"


class APIError(Exception):
    """An answer that is an error; handlers installed by `install` send it.

    Attributes:
      status: the HTTP status.
      message: a sentence for the user.
      type: OpenAI's kind of error, such as `invalid_request_error`.
      code: a word that programs look at, such as `model_not_found`.
      param: the parameter that it is about.
      headers: further headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        type: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message if len(message) <= MAX_MESSAGE else message[:MAX_MESSAGE] + "..."
        self.type = type
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSON:
        """The whole response."""
        return JSON(self.body, self.status, self.headers)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> APIError:
    """400: the request can't be answered as it is."""
    return APIError(400, message, INVALID, code, param)


def internal_error() -> APIError:
    """500, without a word of what happened: that is for the log. The connection ends with it."""
    message = "the server failed while it worked on this request."
    return APIError(500, message, SERVER, "internal_error", headers={"Connection": "close"})


def as_api_error(error: Exception) -> APIError:
    """The answer to whatever went wrong. What nobody expected says nothing of itself."""
    match error:
        case APIError():
            return error
        case RequestValidationError():
            return _of_validation(error.errors())
        case HTTPException():
            return _of_http(error)
        case ContextLengthError():
            return bad_request(_sentence(error), code="context_length_exceeded")
        case RequestError() | TokenizerError():
            return bad_request(_sentence(error))
        case QueueFullError():
            return APIError(503, _sentence(error), UNAVAILABLE, "queue_full", headers=RETRY_AFTER)
        case EngineStoppedError():
            return APIError(503, _sentence(error), UNAVAILABLE, "engine_stopped", headers=RETRY_AFTER)
        case AttestationUnavailableError():
            return APIError(501, _sentence(error), SERVER, "attestation_unavailable")
        case AttestationError():
            return APIError(503, _sentence(error), UNAVAILABLE, "attestation_failed", headers=RETRY_AFTER)
        case RecursionError():
            return bad_request("the body is nested too deeply.")
        case FusedLLMError():
            return APIError(500, _sentence(error), SERVER, "internal_error")
        case _:
            return internal_error()


def install(app: FastAPI) -> None:
    """Makes every error of `app` an OpenAI error object: no 422, no HTML, no traceback."""

    async def handle(request: Request, error: Exception) -> JSON:
        return as_api_error(error).response

    for kind in (APIError, RequestValidationError, HTTPException, FusedLLMError, RecursionError, Exception):
        app.add_exception_handler(kind, handle)


def _of_http(error: HTTPException) -> APIError:
    code = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}.get(error.status_code)
    message = {
        404: "there is nothing at this path; /openapi.json lists what there is.",
        405: "this path does not know this method; /openapi.json lists what there is.",
    }.get(error.status_code, f"{error.detail}.")
    kind = INVALID if error.status_code < 500 else SERVER
    return APIError(error.status_code, message, kind, code, headers=error.headers)


def _of_validation(errors: Sequence[Any]) -> APIError:
    """One sentence from pydantic's list: of the first parameter that is wrong, all that it might have been."""
    first = errors[0]
    place = first["loc"][1:]
    context = first.get("ctx") or {}
    match first["type"]:
        case "json_invalid":
            return bad_request(f"the body is not JSON: {context.get('error')} at character {first['loc'][-1]}.")
        case "refused":
            steps = place if context["param"] is None else (*place, context["param"])
            return bad_request(first["msg"], _path(steps), context["code"])
        case "extra_forbidden":
            name = _path(place)
            return bad_request(f"unknown parameter {name!r}; take it out.", name, "unknown_parameter")
        case "missing" if not place:
            return bad_request("the request has no body; send a JSON object with content-type application/json.")
        case "missing":
            return bad_request(f"the parameter {_path(place)!r} is missing.", _path(place), "missing_parameter")
        case "model_attributes_type" | "model_type" | "dict_type" if not place:
            return bad_request("the body must be a JSON object, sent with content-type application/json.")
    message = first["msg"]
    message = message[:1].lower() + message[1:]
    return bad_request(f"{_path(place)}: {message}.", _path(place))


def _path(place: Sequence[Any]) -> str:
    return ".".join(str(step) for step in place if step != "[key]")


def _sentence(error: Exception) -> str:
    message = str(error)
    return message if message.endswith(".") else f"{message}."
