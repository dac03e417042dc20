"""`EngineConfig`: the declared set of shapes that programs are compiled for, and the size of the KV cache."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from fusedllm.errors import RequestError

# Unless told otherwise a request may use this many positions: at SmolLM2's shape a float32 cache of it is 189 MB.
DEFAULT_MAX_CONTEXT = 4096


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
      latency_seconds: how long a launch of decode steps should take, so that a stream looks alive.

    Raises:
      RequestError: sizes that contradict one another.
    """

    max_context: int = DEFAULT_MAX_CONTEXT
    page_size: int = 16
    cache_tokens: int = 0
    prefill_buckets: tuple[int, ...] = (16, 64, 128, 256, 512)
    batch_buckets: tuple[int, ...] = (1, 2, 4, 8)
    decode_steps: int = 16
    latency_seconds: float = 0.1

    def __post_init__(self) -> None:
        if not self.cache_tokens:
            object.__setattr__(self, "cache_tokens", self.max_context)
        for name in ("max_context", "page_size", "cache_tokens", "decode_steps"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.cache_tokens < self.max_context:
            raise RequestError(
                f"the KV cache must hold at least one request of {self.max_context} tokens, "
                f"got cache_tokens={self.cache_tokens}."
            )
        for name in ("prefill_buckets", "batch_buckets"):
            buckets = getattr(self, name)
            if not buckets or list(buckets) != sorted(set(buckets)) or buckets[0] < 1:
                raise RequestError(f"{name} must be ascending positive numbers, got {buckets!r}.")
        if any(bucket % self.page_size for bucket in self.prefill_buckets):
            raise RequestError(
                f"prefill_buckets must be multiples of page_size ({self.page_size}), got {self.prefill_buckets!r}."
            )

    @property
    def table_entries(self) -> int:
        """Pages that one request may use."""
        return -(-self.max_context // self.page_size)

    @property
    def num_pages(self) -> int:
        """Physical pages of the cache, the null page included."""
        return -(-self.cache_tokens // self.page_size) + 1

    @property
    def max_batch(self) -> int:
        """The most requests that decode together."""
        return self.batch_buckets[-1]

    def batch_bucket(self, requests: int) -> int:
        """The smallest bucket that holds `requests`, or the largest."""
        return next((bucket for bucket in self.batch_buckets if bucket >= requests), self.max_batch)


# A launch costs about as much as this many more tokens in it (dispatch, weights read once more).
LAUNCH_TOKENS = 32


def split_into_chunks(length: int, buckets: tuple[int, ...]) -> list[tuple[int, int]]:
    """Cuts a prompt into `(tokens, bucket)` chunks, all but the last full, with the least padding and launches."""
    largest = buckets[-1]
    chunks = [(largest, largest)] * ((length - 1) // largest)
    remaining = length - largest * len(chunks)
    return [*chunks, *_cheapest(remaining, buckets)]


@functools.lru_cache(maxsize=4096)
def _cheapest(length: int, buckets: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Descending full buckets and then a padded one, of the least cost in computed tokens."""
    padded = next(bucket for bucket in buckets if bucket >= length)
    best: tuple[tuple[int, int], ...] = ((length, padded),)
    for bucket in buckets:
        if bucket < length:
            split = ((bucket, bucket), *_cheapest(length - bucket, buckets))
            if _cost(split) < _cost(best):
                best = split
    return best


def _cost(chunks: tuple[tuple[int, int], ...]) -> int:
    return sum(bucket + LAUNCH_TOKENS for _, bucket in chunks)
