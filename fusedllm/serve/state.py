"""PLACEHOLDER: what all endpoints of a server share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fusedllm.serve.metrics import Metrics
from fusedllm.serve.settings import ServerSettings

if TYPE_CHECKING:
    from fusedllm.llm import LLM


@dataclass(slots=True)
class ServerState:
    """The model, the settings, and where the server is in its life."""

    llm: LLM
    settings: ServerSettings
    metrics: Metrics
    ready: bool = False
    draining: bool = False
    in_flight: set[Any] = field(default_factory=set)
