"""The HTTP face: an OpenAI-compatible server on the engine. `run` starts one; importing this loads nothing large."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusedllm.serve.server import Handle, run
    from fusedllm.serve.settings import ServerSettings

__all__ = ["Handle", "ServerSettings", "run"]


def __getattr__(name: str) -> Any:
    if name in ("Handle", "run"):
        from fusedllm.serve import server

        return getattr(server, name)
    if name == "ServerSettings":
        from fusedllm.serve.settings import ServerSettings

        return ServerSettings
    raise AttributeError(f"module 'fusedllm.serve' has no attribute {name!r}")
