"""`create_app`: endpoints, errors and state put together."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from fusedllm import __version__
from fusedllm.attesting import Attester
from fusedllm.llm import LLM
from fusedllm.serve import attestation, chat, completions, errors, health, metrics, models, page
from fusedllm.serve.settings import ServerSettings
from fusedllm.serve.state import ServerState


def create_app(llm: LLM, settings: ServerSettings) -> FastAPI:
    """The application that serves `llm`. Who runs it starts the engine, and sets `app.state.server.ready`."""
    # Its pages for browsing the API load scripts from elsewhere, so there are none.
    # And no redirects: behind a proxy that ends TLS they would lead away from it.
    app = FastAPI(title="fusedllm", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    quoting = attestation.Quoting(Attester(settings.manifest, settings.certificate))
    app.state.server = ServerState(llm, settings, metrics.Metrics(llm), quoting)
    errors.install(app)
    for part in (completions, chat, models, attestation, metrics, health, page):
        app.include_router(part.router)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The description of the API, without the 422 that FastAPI adds and this server never answers."""
    if not app.openapi_schema:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            schema["components"]["schemas"].pop(name, None)
        app.openapi_schema = schema
    return app.openapi_schema
