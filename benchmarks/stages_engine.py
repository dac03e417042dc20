"""The rooms of `stages.py`, each a way to make the tokens of one request: all that it knows of the engine is here.

Every stage's `run` makes so many tokens after the same prompt and says what it took; a stage begins with what the one
before it does and adds a room.
"""

from __future__ import annotations

import queue
import time
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

import fusedllm
from fusedllm.config import Sampler
from fusedllm.engine.flights import Flights
from fusedllm.engine.request import Chunk
from fusedllm.engine.runner import orders
from fusedllm.engine.scheduler import Scheduler


@dataclass(frozen=True)
class Run:
    """One run of a stage: tokens and seconds of its decode, and its launches with the bytes that crossed for them."""

    tokens: int
    seconds: float
    launches: int
    to_device: int
    to_host: int

    def figures(self) -> dict[str, float]:
        """What is compared, each a number for one token but the speed."""
        return {
            "speed": self.tokens / self.seconds,
            "seconds": self.seconds / self.tokens,
            "launch_tokens": self.tokens / max(self.launches, 1),
            "to_device": self.to_device / self.tokens,
            "to_host": self.to_host / self.tokens,
        }


class Rooms:
    """Stages 0 to 4 on one loaded model.

    Decoding is timed from the first token to the last. The requests share no pages, so that each run prefills its
    prompt before the clock starts, and launches are as long as the engine makes them on this machine.
    """

    def __init__(self, ckpt: str, prompt: int, tokens: int, threads: int) -> None:
        engine = fusedllm.EngineConfig(
            max_context=prompt + tokens + 64, cache_tokens=2 * (prompt + tokens + 64), prefix_cache=False
        )
        self.llm = fusedllm.load(ckpt, engine=engine, threads=threads)
        self.ids = np.random.RandomState(prompt).randint(0, self.llm.config.vocab_size, prompt).tolist()
        self.tokens = tokens
        self._runner = self.llm.engine.runner
        self._steps = engine.decode_steps
        self._prompt = (0, 0, 0)
        self.llm.warm_up()

    def settle(self) -> None:
        """Learns what crosses for a prompt alone, and how long launches are here.

        Stages 0 and 1, which have no engine to decide the latter, take it over.
        """
        before = _traffic(self._runner)
        list(self.llm.engine.run([self._prepare(answer=1)]))
        self._prompt = _since(self._runner, before)
        arrivals: list[tuple[float, int]] = []
        for _, chunk in self.llm.engine.run([self._prepare()]):
            _arrive(arrivals, chunk)
        self._steps = max(tokens for _, tokens in arrivals)

    def program(self) -> Run:
        """0: the compiled decode program, launched in a loop that nobody reads."""
        runner, order = self._runner, self._seat_by_hand()
        launches = self.tokens // self._steps
        arguments = (order, np.int32(self._steps), runner._all_allowed[1])
        params, cache, seats, outputs = runner._params, runner._cache, runner._seats, None
        jax.block_until_ready((cache, seats))
        began = time.perf_counter()
        for _ in range(launches):
            cache, seats, outputs = runner._decode[Sampler.FULL](params, cache, seats, *arguments)
        jax.block_until_ready(outputs)
        took = time.perf_counter() - began
        # The runner's own were donated.
        runner._cache, runner._seats = cache, seats
        sent = launches * sum(part.nbytes for part in arguments[:2])
        return Run(launches * self._steps, took, launches, sent, 0)

    def runner(self) -> Run:
        """1: the runner launches, one ahead of what it fetches."""
        runner, order = self._runner, self._seat_by_hand()
        launches = self.tokens // self._steps
        before = _traffic(runner)
        began = time.perf_counter()
        made, flying = 0, runner.decode(order, self._steps)
        for launch in range(launches):
            ahead = runner.decode(order, self._steps) if launch + 1 < launches else None
            made += int((runner.fetch(flying, logprobs=False)[0] >= 0).sum())
            flying = ahead
        took = time.perf_counter() - began
        return Run(made, took, *_since(runner, before))

    def scheduler(self) -> Run:
        """2: the scheduler plans, and flights of launches are read into chunks."""
        scheduler = Scheduler(self.llm.engine.config)
        arrivals: list[tuple[float, int]] = []
        flights = Flights(self._runner, scheduler, lambda _, chunk: _arrive(arrivals, chunk))
        flights._step_seconds = self.llm.engine._flights._step_seconds
        sequence = self._prepare()
        scheduler.add(sequence)
        before = _traffic(self._runner)
        while not sequence.finished:
            plan = scheduler.plan(flights.steps)
            if plan is not None:
                flights.launch(plan)
            while len(flights) > (1 if plan is not None else 0):
                flights.read()
        while len(flights):
            flights.read()
        return self._of(arrivals, before)

    def engine(self) -> Run:
        """3: the engine in a thread of its own, with the chunks in a queue."""
        engine = self.llm.engine
        engine.start()
        arrivals: list[tuple[float, int]] = []
        chunks: queue.SimpleQueue[Chunk] = queue.SimpleQueue()
        before = _traffic(self._runner)
        engine.submit(self._prepare(), chunks.put)
        while True:
            chunk = chunks.get()
            _arrive(arrivals, chunk)
            if chunk.finish_reason:
                break
        engine.stop()
        return self._of(arrivals, before)

    def stream(self) -> Run:
        """4: `LLM.stream`, which makes text of them."""
        stream = self.llm.stream(self.ids, self._sampling(self.tokens + 1))
        before, arrivals, seen = _traffic(self._runner), [], 0
        for _ in stream:
            arrivals.append((time.perf_counter(), len(stream.token_ids) - seen))
            seen = len(stream.token_ids)
        return self._of(arrivals, before)

    def _sampling(self, answer: int) -> fusedllm.SamplingParams:
        return fusedllm.SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True)

    def _prepare(self, answer: int | None = None) -> Any:
        """A request for the first token, which the prefill draws, and those that are timed."""
        return self.llm.engine.prepare(self.ids, self._sampling(answer or self.tokens + 1))

    def _seat_by_hand(self) -> np.ndarray:
        """The orders of launches for a request in seat 0, prefilled, with all its pages. Nobody else runs meanwhile."""
        runner, config = self._runner, self._runner.engine
        sequence = self._prepare()
        sequence.budget = 2**30  # The clock ends it.
        pages = list(range(1, -(-(len(self.ids) + self.tokens + 1) // config.page_size) + 1))
        bucket = next(bucket for bucket in config.prefill_buckets if bucket >= len(self.ids))
        hidden, _ = runner.prefill(self.ids, 0, bucket, pages)
        runner.fetch(runner.admit(0, sequence, self.ids, pages, hidden), logprobs=False)
        return orders(config, [(0, len(pages), ())])

    def _of(self, arrivals: list[tuple[float, int]], before: tuple[int, int, int]) -> Run:
        """From the first tokens on; what the prompt sends and launches is left out."""
        (began, first), (ended, _) = arrivals[0], arrivals[-1]
        made = sum(tokens for _, tokens in arrivals)
        crossed = (all_ - prompt for all_, prompt in zip(_since(self._runner, before), self._prompt, strict=True))
        return Run(made - first, ended - began, *crossed)


def _arrive(arrivals: list[tuple[float, int]], chunk: Chunk) -> None:
    if chunk.tokens:
        arrivals.append((time.perf_counter(), len(chunk.tokens)))


def _traffic(runner: Any) -> tuple[int, int, int]:
    traffic = runner.traffic
    return traffic.launches, traffic.bytes_to_device, traffic.bytes_to_host


def _since(runner: Any, before: tuple[int, int, int]) -> tuple[int, int, int]:
    launches, to_device, to_host = (now - then for now, then in zip(_traffic(runner), before, strict=True))
    return launches, to_device, to_host
