"""`Flights`: plans turned into launches, and launches read into chunks. One flies while the last one is read."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import jax
import numpy as np

from fusedllm.config import Sampler
from fusedllm.engine.request import Chunk, TokenLogprob
from fusedllm.engine.request import Sequence as Request
from fusedllm.engine.runner import Runner, orders
from fusedllm.engine.scheduler import Job, Plan, PrefillChunk, Scheduler
from fusedllm.engine.slots import NO_TOKEN, StepOutputs
from fusedllm.model.sampling import Logprobs

# Steps of the first decode launch, before the time of one step is known.
FIRST_STEPS = 4

# By so much a chunk's time may grow from one measurement to the next, so that a hiccup is not taken for a rule.
DRIFT = 1.1

# Takes a chunk of a request as it is read.
Deliver = Callable[[Request, Chunk], None]


@dataclass(frozen=True, slots=True)
class _Launch:
    """Tokens that have not been read, and who sat in which column of them, at which turn, when they were launched."""

    outputs: StepOutputs
    columns: tuple[tuple[Job, int], ...]
    steps: int
    # Steps between two looks at whether any of them goes on.
    together: int = 1


@dataclass(slots=True)
class _Flight:
    launches: list[_Launch] = field(default_factory=list)
    last_hidden: jax.Array | None = None
    buckets: tuple[int, ...] = ()
    launched: float = field(default_factory=time.perf_counter)


class Flights:
    """What has been launched and not been read, in order."""

    def __init__(self, runner: Runner, scheduler: Scheduler, deliver: Deliver) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._deliver = deliver
        self._flights: collections.deque[_Flight] = collections.deque()
        self._step_seconds: float | None = None
        self._chunk_seconds: dict[int, float] = {}
        self._last_read = 0.0

    def __len__(self) -> int:
        return len(self._flights)

    def clear(self) -> None:
        """Forgets everything that has not been read."""
        self._flights.clear()

    @property
    def steps(self) -> int:
        """How many decode steps a launch should have, by the time that a step takes; in step with others, the most."""
        config = self._runner.engine
        if self._runner.lockstep:
            return config.decode_steps
        if not self._step_seconds:
            return min(FIRST_STEPS, config.decode_steps)
        return max(1, min(round(config.latency_seconds / self._step_seconds), config.decode_steps))

    @property
    def budget(self) -> int:
        """How many tokens of a prompt go between two decode steps, by the time that the chunks have taken so far."""
        config = self._runner.engine
        # Beside a chunk the others make one step, or as many as a program makes without looking.
        room = config.latency_seconds - (self._step_seconds or 0.0) * (config.free_steps or 1)
        buckets = [bucket for bucket in config.prefill_buckets if bucket <= config.token_budget]
        if self._runner.lockstep:
            return buckets[-1]
        fitting = [bucket for bucket in buckets if self._estimate(bucket) <= room]
        return max(fitting, default=buckets[0])

    def _estimate(self, bucket: int) -> float:
        """Seconds of a chunk: as measured, or in proportion to the nearest that was measured."""
        if not self._chunk_seconds:
            return 0.0
        nearest = min(self._chunk_seconds, key=lambda known: abs(known - bucket))
        return self._chunk_seconds[nearest] * bucket / nearest

    def launch(self, plan: Plan) -> None:
        """Launches a plan."""
        flight = _Flight(buckets=tuple(chunk.bucket for chunk in plan.chunks))
        # Known before it is complete: what a failed launch leaves behind is cleared with all others.
        self._flights.append(flight)
        if plan.rows:
            flight.launches.append(self._launch_decode(plan))
        for chunk in plan.chunks:
            flight.last_hidden = self._launch_chunk(chunk, flight)

    def read(self) -> None:
        """Waits for the oldest flight and delivers what it made."""
        flight = self._flights.popleft()
        # It began when it was launched, or when the one before it ended.
        self._last_read = max(self._last_read, flight.launched)
        # Admissions come after their chunks: what they take is the chunks'.
        for launch in flight.launches:
            self._read(launch)
        if flight.last_hidden is not None:
            self._runner.wait(flight.last_hidden)
            self._measure_chunks(flight.buckets)

    def _launch_decode(self, plan: Plan) -> _Launch:
        rows = plan.rows
        seats = [(_seat(row.job), row.entry, row.pages) for row in rows]
        order = orders(self._runner.engine, seats)
        allowed = None
        if any(row.job.mask is not None for row in rows):
            allowed = self._runner.all_allowed(order.shape[0])
            for index, row in enumerate(rows):
                if row.job.mask is not None:
                    allowed[index] = row.job.mask
        outputs = self._runner.decode(order, plan.steps, allowed, plan.sampler)
        together = 1 if plan.sampler is Sampler.FULL else self._runner.engine.free_steps or 1
        return _Launch(outputs, tuple((row.job, row.job.turn) for row in rows), plan.steps, together)

    def _launch_chunk(self, chunk: PrefillChunk, flight: _Flight) -> jax.Array:
        job, sequence = chunk.job, chunk.job.sequence
        end = chunk.position + chunk.length
        timings, compiled = sequence.timings, self._runner.compile_seconds
        timings.prefill_started = timings.prefill_started or time.perf_counter()
        # The last token has no successor in the prompt.
        targets = (*job.ids[chunk.position + 1 : end], *job.ids[end : end + 1]) if job.scored else None
        hidden, scores = self._runner.prefill(
            job.ids[chunk.position : end], chunk.position, chunk.bucket, job.holding.pages, targets
        )
        if scores is not None and targets is not None:
            job.scores.append((scores, targets))
        if chunk.last:
            outputs = self._runner.admit(_seat(job), sequence, job.ids, job.holding.pages, hidden, job.mask)
            flight.launches.append(_Launch(outputs, ((job, job.turn),), 0))
        timings.compile_seconds += self._runner.compile_seconds - compiled
        return hidden

    def _read(self, launch: _Launch) -> None:
        wanted = [job for job, turn in launch.columns if not job.sequence.finished and job.turn == turn]
        wants_logprobs = any(job.sequence.sampling.logprobs is not None for job in wanted)
        tokens, logprobs = self._runner.fetch(launch.outputs, logprobs=wants_logprobs)
        if launch.steps:
            self._measure(tokens, launch.together)
        for column, (job, turn) in enumerate(launch.columns):
            made = tokens[:, column] != NO_TOKEN
            ids = tuple(tokens[made, column].tolist())
            details = _token_logprobs(job.sequence.sampling.logprobs, ids, logprobs, made, column)
            prompt = self._prompt_logprobs(job, turn)
            chunk = self._scheduler.accept(job, turn, ids, details)
            if chunk is not None:
                self._deliver(job.sequence, chunk if not prompt else _with_prompt(chunk, prompt))

    def _measure(self, tokens: np.ndarray, together: int) -> None:
        """Keeps a running estimate of one decode step's time, from the time between two reads."""
        now = time.perf_counter()
        # Of steps that are made together the last ones may have made no token.
        steps = -(-int((tokens != NO_TOKEN).any(axis=1).sum()) // together) * together
        if steps:
            seconds = (now - self._last_read) / steps
            self._step_seconds = min(seconds, 2 * (self._step_seconds or seconds))
        self._last_read = now

    def _measure_chunks(self, buckets: tuple[int, ...]) -> None:
        """Keeps an estimate of a chunk's time, from the last read until now; several at once tell nothing of each."""
        now = time.perf_counter()
        seconds, self._last_read = now - self._last_read, now
        if len(buckets) == 1:
            (bucket,) = buckets
            known = self._chunk_seconds.get(bucket, seconds)
            self._chunk_seconds[bucket] = min(seconds, known * DRIFT)

    def _prompt_logprobs(self, job: Job, turn: int) -> tuple[TokenLogprob, ...]:
        count = job.sequence.prompt_logprobs
        made: list[TokenLogprob] = []
        if turn == job.turn and not job.sequence.finished:
            scores, job.scores = job.scores, []
            for of_chunk, targets in scores:
                rows = np.arange(len(targets))
                made += _token_logprobs(count, targets, self._runner.to_host(of_chunk), rows, None)
        return tuple(made)


def _seat(job: Job) -> int:
    if job.seat is None:
        raise AssertionError("a job without a seat was planned")
    return job.seat


def _with_prompt(chunk: Chunk, prompt: tuple[TokenLogprob, ...]) -> Chunk:
    return Chunk(chunk.tokens, chunk.logprobs, chunk.finish_reason, prompt)


def _token_logprobs(
    count: int | None, ids: Sequence[int], logprobs: Logprobs | None, rows: np.ndarray, column: int | None
) -> tuple[TokenLogprob, ...]:
    """Those of `ids`: at `rows` of the first axis, and at `column` of the second where there is one."""
    if count is None or logprobs is None:
        return ()
    at = (rows,) if column is None else (rows, column)
    chosen, top_ids, top = (array[at] for array in (logprobs.chosen, logprobs.top_ids, logprobs.top))
    return tuple(
        TokenLogprob(token, float(own), tuple(_pairs(others[:count], values[:count])))
        for token, own, others, values in zip(ids, chosen, top_ids, top, strict=True)
    )


def _pairs(ids: np.ndarray, values: np.ndarray) -> Iterator[tuple[int, float]]:
    return zip(ids.tolist(), values.tolist(), strict=True)
