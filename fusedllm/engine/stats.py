"""`EngineStats`: what the engine counts, for metrics and benchmarks."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Gauges of now, and counters since the start.

    Attributes:
      num_running: requests that hold pages: in prefill or decode.
      num_waiting: requests in the queue.
      pages_in_use: pages of the KV cache that running requests hold.
      pages_cached: further pages that hold prefixes, given up when a request needs them.
      pages_total: pages of the KV cache.
      prefix_queries, prefix_hits: prompt tokens looked up in the prefix cache, and found.
      preemptions: how often a request gave its pages up and was computed again.
      prompt_tokens, generated_tokens: of all requests so far.
      finished: requests by the reason of their end.
      failed_steps: launches that failed, with all requests that were part of them.
    """

    num_running: int = 0
    num_waiting: int = 0
    pages_in_use: int = 0
    pages_cached: int = 0
    pages_total: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    failed_steps: int = 0
