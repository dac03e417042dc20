"""`Stream`: one answer as it is made, from the engine's chunks to pieces of text."""

from __future__ import annotations

from collections.abc import Generator, Iterator

from fusedllm.engine.engine import Engine
from fusedllm.engine.replicas import Replicas
from fusedllm.engine.request import Chunk, TokenLogprob
from fusedllm.engine.request import Sequence as EngineSequence
from fusedllm.engine.results import Completion, Usage
from fusedllm.errors import TokenizerError
from fusedllm.text.stream import TextStream
from fusedllm.text.tokenizer import Tokenizer


class Stream:
    """The pieces of one answer, as an iterator of texts; `close` cancels what has not been made yet.

    Without a tokenizer the pieces are empty, one for each launch, and `token_ids` grows.
    """

    def __init__(self, engine: Engine | Replicas, sequence: EngineSequence, tokenizer: Tokenizer | None) -> None:
        self.sequence = sequence
        self._engine = engine
        self._text = None if tokenizer is None else TextStream(tokenizer, sequence.sampling.stop)
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._finished = False
        self._pieces = self._run()
        if tokenizer is None and sequence.sampling.stop:
            raise TokenizerError("stop strings need a tokenizer, and this checkpoint has none.")

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Ends the request; `result` then has what was made so far."""
        self._pieces.close()
        self._engine.cancel(self.sequence)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The tokens so far."""
        return tuple(self._tokens)

    @property
    def finished(self) -> bool:
        """Whether the answer is complete in what was pushed; `sequence` may have ended further on, unread."""
        return self._finished

    def push(self, chunk: Chunk) -> str:
        """Takes a chunk of the engine; the text that can be shown now."""
        if self._finished:
            return ""
        shown = chunk.tokens
        ended = chunk.finish_reason
        if ended == "stop":
            # A stop token ends the text before it, be it special or not.
            shown = shown[:-1]
        piece = ""
        count = len(chunk.tokens)
        if self._text is not None:
            piece = self._text.push(shown)
            if ended and not self._text.stopped:
                piece += self._text.finish()
            if self._text.stopped:
                count = self._text.token_count - len(self._tokens)
                self.sequence.finish_reason = ended = "stop"
                self._engine.cancel(self.sequence)
        self._tokens += chunk.tokens[:count]
        self._logprobs += chunk.logprobs[:count]
        self._finished = ended is not None
        return piece

    @property
    def result(self) -> Completion:
        """The answer; before the end, what there is of it with the reason `cancelled`."""
        return Completion(
            text="" if self._text is None else self._text.text,
            token_ids=self.token_ids,
            finish_reason=self.sequence.finish_reason or "cancelled",
            logprobs=tuple(self._logprobs),
            usage=Usage(len(self.sequence.prompt), len(self._tokens)),
            timings=self.sequence.timings,
        )

    def _run(self) -> Generator[str, None, None]:
        for _, chunk in self._engine.run([self.sequence]):
            piece = self.push(chunk)
            if piece or self._text is None:
                yield piece
