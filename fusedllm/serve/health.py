"""`/health`: is there an engine; `/ready`: should requests come here now. Both for probes, without a key."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from fusedllm.serve.state import ServerState

router = APIRouter(tags=["probes"])

STOPPED = "the engine has stopped"


def problem(state: ServerState) -> str | None:
    """Why the server can't take requests now; `None` when it can."""
    if state.draining:
        return "the server is stopping"
    if not state.ready:
        return "the server is starting"
    return None if state.llm.engine.alive else STOPPED


@router.head("/health", include_in_schema=False)
@router.get("/health", responses={503: {"description": "The engine is dead."}})
async def health(request: Request) -> JSONResponse:
    """200 as long as the engine lives, or is yet to be started; 503 asks to restart the server."""
    dead = problem(request.app.state.server) == STOPPED
    return JSONResponse({"status": STOPPED if dead else "ok"}, 503 if dead else 200)


@router.head("/ready", include_in_schema=False)
@router.get("/ready", responses={503: {"description": "Warming up, stopping, or the engine is dead."}})
async def ready(request: Request) -> JSONResponse:
    """200 when every program is compiled and the server admits requests."""
    reason = problem(request.app.state.server)
    headers = None if reason is None else {"Retry-After": "1"}
    return JSONResponse({"status": reason or "ready"}, 200 if reason is None else 503, headers)
