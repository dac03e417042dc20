"""The layers around the app, from the outermost in: what a request must pass before it costs anything."""

from __future__ import annotations

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from fusedllm.serve.admission import Admission
from fusedllm.serve.auth import Authentication
from fusedllm.serve.limits import Body, RequestId
from fusedllm.serve.logs import AccessLog
from fusedllm.serve.state import ServerState

# Of what a page of another origin may read; `Authorization` is no credential in the sense of CORS.
EXPOSED = ("x-request-id", "retry-after")
DAY_SECONDS = 86_400


def protect(app: ASGIApp, state: ServerState) -> tuple[ASGIApp, Admission]:
    """`app` with an id, a log line, CORS, a check of the key, admission and a bounded body; and the admission.

    A preflight of CORS has no key, therefore it comes before the keys. A key is checked before the body is read, so
    that a stranger can't make the server hold one.
    """
    settings = state.settings
    admission = Admission(Body(app, settings), state)
    layered: ASGIApp = Authentication(admission, settings)
    if settings.cors_origins:
        layered = CORSMiddleware(
            layered,
            allow_origins=settings.cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("authorization", "content-type", "x-request-id"),
            expose_headers=EXPOSED,
            max_age=DAY_SECONDS,
        )
    return RequestId(AccessLog(layered, state.metrics)), admission
