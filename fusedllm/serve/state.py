"""`ServerState`: what the endpoints of one application share."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends, Request

from fusedllm.errors import EngineStoppedError
from fusedllm.llm import LLM
from fusedllm.serve.auth import caller
from fusedllm.serve.errors import APIError
from fusedllm.serve.metrics import Metrics
from fusedllm.serve.settings import ServerSettings

if TYPE_CHECKING:
    from fusedllm.serve.attestation import Quoting
    from fusedllm.serve.session import Session


@dataclass(slots=True)
class ServerState:
    """One model behind one application.

    Attributes:
      llm: the model; its engine runs in a thread of its own.
      settings: limits and options.
      metrics: where requests are counted.
      quoting: vouches for the server.
      ready: whether requests are admitted: programs are compiled, the engine runs.
      draining: whether the server is about to end, and admits nobody.
      in_flight: the sessions that have begun and not ended.
      created: when this model began to be served, in seconds since 1970.
    """

    llm: LLM
    settings: ServerSettings
    metrics: Metrics
    quoting: Quoting
    ready: bool = False
    draining: bool = False
    in_flight: set[Session] = field(default_factory=set)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def model_name(self) -> str:
        """The name that requests ask for."""
        return self.settings.model_name or "fusedllm"

    def check_model(self, name: str | None) -> None:
        """Raises `APIError` 404 unless `name` is the served model's; `None` is whatever is served."""
        if name is not None and name != self.model_name:
            raise APIError(
                404,
                f"the model {name!r} is not served here; this server has {self.model_name!r}.",
                "invalid_request_error",
                "model_not_found",
                "model",
            )

    def check_admission(self) -> None:
        """Raises `EngineStoppedError` while nobody is admitted."""
        if self.draining:
            raise EngineStoppedError("the server is shutting down and takes no more requests.")
        if not self.ready:
            raise EngineStoppedError("the server is still warming up; /ready says when it is done.")


async def _server(request: Request) -> ServerState:
    state: ServerState = request.app.state.server
    return state


async def _caller(request: Request) -> str:
    # FastAPI would run a plain function in another thread, which costs more than what it does.
    return caller(request)


# Parameters of an endpoint: the state, and the id of the key that the request came with.
Server = Annotated[ServerState, Depends(_server)]
Caller = Annotated[str, Depends(_caller)]
require_caller = Depends(_caller)
