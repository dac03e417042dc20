"""`Engine`: the loop from requests to tokens. Requests take turns in slots; launches run ahead of what is read."""

from __future__ import annotations

import collections
import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from fusedllm.config import SamplingParams
from fusedllm.engine import request as engine_request
from fusedllm.engine.pages import PagePool
from fusedllm.engine.programs import NO_TOKEN, StepOutputs
from fusedllm.engine.request import Chunk, TokenLogprob
from fusedllm.engine.runner import Runner
from fusedllm.engine.stats import EngineStats
from fusedllm.errors import ContextLengthError, EngineStoppedError, RequestError
from fusedllm.model.sampling import Logprobs

# Steps of the first decode launch, before the time of one step is known.
FIRST_STEPS = 4

# Takes a request's chunks as they come.
Deliver = Callable[[Chunk], None]

# One launch runs, one is queued behind it.
LAUNCHES_AHEAD = 1


class _Launch:
    """A launch whose tokens have not been read, with who sat in which slot when it was launched."""

    def __init__(self, outputs: StepOutputs, seats: Sequence[engine_request.Sequence | None]) -> None:
        self.outputs = outputs
        self.seats = tuple(seats)


class Engine:
    """Runs requests on a `Runner`, several at a time, in the order they came.

    Any number of `run` iterators may be open at once. The number of slots is chosen when the first of them starts; a
    request that finds all of them taken waits for one.
    """

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.config = runner.engine
        self._pool = PagePool(self.config.num_pages)
        self._waiting: collections.deque[engine_request.Sequence] = collections.deque()
        self._seats: list[engine_request.Sequence | None] = []
        self._launches: collections.deque[_Launch] = collections.deque()
        self._chunks: dict[engine_request.Sequence, list[Chunk]] = {}
        self._deliver: dict[engine_request.Sequence, Deliver] = {}
        self._inbox: list[tuple[engine_request.Sequence, Deliver]] = []
        self._arrived = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._step_seconds: float | None = None
        self._last_read = 0.0
        self._lock = threading.RLock()

    @property
    def pages_in_use(self) -> int:
        """Pages of the KV cache that requests hold."""
        return self._pool.in_use

    @property
    def slots(self) -> int:
        """How many requests decode together in the latest launches; 0 before the first."""
        return len(self._seats)

    def start(self) -> None:
        """Runs requests in a thread of its own until `stop`; `submit` needs it."""
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

    def submit(self, sequence: engine_request.Sequence, deliver: Deliver) -> None:
        """Queues a request; `deliver` gets its chunks, in the engine's thread, and must not wait. Safe in any thread.

        Raises:
          QueueFullError: as many requests wait as may.
          EngineStoppedError: nobody would run it.
        """
        with self._arrived:
            if self._stopping or not self.alive:
                raise EngineStoppedError("the engine has stopped.")
            self._inbox.append((sequence, deliver))
            self._arrived.notify()

    def stats(self) -> EngineStats:
        """Counters and gauges, as of now."""
        running = sum(seat is not None for seat in self._seats)
        return EngineStats(
            num_running=running,
            num_waiting=len(self._waiting) + len(self._inbox),
            pages_in_use=self._pool.in_use,
            pages_total=self.config.num_pages - 1,
        )

    def _serve(self) -> None:
        while True:
            with self._arrived:
                while not self._inbox and not self._deliver and not self._stopping:
                    self._arrived.wait()
                if self._stopping:
                    return
                arrived, self._inbox = self._inbox, []
            with self._lock:
                for sequence, deliver in arrived:
                    self._deliver[sequence] = deliver
                    self._waiting.append(sequence)
                self._step()
                for sequence in [s for s in self._deliver if s.finished]:
                    del self._deliver[sequence]

    def prepare(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams,
        *,
        priority: int = 0,
        deadline: float | None = None,
        cache_salt: str = "",
        constraint: engine_request.Constraint | None = None,
        prompt_logprobs: int | None = None,
    ) -> engine_request.Sequence:
        """A validated request, ready for `run` or `submit`. `max_tokens` is cut to what the context leaves.

        The options are attributes of `Sequence`.

        Raises:
          RequestError: an empty prompt, or an id outside the vocabulary.
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
        stop_ids = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else set(model.eos_token_ids))
        return engine_request.Sequence(
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

    def run(self, sequences: Sequence[engine_request.Sequence]) -> Iterator[tuple[int, Chunk]]:
        """Yields `(index into sequences, chunk)` as tokens arrive. Closing the iterator cancels what is unfinished."""
        with self._lock:
            for sequence in sequences:
                self._chunks[sequence] = []
                self._waiting.append(sequence)
        unfinished = list(range(len(sequences)))
        try:
            while unfinished:
                with self._lock:
                    arrived = [(index, chunk) for index in unfinished for chunk in self._collect(sequences[index])]
                    # A caller may have ended one of them at a chunk that it was given before.
                    unfinished = [index for index in unfinished if not sequences[index].finished]
                    if not arrived and unfinished:
                        self._step()
                yield from arrived
        finally:
            for sequence in sequences:
                self.cancel(sequence)
                self._chunks.pop(sequence, None)

    def warm_up(self, on_program: Callable[[str], object] = lambda name: None) -> None:
        """Compiles every program that answering needs; `on_program` hears of each before. See `Runner.warm_up`.

        Raises:
          RequestError: requests are running; their slots are what the programs would be tried on.
        """
        with self._lock:
            if any(self._seats):
                raise RequestError("requests are running; warm up before the first, or after the last has ended.")
            with self._abandoning():
                self._launches.clear()
                self.runner.warm_up(on_program)

    def cancel(self, sequence: engine_request.Sequence) -> None:
        """Ends a request now; its pages are free at once (later launches write to them only what they own)."""
        with self._lock:
            if not sequence.finished:
                sequence.finish_reason = "cancelled"
            self._retire(sequence)

    def logits(self, ids: Sequence[int], chunk: int | None = None) -> np.ndarray:
        """Logits at every position, float32 `[seq, vocab]`; `chunk` sets the prefill's chunk length.

        Raises:
          RequestError: no ids, an id outside the vocabulary, a chunk below 1.
          ContextLengthError: more ids than the context holds.
        """
        if chunk is not None and chunk < 1:
            raise RequestError(f"chunk must be at least 1, got {chunk}.")
        with self._lock:
            pages = self._pages_for(ids)
            try:
                with self._abandoning():
                    return self.runner.logits(ids, pages, chunk and min(chunk, self.config.max_context))
            finally:
                self._pool.give_back(pages)

    def score(self, ids: Sequence[int]) -> np.ndarray:
        """Log-probability of each of `ids[1:]` given those before it, float32 `[seq - 1]`; raises as `logits` does."""
        with self._lock:
            pages = self._pages_for(ids)
            try:
                with self._abandoning():
                    return self.runner.score(ids, pages)
            finally:
                self._pool.give_back(pages)

    def _collect(self, sequence: engine_request.Sequence) -> list[Chunk]:
        chunks, self._chunks[sequence] = self._chunks[sequence], []
        return chunks

    def _step(self) -> None:
        """Admits who fits, launches the next tokens, and reads what was launched before."""
        with self._abandoning():
            self._admit()
            if any(self._seats):
                if not self.runner.has_decoded(len(self._seats)):
                    # Its program is yet to be made: those who have their first token should not wait for that.
                    while self._launches:
                        self._read(self._launches.popleft())
                    if any(self._chunks.values()):
                        return
                self._launch_decode()
            while len(self._launches) > (LAUNCHES_AHEAD if any(self._seats) else 0):
                self._read(self._launches.popleft())

    def _admit(self) -> None:
        if not any(self._seats) and self._waiting:
            self._seats = [None] * self.config.batch_bucket(len(self._waiting))
        while self._waiting and None in self._seats:
            sequence = self._waiting[0]
            needed = -(-(len(sequence.prompt) + sequence.budget) // self.config.page_size)
            if needed > self._pool.free:
                break
            self._waiting.popleft()
            sequence.pages = self._pool.take(needed)
            slot = self._seats.index(None)
            self._seats[slot] = sequence
            sequence.timings.prefill_started = time.perf_counter()
            compiled = self.runner.compile_seconds
            hidden = self.runner.prefill(sequence.prompt, sequence.pages)
            outputs = self.runner.admit(len(self._seats), slot, sequence, hidden)
            sequence.timings.compile_seconds = self.runner.compile_seconds - compiled
            self._launches.append(_Launch(outputs, [sequence]))

    def _launch_decode(self) -> None:
        steps = FIRST_STEPS
        if self._step_seconds:
            steps = round(self.config.latency_seconds / self._step_seconds)
        keep = [seat is not None for seat in self._seats]
        steps = max(1, min(steps, self.config.decode_steps))
        self._launches.append(_Launch(self.runner.decode(len(self._seats), keep, steps), self._seats))

    def _read(self, launch: _Launch) -> None:
        wants = [seat for seat in launch.seats if seat and seat.sampling.logprobs is not None and not seat.finished]
        tokens, logprobs = self.runner.fetch(launch.outputs, logprobs=bool(wants))
        self._measure(tokens)
        for slot, sequence in enumerate(launch.seats):
            made = tokens[:, slot] != NO_TOKEN
            if sequence is None or sequence.finished or not made.any():
                continue
            ids = tuple(int(token) for token in tokens[made, slot])
            details = _token_logprobs(sequence, ids, logprobs, made, slot)
            chunk = sequence.accept(ids, details)
            if sequence in self._chunks:
                self._chunks[sequence].append(chunk)
            if sequence in self._deliver:
                self._deliver[sequence](chunk)
            if sequence.finished:
                self._retire(sequence)

    def _measure(self, tokens: np.ndarray) -> None:
        """Keeps a running estimate of one decode step's time, from the time between two reads."""
        now = time.perf_counter()
        steps = int((tokens != NO_TOKEN).any(axis=1).sum())
        if tokens.shape[0] > 1 and steps:
            seconds = (now - self._last_read) / steps
            self._step_seconds = min(seconds, 2 * (self._step_seconds or seconds))
        self._last_read = now

    def _retire(self, sequence: engine_request.Sequence) -> None:
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        if sequence in self._seats:
            self._seats[self._seats.index(sequence)] = None
        if sequence.pages:
            self._pool.give_back(sequence.pages)
            sequence.pages = ()

    @contextlib.contextmanager
    def _abandoning(self) -> Iterator[None]:
        """After a failed or interrupted launch nothing on the device is trusted: every request in flight ends."""
        try:
            yield
        except BaseException:
            for sequence in [*self._waiting, *filter(None, self._seats)]:
                self.cancel(sequence)
            self._launches.clear()
            self.runner.recover()
            raise

    def _pages_for(self, ids: Sequence[int]) -> tuple[int, ...]:
        self._check_ids(ids)
        if len(ids) > self.config.max_context:
            raise ContextLengthError(f"{len(ids)} tokens were given, the context holds {self.config.max_context}.")
        needed = -(-len(ids) // self.config.page_size)
        if needed > self._pool.free:
            raise RequestError(
                f"{len(ids)} tokens need {needed} pages of the KV cache, and running requests leave {self._pool.free}; "
                "let them end first, or load the model with more cache_tokens."
            )
        return self._pool.take(needed)

    def _check_ids(self, ids: Sequence[int]) -> None:
        vocab = self.runner.config.vocab_size
        if len(ids) == 0:
            raise RequestError("the prompt is empty; give at least one token.")
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, (int, np.integer)) or not 0 <= token < vocab:
                raise RequestError(f"token ids must be integers from 0 to {vocab - 1}, got {token!r}.")


def _token_logprobs(
    sequence: engine_request.Sequence, ids: Sequence[int], logprobs: Logprobs | None, made: np.ndarray, slot: int
) -> tuple[TokenLogprob, ...]:
    count = sequence.sampling.logprobs
    if count is None or logprobs is None:
        return ()
    chosen = logprobs.chosen[made, slot]
    top_ids = logprobs.top_ids[made, slot, :count]
    top = logprobs.top[made, slot, :count]
    return tuple(
        TokenLogprob(token, float(own), tuple((int(i), float(p)) for i, p in zip(others, values, strict=True)))
        for token, own, others, values in zip(ids, chosen, top_ids, top, strict=True)
    )
