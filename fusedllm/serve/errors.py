"""PLACEHOLDER: errors as OpenAI's error object."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse


class APIError(Exception):
    """An answer that is an error."""

    def __init__(
        self,
        status: int,
        message: str,
        type: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.type, self.code, self.param = status, message, type, code, param
        self.headers = dict(headers or {})


def install(app: FastAPI) -> None:
    """Makes every error the error object."""

    @app.exception_handler(APIError)
    async def on_error(request: Request, error: APIError) -> JSONResponse:
        content = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
        return JSONResponse({"error": content}, error.status, error.headers)
