"""`EngineConfig`: the declared set of shapes that programs are compiled for, and the size of the KV cache."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fusedllm.errors import RequestError

# Unless told otherwise a request may use this many positions: at SmolLM2's shape a float32 cache of it is 189 MB.
DEFAULT_MAX_CONTEXT = 4096

# Larger chunks are hardly faster.
DEFAULT_TOKEN_BUDGET = 256


# What suits a device, by jax's name for its platform, where nobody says otherwise. A GPU's are reasoned, not measured:
# a prompt of 1,024 tokens is as many operations as it takes to fill one, a step takes a millisecond, and each look at
# whether it goes on some hundredths of one.
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "gpu": {
        "prefill_buckets": (16, 64, 256, 1024, 2048),
        "batch_buckets": (1, 2, 4, 8, 16, 32),
        "decode_steps": 32,
        "free_steps": 4,
        "token_budget": 1024,
    }
}


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Shapes and sizes, all in tokens or requests.

    Attributes:
      max_context: positions that one request may use, prompt and output together.
      page_size: positions in a page of the KV cache.
      cache_tokens: positions in the whole KV cache; requests wait while it is full.
      prefill_buckets: chunk lengths of prefill programs, ascending multiples of `page_size`.
      batch_buckets: numbers of slots of decode programs, ascending.
      decode_steps: the most tokens a slot gets in one launch.
      latency_seconds: how long a stream should wait for its next tokens: a launch of decode steps is as long, and while
        requests decode a chunk of another's prompt is.
      token_budget: the most prompt tokens that are computed between two decode steps while requests decode; by default
        256, or the smallest prefill bucket if that is larger.
      prefix_cache: whether prompts that begin alike share pages.
      free_steps: decode steps that a program makes before it looks whether any request goes on, where its requests ask
        for so little of sampling that it needs no branches (`fusedllm.config.Sampler`); they divide `decode_steps`. For
        GPUs, where each branch waits for the host: 0 where there shall be no such programs.

    Raises:
      RequestError: sizes that contradict one another.
    """

    max_context: int = DEFAULT_MAX_CONTEXT
    page_size: int = 16
    cache_tokens: int = 0
    prefill_buckets: tuple[int, ...] = (16, 32, 64, 128, 256, 512)
    batch_buckets: tuple[int, ...] = (1, 2, 4, 8)
    decode_steps: int = 16
    latency_seconds: float = 0.035
    token_budget: int = 0
    prefix_cache: bool = True
    free_steps: int = 0

    def __post_init__(self) -> None:
        if not self.cache_tokens:
            object.__setattr__(self, "cache_tokens", self.max_context)
        if not self.token_budget:
            object.__setattr__(self, "token_budget", max(DEFAULT_TOKEN_BUDGET, min(self.prefill_buckets, default=0)))
        for name in ("max_context", "page_size", "cache_tokens", "decode_steps", "token_budget"):
            if not _is_count(getattr(self, name)):
                raise RequestError(f"{name} must be an integer of at least 1, got {getattr(self, name)!r}.")
        if not self.latency_seconds > 0:
            raise RequestError(f"latency_seconds must be a positive number, got {self.latency_seconds!r}.")
        if not (_is_count(self.free_steps) or self.free_steps == 0) or self.decode_steps % (self.free_steps or 1):
            raise RequestError(
                f"free_steps must be 0 or divide decode_steps ({self.decode_steps}), got {self.free_steps!r}."
            )
        if self.cache_tokens < self.max_context:
            raise RequestError(
                f"the KV cache must hold at least one request of {self.max_context} tokens, "
                f"got cache_tokens={self.cache_tokens}."
            )
        for name in ("prefill_buckets", "batch_buckets"):
            buckets = tuple(getattr(self, name))
            object.__setattr__(self, name, buckets)
            if not buckets or not all(map(_is_count, buckets)) or list(buckets) != sorted(set(buckets)):
                raise RequestError(f"{name} must be ascending positive integers, got {buckets!r}.")
        if self.token_budget < self.prefill_buckets[0]:
            raise RequestError(
                f"token_budget must hold the smallest of prefill_buckets, {self.prefill_buckets[0]}, "
                f"got {self.token_budget}."
            )
        if any(bucket % self.page_size for bucket in self.prefill_buckets):
            raise RequestError(
                f"prefill_buckets must be multiples of page_size ({self.page_size}), got {self.prefill_buckets!r}."
            )

    @classmethod
    def suited(cls, platform: str, **sizes: Any) -> EngineConfig:
        """`sizes`, and for the others what suits `platform` (jax's name for it)."""
        return cls(**{**SHAPES.get(platform, {}), **sizes})

    @property
    def table_entries(self) -> int:
        """Pages that one request may use."""
        return -(-self.max_context // self.page_size)

    @property
    def num_pages(self) -> int:
        """Physical pages of the cache, the null page included."""
        return -(-self.cache_tokens // self.page_size) + 1

    @property
    def new_pages(self) -> int:
        """The most pages that a request can begin to use in one launch of decode steps."""
        return -(-self.decode_steps // self.page_size) + 1

    @property
    def max_batch(self) -> int:
        """The most requests that decode together."""
        return self.batch_buckets[-1]

    def batch_bucket(self, requests: int) -> int:
        """The smallest bucket that holds `requests`, or the largest."""
        return next((bucket for bucket in self.batch_buckets if bucket >= requests), self.max_batch)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


# A launch costs about as much as this many more tokens in it (dispatch, weights read once more).
LAUNCH_TOKENS = 32


def split_into_chunks(length: int, buckets: tuple[int, ...]) -> list[tuple[int, int]]:
    """Cuts a prompt into `(tokens, bucket)` chunks, all but the last full, with the least padding and launches."""
    largest = buckets[-1]
    full = (length - 1) // largest
    return [(largest, largest)] * full + list(_cheapest(length - full * largest, buckets))


@functools.lru_cache(maxsize=4096)
def _cheapest(length: int, buckets: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Full buckets and then a last one, of the least cost in computed tokens, for at most the largest bucket."""
    unit = math.gcd(*buckets)
    units = -(-length // unit)
    # costs[n] and first[n]: of the cheapest way to cover n units, and the bucket that it begins with.
    costs, first = [0], [0]
    for covered in range(1, units + 1):
        options = [(bucket + LAUNCH_TOKENS + costs[max(covered - bucket // unit, 0)], bucket) for bucket in buckets]
        cost, bucket = min(options, key=lambda option: (option[0], -option[1]))
        costs.append(cost)
        first.append(bucket)
    chunks = []
    while length > 0:
        bucket = first[-(-length // unit)]
        chunks.append((min(bucket, length), bucket))
        length -= bucket
    return tuple(chunks)
