"""PLACEHOLDER of the operations author's `ServerSettings`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """The agreed fields."""

    model_name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    certificate: str | None = None
    private_key: str | None = None
    max_queue: int = 64
    max_body_bytes: int = 4 << 20
    max_prompt_tokens: int | None = None
    max_tokens: int | None = None
    max_n: int = 8
    request_seconds: float = 600.0
    body_seconds: float = 10.0
    send_seconds: float = 30.0
    drain_seconds: float = 30.0
    requests_per_minute: int | None = None
    log_prompts: bool = False
    prefix_cache_per_key: bool = True
