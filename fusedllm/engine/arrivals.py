"""Chunks on their way from an engine, whoever drives it, to who waits for those of several requests."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable, Iterator

from fusedllm.engine.request import Chunk

# Takes a request's chunks as they come.
Deliver = Callable[[Chunk], object]

# Chunks of several requests, each with its number, from whichever thread makes them.
Arrived = queue.SimpleQueue[tuple[int, Chunk]]

# How often `drained` looks, while the thread drives, whether its requests have ended without a chunk.
WATCH_SECONDS = 0.1


def numbered(index: int, arrived: Arrived) -> Deliver:
    """Puts chunks where `drained` takes them, with the number of their request."""
    return lambda chunk: arrived.put((index, chunk))


def drained(
    arrived: Arrived, have_ended: Callable[[], bool], alive: Callable[[], bool], drive: Callable[[], object]
) -> Iterator[tuple[int, Chunk]]:
    """What arrives, until all requests have ended; where no thread is alive that runs them, by `drive`."""
    # A last chunk may come between the first look and the answer that all have ended.
    while not (arrived.empty() and have_ended() and arrived.empty()):
        if arrived.empty() and not alive():
            drive()
            continue
        with contextlib.suppress(queue.Empty):
            yield arrived.get(timeout=WATCH_SECONDS)
