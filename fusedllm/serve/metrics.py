"""PLACEHOLDER of the operations author's metrics."""

from __future__ import annotations

from fastapi import APIRouter

from fusedllm.llm import LLM

router = APIRouter()


class Metrics:
    """Counts nothing."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm

    def observe_first_token(self, seconds: float) -> None:
        """Nothing."""

    def observe_inter_token(self, seconds: float, tokens: int) -> None:
        """Nothing."""

    def observe_request(self, reason: str, prompt_tokens: int, completion_tokens: int, seconds: float) -> None:
        """Nothing."""
