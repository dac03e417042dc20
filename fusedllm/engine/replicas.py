"""`Replicas`: several engines that answer side by side, each with its own devices, pages and seats, as one.

A group of devices (`dp`) shares nothing with the others but the weights' file. So each has an engine of its own, and no
launch of one waits for another's: while one prefills the others decode, which one program for all could not do.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import queue
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from fusedllm.config import SamplingParams
from fusedllm.engine.arrivals import Arrived, Deliver, drained, numbered
from fusedllm.engine.config import EngineConfig
from fusedllm.engine.engine import Engine
from fusedllm.engine.request import Chunk
from fusedllm.engine.request import Sequence as Request
from fusedllm.engine.runner import Runner
from fusedllm.engine.stats import EngineStats


class Replicas:
    """Engines behind the face of one. A request stays where it was put: with who had the fewest when it came."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.engines = tuple(engines)
        self._homes: WeakKeyDictionary[Request, Engine] = WeakKeyDictionary()

    @property
    def runner(self) -> Runner:
        """That of the first engine."""
        return self.engines[0].runner

    @property
    def config(self) -> EngineConfig:
        """The sizes of each engine."""
        return self.engines[0].config

    @property
    def pages_in_use(self) -> int:
        """Pages of the KV caches that requests hold."""
        return sum(engine.pages_in_use for engine in self.engines)

    @property
    def failed_steps(self) -> int:
        """Launches that failed."""
        return sum(engine.failed_steps for engine in self.engines)

    @property
    def alive(self) -> bool:
        """Whether all threads run."""
        return all(engine.alive for engine in self.engines)

    def prepare(self, prompt: Sequence[int], sampling: SamplingParams, **options: Any) -> Request:
        """As `Engine.prepare`."""
        return self.engines[0].prepare(prompt, sampling, **options)

    def run(self, sequences: Sequence[Request]) -> Iterator[tuple[int, Chunk]]:
        """As `Engine.run`: whoever waits drives all engines in turn, so that each has a launch ahead."""
        arrived: Arrived = queue.SimpleQueue()

        def drive() -> None:
            for engine in self.engines:
                engine.step()

        for index, sequence in enumerate(sequences):
            self._choose(sequence).add(sequence, numbered(index, arrived))
        try:
            yield from drained(arrived, lambda: self._have_ended(sequences), lambda: self.alive, drive)
        finally:
            for sequence in sequences:
                self.cancel(sequence)

    def warm_up(self, on_program: Callable[[str], object] = lambda name: None) -> None:
        """As `Engine.warm_up`, of each: a program is compiled for the devices that it runs on."""

        def told(group: int, name: str) -> None:
            on_program(f"{name} (group {group})")

        for number, engine in enumerate(self.engines, 1):
            engine.warm_up(functools.partial(told, number))

    def start(self, max_queue: int | None = None) -> None:
        """Runs each engine in a thread of its own; `max_queue` is of all together."""
        share = None if max_queue is None else -(-max_queue // len(self.engines))
        for engine in self.engines:
            engine.start(share)

    def stop(self) -> None:
        """Ends the threads; what is in flight ends as cancelled."""
        for engine in self.engines:
            engine.stop()

    def submit(self, sequence: Request, deliver: Deliver) -> None:
        """As `Engine.submit`."""
        self._choose(sequence).submit(sequence, deliver)

    def cancel(self, sequence: Request) -> None:
        """As `Engine.cancel`."""
        self._homes.get(sequence, self.engines[0]).cancel(sequence)

    def stats(self) -> EngineStats:
        """Counters and gauges of all together."""
        each = [engine.stats() for engine in self.engines]
        names = [field.name for field in dataclasses.fields(EngineStats)]
        return EngineStats(
            **{name: functools.reduce(operator.add, (getattr(one, name) for one in each)) for name in names}
        )

    def logits(self, ids: Sequence[int], chunk: int | None = None) -> np.ndarray:
        """As `Engine.logits`, by the first."""
        return self.engines[0].logits(ids, chunk)

    def score(self, ids: Sequence[int]) -> np.ndarray:
        """As `Engine.score`, by the first."""
        return self.engines[0].score(ids)

    def _choose(self, sequence: Request) -> Engine:
        home = self._homes[sequence] = least_loaded(self.engines)
        return home

    def _have_ended(self, sequences: Sequence[Request]) -> bool:
        return all(
            engine.have_ended([one for one in sequences if self._homes[one] is engine]) for engine in self.engines
        )


def least_loaded(engines: Sequence[Engine]) -> Engine:
    """The engine with the fewest requests; of those the one whose requests hold the fewest pages, or the first."""
    return min(engines, key=lambda engine: (engine.load, engine.pages_in_use))


def share_of(config: EngineConfig, groups: int) -> EngineConfig:
    """What each of so many engines has of the seats and the pages; a page pool holds one request of any length."""
    seats = -(-config.max_batch // groups)
    return dataclasses.replace(
        config,
        batch_buckets=(*(bucket for bucket in config.batch_buckets if bucket < seats), seats),
        cache_tokens=max(config.max_context, -(-config.cache_tokens // groups)),
    )
