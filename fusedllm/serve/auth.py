"""PLACEHOLDER of the operations author's keys."""

from __future__ import annotations

from fastapi import Request


def caller(request: Request) -> str:
    """Nobody in particular."""
    return ""
