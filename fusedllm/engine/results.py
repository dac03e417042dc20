"""What a caller gets back: text, ids, the reason of the end, usage and timings."""

from __future__ import annotations

from dataclasses import dataclass

from fusedllm.engine.request import FinishReason, Timings, TokenLogprob


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens in and out of one request."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to one request.

    Attributes:
      text: the answer, without special tokens, cut before a stop string.
      token_ids: the drawn tokens, the one that ended the request included.
      finish_reason: `stop` (a stop token or string), `length` (max_tokens or the context's end), `cancelled`.
      logprobs: one entry a token where asked for, otherwise empty.
      usage: tokens in and out.
      timings: seconds of the prefill, of the decode, and until the first token.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...]
    usage: Usage
    timings: Timings
