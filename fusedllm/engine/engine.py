"""`Engine`: requests in, tokens out. Whoever waits drives it, or a thread of its own."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from fusedllm.config import SamplingParams
from fusedllm.engine.arrivals import Arrived, Deliver, drained, numbered
from fusedllm.engine.flights import Flights
from fusedllm.engine.lockstep import Lockstep
from fusedllm.engine.request import Chunk, Constraint, FinishReason
from fusedllm.engine.request import Sequence as Request
from fusedllm.engine.runner import Runner
from fusedllm.engine.scheduler import SCORED_CHUNK, Scheduler
from fusedllm.engine.stats import EngineStats
from fusedllm.errors import ContextLengthError, EngineStoppedError, QueueFullError, RequestError
from fusedllm.sharding.processes import shared_number

logger = logging.getLogger(__name__)

# One launch runs, one is queued behind it.
LAUNCHES_AHEAD = 1

# Far from where the arithmetic of waiting times ends.
MAX_PRIORITY = 1_000_000


class Engine:
    """Runs requests on a `Runner`, as many at a time as have seats and pages.

    Any number of `run` iterators may be open at once, each of which drives the engine while it waits. After `start` a
    thread does, and `submit` takes requests from any thread.
    """

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.config = runner.engine
        self.failed_steps = 0
        self._lockstep = Lockstep(shared_number()) if runner.lockstep else None
        self._scheduler = Scheduler(self.config)
        self._flights = Flights(runner, self._scheduler, self._delivered)
        self._deliver: dict[Request, Deliver] = {}
        self._lock = threading.RLock()
        # What other threads ask for, until the next step takes it; and what wakes the thread.
        self._inbox: list[tuple[Request, Deliver]] = []
        self._cancelled: list[Request] = []
        # Of those that were taken out of the inbox, how many the scheduler does not know of yet.
        self._entering = 0
        self._arrived = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._max_queue: int | None = None
        # Whether the device state was lost and could not be made anew.
        self._broken = False

    @property
    def pages_in_use(self) -> int:
        """Pages of the KV cache that requests hold."""
        return self._scheduler.pages.in_use

    def prepare(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams,
        *,
        priority: int = 0,
        deadline: float | None = None,
        cache_salt: str = "",
        constraint: Constraint | None = None,
        prompt_logprobs: int | None = None,
    ) -> Request:
        """A validated request, ready for `run` or `submit`. `max_tokens` is cut to what the context leaves.

        The options are attributes of `fusedllm.engine.request.Sequence`.

        Raises:
          RequestError: an empty prompt, an id outside the vocabulary, or an option out of range.
          ContextLengthError: a prompt that leaves no room for a token.
        """
        model = self.runner.config
        self._check_ids(prompt)
        if len(prompt) >= self.config.max_context:
            raise ContextLengthError(
                f"the prompt has {len(prompt)} tokens, the context holds {self.config.max_context} with at least one "
                f"of them for the answer; shorten it or raise max_context (the model allows {model.max_position})."
            )
        for name, tokens in (("logit_bias", sampling.logit_bias), ("stop_token_ids", sampling.stop_token_ids)):
            for token in tokens:
                if not 0 <= token < model.vocab_size:
                    raise RequestError(f"{name} names token {token}, the vocabulary has {model.vocab_size}.")
        if not isinstance(priority, int) or abs(priority) > MAX_PRIORITY:
            raise RequestError(f"priority must be an integer of at most {MAX_PRIORITY} either way, got {priority!r}.")
        if prompt_logprobs is not None and not 0 <= prompt_logprobs <= SamplingParams.MAX_LOGPROBS:
            raise RequestError(
                f"prompt_logprobs must be from 0 to {SamplingParams.MAX_LOGPROBS}, got {prompt_logprobs!r}."
            )
        stop_ids = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else set(model.eos_token_ids))
        request = Request(
            prompt=tuple(prompt),
            sampling=sampling,
            stop_ids=frozenset(stop_ids),
            budget=min(sampling.max_tokens, self.config.max_context - len(prompt)),
            priority=priority,
            deadline=deadline,
            cache_salt=cache_salt,
            constraint=constraint,
            prompt_logprobs=prompt_logprobs,
        )
        if self._lockstep is not None:
            self._lockstep.settle(request)
        return request

    def run(self, sequences: Sequence[Request]) -> Iterator[tuple[int, Chunk]]:
        """Yields `(index into sequences, chunk)` as tokens arrive. Closing the iterator cancels what is unfinished."""
        arrived: Arrived = queue.SimpleQueue()

        def drive() -> None:
            with self._lock:
                if arrived.empty():
                    self._step()

        for index, sequence in enumerate(sequences):
            self.add(sequence, numbered(index, arrived))
        try:
            yield from drained(arrived, lambda: self.have_ended(sequences), lambda: self.alive, drive)
        finally:
            for sequence in sequences:
                self.cancel(sequence)

    def warm_up(self, on_program: Callable[[str], object] = lambda name: None) -> None:
        """Compiles every program that answering needs; `on_program` hears of each before. See `Runner.warm_up`.

        Raises:
          RequestError: requests are running; their seats are what the programs would be tried on.
        """
        with self._lock:
            if self._scheduler.num_running:
                raise RequestError("requests are running; warm up before the first, or after the last has ended.")
            with self._abandoning():
                self._flights.clear()
                self.runner.warm_up(on_program)
                on_program("log-probabilities of the prompt")
                self.runner.warm_up_scores(SCORED_CHUNK)

    def start(self, max_queue: int | None = None) -> None:
        """Runs requests in a thread of its own until `stop`; `submit` needs it, and lets `max_queue` requests wait."""
        if self._lockstep is not None:
            # Requests would come to the others in another order.
            raise RequestError("a model that several processes share answers who waits for it, not in a thread.")
        if not self.alive:
            self._max_queue = max_queue
            self._stopping = False
            self._thread = threading.Thread(target=self._serve, name="fusedllm-engine", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Ends the thread; what is in flight ends as cancelled."""
        with self._arrived:
            self._stopping = True
            self._arrived.notify()
        if self._thread is not None:
            self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def submit(self, sequence: Request, deliver: Deliver) -> None:
        """Queues a request; `deliver` gets its chunks, in the engine's thread, and must not wait. Safe in any thread.

        Raises:
          QueueFullError: as many requests wait as may.
          EngineStoppedError: nobody would run it.
        """
        with self._arrived:
            if self._stopping or not self.alive:
                raise EngineStoppedError("the engine has stopped; start the server anew.")
            most = self._max_queue
            waiting = self.load - self._scheduler.num_running
            if most is not None and waiting >= most + self._free_seats:
                raise QueueFullError(f"{waiting} requests wait already, and {most} may; try again later.")
            self._inbox.append((sequence, deliver))
            self._arrived.notify()

    def cancel(self, sequence: Request) -> None:
        """Ends a request; its pages are free when the next step begins, or now if nobody steps. Safe in any thread."""
        if sequence.finish_reason is None:
            sequence.finish_reason = "cancelled"
        with self._arrived:
            self._cancelled.append(sequence)
            self._arrived.notify()
        if not self.alive or threading.current_thread() is self._thread:
            with self._lock:
                self._take_in()

    def stats(self) -> EngineStats:
        """Counters and gauges, as of now. Safe in any thread, and waits for nobody."""
        scheduler, counts = self._scheduler, self._scheduler.counts
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting + len(self._inbox),
            pages_in_use=scheduler.pages.in_use,
            pages_cached=scheduler.pages.cached,
            pages_total=self.config.num_pages - 1,
            prefix_queries=counts["prefix_queries"],
            prefix_hits=counts["prefix_hits"],
            preemptions=counts["preemptions"],
            prompt_tokens=counts["prompt_tokens"],
            generated_tokens=counts["generated_tokens"],
            finished=scheduler.finished.copy(),
            failed_steps=self.failed_steps,
        )

    def logits(self, ids: Sequence[int], chunk: int | None = None) -> np.ndarray:
        """Logits at every position, float32 `[seq, vocab]`; `chunk` sets the prefill's chunk length.

        Raises:
          RequestError: no ids, an id outside the vocabulary, a chunk below 1.
          ContextLengthError: more ids than the context holds.
        """
        if chunk is not None and chunk < 1:
            raise RequestError(f"chunk must be at least 1, got {chunk}.")
        with self._evaluating(ids) as pages:
            return self.runner.logits(ids, pages, chunk and min(chunk, self.config.max_context))

    def score(self, ids: Sequence[int]) -> np.ndarray:
        """Log-probability of each of `ids[1:]` given those before it, float32 `[seq - 1]`; raises as `logits` does."""
        with self._evaluating(ids) as pages:
            return self.runner.score(ids, pages)

    @property
    def _free_seats(self) -> int:
        return self.config.max_batch - self._scheduler.num_running

    def _serve(self) -> None:
        try:
            while not self._broken and self._sleep():
                try:
                    with self._lock:
                        self._step()
                except Exception:
                    # The requests that were part of it have ended; the others go on.
                    logger.exception("a step failed")
        finally:
            with self._lock:
                self._take_in()
                for sequence in self._scheduler.sequences():
                    self._end(sequence, "cancelled" if self._stopping else "error")
                self._flights.clear()

    def have_ended(self, sequences: Sequence[Request]) -> bool:
        """Whether all have ended, and their last chunks were delivered: the thread does one after the other."""
        # A caller may have ended one of them at a chunk that it was given before.
        if not all(sequence.finished for sequence in sequences):
            return False
        with self._lock:
            return True

    def _sleep(self) -> bool:
        """Waits until there is something to do; no once the thread is to end."""
        with self._arrived:
            while not (self._stopping or self._inbox or self._cancelled or self._scheduler.sequences()):
                self._arrived.wait()
            return not self._stopping

    def add(self, sequence: Request, deliver: Deliver) -> None:
        """Queues a request for whoever drives the engine; `deliver` gets its chunks."""
        with self._arrived:
            self._inbox.append((sequence, deliver))
            self._arrived.notify()

    def _take_in(self) -> None:
        """Does what other threads have asked for."""
        with self._arrived:
            arrived, self._inbox = self._inbox, []
            self._entering = len(arrived)
            cancelled, self._cancelled = self._cancelled, []
        for sequence, deliver in arrived:
            if not sequence.finished:
                self._deliver[sequence] = deliver
                if not self._scheduler.add(sequence):
                    self._delivered(sequence, Chunk((), (), sequence.finish_reason))
            self._entering -= 1
        for sequence in cancelled:
            self._end(sequence, "cancelled")
        for sequence in self._scheduler.overdue(time.perf_counter()):
            self._end(sequence, "deadline")

    def _end(self, sequence: Request, reason: FinishReason) -> None:
        """Ends a request for a reason outside of it; who waits for it hears of that, unless it was they."""
        told = sequence.finished
        self._scheduler.end(sequence, reason)
        if told:
            self._deliver.pop(sequence, None)
        else:
            self._delivered(sequence, Chunk((), (), reason))

    def _delivered(self, sequence: Request, chunk: Chunk) -> None:
        deliver = self._deliver.pop(sequence, None) if sequence.finished else self._deliver.get(sequence)
        if deliver is None:
            return
        try:
            deliver(chunk)
        except Exception:
            # Whoever fails to take theirs must not end the step, which others are part of.
            logger.exception("a request's tokens could not be delivered")
            if not sequence.finished:
                self._scheduler.end(sequence, "cancelled")
                self._deliver.pop(sequence, None)

    def step(self) -> None:
        """Launches what comes next, and reads what was launched before; for who drives several engines."""
        with self._lock:
            self._step()

    @property
    def load(self) -> int:
        """Requests that have not ended."""
        return self._scheduler.num_running + self._scheduler.num_waiting + self._entering + len(self._inbox)

    def _step(self) -> None:
        """Launches what comes next, and reads what was launched before."""
        with self._abandoning():
            self._take_in()
            decoding = self._scheduler.num_decoding
            if self._scheduler.constrained:
                self._read_all()
            elif decoding and len(self._flights) and not self.runner.has_decoded(decoding, self._scheduler.sampler):
                # Its program is yet to be made: those who have their first token should not wait for that.
                self._read_all()
                return
            plan = self._scheduler.plan(self._flights.steps, self._flights.budget)
            if plan is not None:
                self._flights.launch(plan)
            while len(self._flights) > (LAUNCHES_AHEAD if plan is not None else 0):
                self._flights.read()

    def _read_all(self) -> None:
        while len(self._flights):
            self._flights.read()

    @contextlib.contextmanager
    def _abandoning(self) -> Iterator[None]:
        """After a failed or interrupted launch nothing on the device is trusted: every request that ran ends."""
        try:
            yield
        except BaseException as error:
            failed = isinstance(error, Exception)
            self.failed_steps += failed
            self._flights.clear()
            # Where nobody ran, it is the planning that fails, and would fail again.
            for sequence in self._scheduler.sequences(running=True) or self._scheduler.sequences():
                self._end(sequence, "error" if failed else "cancelled")
            self._scheduler.pages.forget()
            self._broken = True
            self.runner.recover()
            self._broken = False
            raise

    @contextlib.contextmanager
    def _evaluating(self, ids: Sequence[int]) -> Iterator[tuple[int, ...]]:
        """The pages for `ids`, while nobody else launches."""
        self._check_ids(ids)
        if len(ids) > self.config.max_context:
            raise ContextLengthError(f"{len(ids)} tokens were given, the context holds {self.config.max_context}.")
        needed = -(-len(ids) // self.config.page_size)
        with self._lock:
            if needed > self._scheduler.pages.free:
                raise RequestError(
                    f"{len(ids)} tokens need {needed} pages of the KV cache, and running requests leave "
                    f"{self._scheduler.pages.free}; let them end first, or load the model with more cache_tokens."
                )
            pages = self._scheduler.pages.take(needed)
            try:
                with self._abandoning():
                    yield pages
            finally:
                self._scheduler.pages.give_back(pages)

    def _check_ids(self, ids: Sequence[int]) -> None:
        vocab = self.runner.config.vocab_size
        if len(ids) == 0:
            raise RequestError("the prompt is empty; give at least one token.")
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, (int, np.integer)) or not 0 <= token < vocab:
                raise RequestError(f"token ids must be integers from 0 to {vocab - 1}, got {token!r}.")
