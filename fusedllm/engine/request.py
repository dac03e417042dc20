"""A request on its way through the engine, and what comes out of it. Plain Python."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from fusedllm.config import SamplingParams

# `deadline`: its time was over; `error`: the launch that it was part of failed.
FinishReason = Literal["stop", "length", "cancelled", "deadline", "error"]


class Constraint(Protocol):
    """What may come next in a request whose output follows a grammar.

    Both methods raise a `FusedLLMError` where it can't be followed; the request ends with its sentence then.
    """

    def mask(self) -> np.ndarray:
        """uint32 `[ceil(vocab / 32)]`: bit `t % 32` of word `t // 32` says whether token `t` may come next."""
        ...

    def accept(self, token: int) -> None:
        """Goes on by a drawn token, which the last mask allowed."""
        ...


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural logarithm of the probability of a drawn token, and of the `top` most likely ones, likeliest first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens that one launch made for one request; `finish_reason` comes with the last of them.

    A request that ends without a token (cancelled, past its deadline, failed) gets a chunk without tokens. The first
    chunk brings `prompt_logprobs` where asked for: an entry for each token of the prompt but the first.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(slots=True)
class Timings:
    """When things happened to a request, in seconds of `time.perf_counter()`.

    `compile_seconds` is how much of the time until the first token went into making programs that had not been
    launched before: tracing, and compiling or reading them from the cache.
    """

    arrived: float = field(default_factory=time.perf_counter)
    prefill_started: float = 0.0
    first_token: float = 0.0
    compile_seconds: float = 0.0
    last_token: float = 0.0

    @property
    def prefill_seconds(self) -> float:
        """From the start of the prefill until the first token was on the host."""
        return self.first_token - self.prefill_started

    @property
    def decode_seconds(self) -> float:
        """From the first token until the last."""
        return self.last_token - self.first_token

    @property
    def first_token_seconds(self) -> float:
        """From arrival until the first token, waiting included."""
        return self.first_token - self.arrived


@dataclass(slots=True, eq=False, weakref_slot=True)
class Sequence:
    """A request inside the engine. `stop_ids` end it inside the program; stop strings are the caller's to watch.

    Attributes:
      priority: a lower one goes first; a step of one is worth `PRIORITY_SECONDS` of waiting.
      deadline: in seconds of `time.perf_counter()`, when the request ends whatever it has; `None` is never.
      cache_salt: only requests of the same salt share pages of their prompts.
      constraint: the grammar that the output follows.
      prompt_logprobs: as `SamplingParams.logprobs`, for the tokens of the prompt.
      error: why the request ended by its own fault, for the user.
      order: what counts as the time of its arrival, where no clock may decide (`lockstep.py`).
      cached_tokens: of the prompt, how many were found in the prefix cache when its prefill began.
    """

    prompt: tuple[int, ...]
    sampling: SamplingParams
    stop_ids: frozenset[int]
    budget: int
    seed: int = 0
    priority: int = 0
    deadline: float | None = None
    cache_salt: str = ""
    constraint: Constraint | None = None
    prompt_logprobs: int | None = None
    error: str | None = None
    order: float | None = None
    cached_tokens: int = 0
    pages: tuple[int, ...] = ()
    generated: int = 0
    finish_reason: FinishReason | None = None
    timings: Timings = field(default_factory=Timings)

    def __post_init__(self) -> None:
        self.seed = secrets.randbits(64) if self.sampling.seed is None else self.sampling.seed % 2**64

    @property
    def finished(self) -> bool:
        """Whether no more tokens will come."""
        return self.finish_reason is not None

    def accept(self, tokens: tuple[int, ...], logprobs: tuple[TokenLogprob, ...]) -> Chunk:
        """Counts `tokens`, and concludes from them whether the program has ended the request."""
        now = time.perf_counter()
        if not self.generated:
            self.timings.first_token = now
        self.timings.last_token = now
        self.generated += len(tokens)
        if tokens[-1] in self.stop_ids:
            self.finish_reason = "stop"
        elif self.generated >= self.budget:
            self.finish_reason = "length"
        return Chunk(tokens, logprobs, self.finish_reason)
