"""`TextStream`: token ids in, text that is safe to show out.

Bytes, not the library's decoder over a growing window, are what a stream keeps: the cost of a token is the same at
every length, and a sequence of bytes that never becomes a character can't hold the text behind it back.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from fusedllm.errors import RequestError
from fusedllm.text.tokenizer import Tokenizer


class TextStream:
    """Incremental `Tokenizer.decode` that ends at a stop string.

    The pieces that `push` and `finish` return, put together, are `tokenizer.decode` of all ids, cut before the stop
    string that is complete first; of two that end at the same character, the longer.

    Args:
      tokenizer: whose ids will be pushed.
      stop: texts at which the stream ends; they are not part of the output. One text counts as a sequence of one.
      skip_special_tokens: as in `Tokenizer.decode`.

    Attributes:
      stopped: the stop string that ended the stream, or `None`.
      token_count: how many ids were taken in, up to and with the one that completed the stop string.

    Raises:
      RequestError: an empty stop string, or one that is not a text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), skip_special_tokens: bool = True):
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(isinstance(text, str) and text for text in stop):
            raise RequestError("a stop string must be a text of at least one character")
        self.stopped: str | None = None
        self.token_count = 0
        self._tokenizer = tokenizer
        self._stop = stop
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = True
        self._held = ""
        self._shown: list[str] = []

    @property
    def text(self) -> str:
        """Everything returned so far."""
        # Joined once and kept: reading this after every token should not cost more with each.
        self._shown = ["".join(self._shown)]
        return self._shown[0]

    def push(self, ids: Iterable[int]) -> str:
        """The new text that these ids make safe to show, often empty. Ids after a stop string are not looked at."""
        return self._show("".join(self._take(token_id) for token_id in ids if self.stopped is None))

    def finish(self) -> str:
        """The text that was held back: the start of a stop string that never came, bytes that make no character."""
        if self.stopped is not None:
            return ""
        ready = self._accept(self._utf8.decode(b"", final=True))
        if self.stopped is None:
            ready, self._held = ready + self._held, ""
        return self._show(ready)

    def _take(self, token_id: int) -> str:
        self.token_count += 1
        if token_id in self._skipped:
            return ""
        return self._accept(self._utf8.decode(self._tokenizer.token_bytes(token_id)))

    def _accept(self, new: str) -> str:
        """Adds text to what is held, and returns the part of it that no stop string can reach back into."""
        if self._at_start and new:
            self._at_start = False
            if self._tokenizer.strips_leading_space:
                new = new.removeprefix(" ")
        held = self._held + new
        found = [(start + len(stop), start, stop) for stop in self._stop if (start := held.find(stop)) >= 0]
        if found:
            _, start, self.stopped = min(found)
            self._held = ""
            return held[:start]
        keep = max((_overlap(held, stop) for stop in self._stop), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def _show(self, text: str) -> str:
        if text:
            self._shown.append(text)
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, and not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
