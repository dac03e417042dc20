"""`Scheduler`: which requests run, in which seat, on which pages, and what the next launches compute.

Plain Python that knows no jax. Requests go in the order of their arrival, shifted by their priority. One prompt at a
time is prefilled, in chunks: while others decode at most `token_budget` tokens of it go between two of their steps, and
so few that these are no further apart than they should be.
Requests get pages as they grow; where none are left, the one that came last gives its own up and is computed again
later (preemption by recomputation, as in vLLM, arXiv:2309.06180).
"""

from __future__ import annotations

import heapq
import itertools
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fusedllm.config import Sampler
from fusedllm.engine.config import EngineConfig, split_into_chunks
from fusedllm.engine.pages import Holding, Pages
from fusedllm.engine.request import Chunk, FinishReason, Sequence, TokenLogprob
from fusedllm.errors import FusedLLMError

logger = logging.getLogger(__name__)

# A request of a priority lower by one goes before those that came up to this many seconds earlier. So whoever waits
# is overtaken for a bounded time only.
PRIORITY_SECONDS = 10.0

# Steps of a launch while somebody waits for a seat that the launch may free.
STEPS_WHILE_WAITING = 4

# Of the prompt's log-probabilities the program that makes them takes this many tokens, whatever the prompt's length.
SCORED_CHUNK = 64

# Requests that have ended and still stand in the queue that are not worth a clean-up.
SLACK = 64


@dataclass(slots=True, eq=False)
class Job:
    """A request that is waiting or running.

    Attributes:
      ids: the prompt and the tokens that are known.
      computed: positions whose K and V have been launched by prefill.
      drawn: tokens that will be there after what has been launched, unless the program ends the request before.
      seat: its row of the device's slots, from the start of its prefill.
      turn: counts preemptions, so that a launch of an earlier turn is known as such.
      mask: what may come next, of a request that follows a grammar.
      scores: log-probabilities of the prompt that were launched in this turn, as the runner made them.
    """

    sequence: Sequence
    ids: list[int]
    order: tuple[float, int]
    holding: Holding = field(default_factory=Holding)
    computed: int = 0
    drawn: int = 0
    seat: int | None = None
    decoding: bool = False
    turn: int = 0
    mask: np.ndarray | None = None
    scores: list[Any] = field(default_factory=list)

    @property
    def scored(self) -> bool:
        """Whether the prefill must make log-probabilities of the prompt."""
        return self.sequence.prompt_logprobs is not None and not self.sequence.generated


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Tokens `ids[position : position + length]` of a job; after the last of its chunks it draws a token."""

    job: Job
    position: int
    length: int
    bucket: int
    last: bool


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """A job that decodes, and the pages that it begins to use, for entries `entry, entry + 1, ...` of its table."""

    job: Job
    entry: int
    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to launch next: `steps` decode steps of all rows, then chunks of prompts in their order.

    No row asks for more than `sampler` has.
    """

    rows: tuple[DecodeRow, ...]
    steps: int
    chunks: tuple[PrefillChunk, ...]
    sampler: Sampler = Sampler.FULL


def _sampler(jobs: list[Job]) -> Sampler:
    needs = [Sampler.of(job.sequence.sampling, job.sequence.constraint is not None) for job in jobs]
    return max(needs, default=Sampler.UNFILTERED)


class Scheduler:
    """The requests of an engine. Not safe for several threads: `Engine` holds the lock."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.pages = Pages(config.num_pages, config.page_size, share=config.prefix_cache)
        self.counts: Counter[str] = Counter()
        self.finished: Counter[str] = Counter()
        self._waiting: list[tuple[tuple[float, int], Job]] = []
        self._running: list[Job] = []
        self._prefilling: Job | None = None
        # Whether the next who waits has a seat to take, but no pages.
        self._starved = False
        self._jobs: dict[Sequence, Job] = {}
        self._seats = list(range(config.max_batch - 1, -1, -1))
        self._serial = itertools.count()

    @property
    def num_running(self) -> int:
        """Requests that have a seat."""
        return len(self._running)

    @property
    def num_decoding(self) -> int:
        """Requests that have been prefilled."""
        return sum(job.decoding for job in self._running)

    @property
    def sampler(self) -> Sampler:
        """The smallest that has what all requests ask for that have been prefilled."""
        return _sampler([job for job in self._running if job.decoding])

    @property
    def num_waiting(self) -> int:
        """Requests that have none yet, or no longer."""
        return len(self._jobs) - len(self._running)

    @property
    def constrained(self) -> bool:
        """Whether a running request follows a grammar, so that its last token must be known before the next."""
        return any(job.sequence.constraint is not None for job in self._running)

    def sequences(self, *, running: bool | None = None) -> list[Sequence]:
        """All requests; only those that run, or that wait, where told so."""
        return [job.sequence for job in self._jobs.values() if running is None or (job.seat is not None) == running]

    def add(self, sequence: Sequence) -> bool:
        """Queues a request, whose prompt and budget must fit the context; no if its grammar allows nothing."""
        arrived = sequence.timings.arrived if sequence.order is None else sequence.order
        due = arrived + sequence.priority * PRIORITY_SECONDS
        job = Job(sequence, list(sequence.prompt), (due, next(self._serial)))
        if not self._constrain(job):
            self.finished["error"] += 1
            return False
        self._jobs[sequence] = job
        heapq.heappush(self._waiting, (job.order, job))
        self.counts["prompt_tokens"] += len(job.ids)
        return True

    def end(self, sequence: Sequence, reason: FinishReason) -> None:
        """Ends a request for a reason outside of it, unless it has ended; its pages and seat are free at once.

        Launches that are under way write to pages only before whoever gets them next.
        """
        if sequence.finish_reason is None:
            sequence.finish_reason = reason
        job = self._jobs.pop(sequence, None)
        if job is not None:
            self._unseat(job)
            self.finished[sequence.finish_reason] += 1
            if len(self._waiting) > 2 * self.num_waiting + SLACK:
                # They leave the queue when it is their turn, which may be far off for many who came and went.
                self._waiting = [entry for entry in self._waiting if entry[1].sequence in self._jobs]
                heapq.heapify(self._waiting)

    def overdue(self, now: float) -> list[Sequence]:
        """Requests whose deadline is over."""
        return [s for s in self._jobs if s.deadline is not None and s.deadline <= now]

    def plan(self, steps: int, budget: int | None = None) -> Plan | None:
        """What to launch next; `None` where nothing can run.

        At most `steps` decode steps, and beside them `budget` tokens of prompts, by default the `token_budget`.

        A request decodes from the plan after the one that ends its prefill.
        """
        decoding = [job for job in self._running if job.decoding and job.drawn < job.sequence.budget]
        if self._prefilling is not None or (self._waiting and self._seats and not self._starved):
            steps = 1
        elif self._waiting:
            steps = min(steps, STEPS_WHILE_WAITING)
        if any(job.sequence.constraint is not None for job in decoding):
            steps = 1
        sampler = _sampler(decoding)
        if self.config.free_steps and sampler < Sampler.FULL:
            # They are made anyway.
            steps = -(-steps // self.config.free_steps) * self.config.free_steps
        # First, as they may take pages from those that came last.
        rows = self._plan_rows(decoding, steps)
        for row in rows:
            row.job.drawn = min(row.job.drawn + steps, row.job.sequence.budget)
        largest = self.config.prefill_buckets[-1]
        chunks = tuple(self._plan_chunks(min(budget or self.config.token_budget, largest) if rows else largest))
        return Plan(rows, steps, chunks, sampler) if chunks or rows else None

    def accept(self, job: Job, turn: int, tokens: tuple[int, ...], logprobs: tuple[TokenLogprob, ...]) -> Chunk | None:
        """Takes the tokens that a launch of the job's `turn` made; `None` where the job no longer wants them."""
        sequence = job.sequence
        if sequence.finished or job.turn != turn or not tokens:
            return None
        job.ids += tokens
        self.counts["generated_tokens"] += len(tokens)
        chunk = sequence.accept(tokens, logprobs)
        if chunk.finish_reason is None and not self._constrain(job, tokens):
            chunk = replace(chunk, finish_reason=sequence.finish_reason)
        if chunk.finish_reason is not None:
            self.end(sequence, chunk.finish_reason)
        return chunk

    def _constrain(self, job: Job, tokens: tuple[int, ...] = ()) -> bool:
        """Goes on in the job's grammar; where that can't be followed further its request ends, and the answer is no."""
        constraint = job.sequence.constraint
        if constraint is None:
            return True
        try:
            for token in tokens:
                constraint.accept(token)
            job.mask = constraint.mask()
        except FusedLLMError as error:
            job.sequence.finish_reason, job.sequence.error = "error", str(error)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:
            # A grammar's library is native code, whose panics are no `Exception`. They are one request's business.
            logger.exception("a grammar failed")
            job.sequence.finish_reason = "error"
        return not job.sequence.finished

    def _plan_chunks(self, budget: int) -> Iterator[PrefillChunk]:
        """The next chunks of altogether `budget` tokens."""
        buckets = self.config.prefill_buckets
        while budget >= buckets[0]:
            job = self._prefilling = self._prefilling or self._seat_next()
            if job is None:
                return
            length, bucket = self._chunk(job, tuple(b for b in buckets if b <= budget))
            budget -= bucket
            position, job.computed = job.computed, job.computed + length
            last = job.computed == len(job.ids)
            if last:
                self.pages.publish(job.holding, job.ids, job.sequence.cache_salt)
                job.decoding = True
                job.drawn = job.sequence.generated + 1
                self._prefilling = None
            yield PrefillChunk(job, position, length, bucket, last)

    def _chunk(self, job: Job, buckets: tuple[int, ...]) -> tuple[int, int]:
        missing = len(job.ids) - job.computed
        if job.scored:
            return min(missing, SCORED_CHUNK), SCORED_CHUNK
        return split_into_chunks(missing, buckets)[0]

    def _seat_next(self) -> Job | None:
        """The request that has waited longest, with a seat and the pages of its prompt; `None` if it must wait on."""
        self._starved = False
        while self._waiting and self._waiting[0][1].sequence not in self._jobs:
            heapq.heappop(self._waiting)
        if not self._waiting or not self._seats:
            return None
        job = self._waiting[0][1]
        sequence = job.sequence
        if not job.scored:
            job.holding = self.pages.hold_prefix(job.ids, sequence.cache_salt)
        # Beside the prompt, room for the tokens to come: a page for each who runs, so that not the next step evicts.
        slack = sum(running.decoding for running in self._running)
        missing = -(-(len(job.ids) + 1) // self.config.page_size) - len(job.holding.pages)
        if (missing + slack > self.pages.free and self._running) or not self.pages.grow(job.holding, len(job.ids)):
            self.pages.release(job.holding)
            self._starved = True
            return None
        heapq.heappop(self._waiting)
        job.computed = len(job.holding.nodes) * self.config.page_size
        if not job.turn:
            sequence.cached_tokens = job.computed
            self.counts["prefix_queries"] += len(job.ids)
            self.counts["prefix_hits"] += job.computed
        job.seat = self._seats.pop()
        self._running.append(job)
        return job

    def _plan_rows(self, decoding: list[Job], steps: int) -> tuple[DecodeRow, ...]:
        """The rows that get the pages for `steps` more tokens; those that came first get them from the last."""
        rows: list[DecodeRow] = []
        for job in sorted(decoding, key=lambda job: job.order):
            if job.seat is None:
                continue
            sequence = job.sequence
            entry = len(job.holding.pages)
            # The last token that a launch draws is not in the cache yet.
            positions = len(sequence.prompt) + min(job.drawn + steps, sequence.budget) - 1
            while job.seat is not None and not self.pages.grow(job.holding, positions):
                self._preempt(max(self._running, key=lambda job: job.order))
            if job.seat is not None:
                rows.append(DecodeRow(job, entry, tuple(job.holding.pages[entry:])))
        return tuple(rows)

    def _preempt(self, job: Job) -> None:
        self.counts["preemptions"] += 1
        self._unseat(job)
        job.turn += 1
        job.computed = job.drawn = 0
        job.scores = []
        heapq.heappush(self._waiting, (job.order, job))

    def _unseat(self, job: Job) -> None:
        """Takes seat and pages; what has been computed stays in the prefix cache while nobody needs its pages."""
        if job.seat is None:
            return
        known = len(job.ids) - 1 if job.decoding else job.computed
        self.pages.publish(job.holding, job.ids[:known], job.sequence.cache_salt, last=True)
        self.pages.release(job.holding)
        self._seats.append(job.seat)
        self._running.remove(job)
        job.seat, job.decoding = None, False
        if self._prefilling is job:
            self._prefilling = None
