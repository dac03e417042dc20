"""`Session`: the bridge between one HTTP request, in asyncio, and its streams, in the engine's thread."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from fusedllm.engine.request import Chunk, FinishReason, TokenLogprob
from fusedllm.serve.errors import RETRY_AFTER, SERVER, UNAVAILABLE, APIError, bad_request, internal_error
from fusedllm.serve.state import ServerState
from fusedllm.stream import Stream

# The engine ends a request at its deadline; if it is stuck in a launch for this much longer, in seconds, we do.
DEADLINE_GRACE = 1.0

# How often a waiting session looks whether the engine is still there, in seconds.
WATCH_SECONDS = 1.0

# Ends of a stream that are no answer.
FAILURES: dict[FinishReason, Callable[[], APIError]] = {
    "deadline": lambda: APIError(504, "the request was not answered in time.", SERVER, "timeout"),
    "error": internal_error,
    "cancelled": lambda: APIError(
        503, "the server stopped before this request was answered.", UNAVAILABLE, "engine_stopped", headers=RETRY_AFTER
    ),
}

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


@dataclass(frozen=True, slots=True)
class Piece:
    """What one launch made for one stream.

    Attributes:
      index: of the stream in its session.
      text: what can be shown now; empty while a character or a stop string may still be completed.
      logprobs: of the tokens that were made, where asked for.
      prompt_logprobs: of the prompt, with the first piece, where asked for.
      finish_reason: `stop` or `length` with the last piece of a stream.
    """

    index: int
    text: str
    logprobs: tuple[TokenLogprob, ...]
    prompt_logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None


class Session:
    """Streams that are answered together, read as lists of pieces: all that arrived since the last look.

    Use it as a context manager: leaving it, for whatever reason, frees the pages of what is unfinished. Everything
    but the engine's deliveries happens in the event loop's thread.

    Attributes:
      streams: as given.
      disconnected: whether the client left; `next` has nothing more then.
    """

    def __init__(self, state: ServerState, streams: Sequence[Stream]) -> None:
        self.streams = tuple(streams)
        self.disconnected = False
        self._state = state
        self._arrived: list[tuple[int, Chunk]] = []
        self._unfinished = set(range(len(self.streams)))
        self._failure: Exception | None = None
        self._reason_of_failure: FinishReason = "cancelled"
        self._wake = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._watch: asyncio.TimerHandle | None = None
        self._started = time.perf_counter()
        self._last_seen: list[float | None] = [None] * len(self.streams)
        self._logprobs_given = [0] * len(self.streams)

    def __enter__(self) -> Session:
        """Hands every stream to the engine, or none.

        Raises:
          QueueFullError: the queue has no place for all of them.
          EngineStoppedError: nobody is admitted.
        """
        self._state.check_admission()
        self._state.in_flight.add(self)
        try:
            for index, stream in enumerate(self.streams):
                self._state.llm.engine.submit(stream.sequence, functools.partial(self._deliver, index))
        except BaseException:
            # Who was not admitted is no request that the metrics should tell the end of.
            self._leave()
            raise
        self._look_after()
        return self

    def __exit__(self, *exception: object) -> None:
        unfinished = sorted(self._unfinished)
        self._leave()
        for index in unfinished:
            self._end(index, self._reason_of_failure)

    def cancel(self) -> None:
        """Ends the session with an error that tells the client so; for a server that can't wait any longer."""
        self._fail("cancelled")

    async def next(self) -> list[Piece]:
        """What has arrived, at least one piece; nothing once every stream is finished or the client has left.

        Raises:
          APIError: 504 past the deadline, 500 where the engine failed, 503 where it was stopped.
        """
        while self._unfinished and not self.disconnected:
            arrived, self._arrived = self._arrived, []
            pieces = [piece for index, chunk in arrived if (piece := self._take(index, chunk))]
            if pieces:
                return pieces
            if self._failure is not None:
                raise self._failure
            self._wake.clear()
            await self._wake.wait()
        return []

    @contextlib.contextmanager
    def watching(self, receive: Receive) -> Iterator[None]:
        """Inside, the session ends when the client leaves. `receive` is ASGI's, with the body already taken."""
        watcher = asyncio.create_task(self._wait_for_disconnect(receive))
        try:
            yield
        finally:
            watcher.cancel()

    async def _wait_for_disconnect(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.disconnected = True
        self._wake.set()

    def _deliver(self, index: int, chunk: Chunk) -> None:
        """In the engine's thread."""
        # A loop that has ended has nobody left who would read it.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._receive, index, chunk)

    def _receive(self, index: int, chunk: Chunk) -> None:
        self._arrived.append((index, chunk))
        self._wake.set()

    def _take(self, index: int, chunk: Chunk) -> Piece | None:
        # After a stop string the engine may be some tokens further.
        if index not in self._unfinished:
            return None
        if chunk.finish_reason is not None and chunk.finish_reason in FAILURES:
            error = self.streams[index].sequence.error
            # Its own fault, a grammar that can't be followed.
            self._fail(chunk.finish_reason, None if error is None else bad_request(error, "response_format"))
            return None
        stream = self.streams[index]
        text, logprobs, reason = stream.push(chunk), chunk.logprobs, None
        if stream.finished:
            # A stop string may have ended it in the middle of the chunk.
            result = stream.result
            logprobs, reason = result.logprobs[self._logprobs_given[index] :], result.finish_reason
            self._end(index, reason)
        self._logprobs_given[index] += len(logprobs)
        self._observe(index, len(chunk.tokens))
        return Piece(index, text, logprobs, chunk.prompt_logprobs, reason)

    def _observe(self, index: int, tokens: int) -> None:
        now = time.perf_counter()
        before, self._last_seen[index] = self._last_seen[index], now
        if before is None:
            self._state.metrics.observe_first_token(now - self._started)
        elif tokens:
            self._state.metrics.observe_inter_token(now - before, tokens)

    def _end(self, index: int, reason: FinishReason) -> None:
        self._unfinished.discard(index)
        usage = self.streams[index].result.usage
        seconds = time.perf_counter() - self._started
        self._state.metrics.observe_request(reason, usage.prompt_tokens, usage.completion_tokens, seconds)

    def _fail(self, reason: FinishReason, error: APIError | None = None) -> None:
        if self._failure is None:
            self._failure, self._reason_of_failure = error or FAILURES[reason](), reason
        self._wake.set()

    def _leave(self) -> None:
        """Frees what is unfinished."""
        if self._watch is not None:
            self._watch.cancel()
        for index in sorted(self._unfinished):
            self._state.llm.engine.cancel(self.streams[index].sequence)
        self._state.in_flight.discard(self)

    def _look_after(self) -> None:
        """Every second: an engine that died or hangs must not leave its clients waiting."""
        self._watch = self._loop.call_later(WATCH_SECONDS, self._look_after)
        deadline = self.streams[0].sequence.deadline
        if deadline is not None and time.perf_counter() > deadline + DEADLINE_GRACE:
            self._fail("deadline")
        elif not self._state.llm.engine.alive:
            self._fail("cancelled")
