"""Log-probabilities as clients read them: the old format of /v1/completions, and that of chats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fusedllm.engine.request import TokenLogprob
from fusedllm.text.stream import TextStream
from fusedllm.text.tokenizer import Tokenizer

# JSON has no infinity; OpenAI's API writes this for what can't happen.
FLOOR = -9999.0


def finite(logprob: float) -> float:
    """A number that JSON can hold, also for infinities and NaN."""
    return max(FLOOR, logprob)


def token_label(tokenizer: Tokenizer | None, token: int) -> str:
    """A text for a token: different tokens should have different ones, characters in halves included."""
    if tokenizer is None:
        return f"token_id:{token}"
    data = tokenizer.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def chat_logprobs(tokenizer: Tokenizer | None, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
    """The `logprobs` of a chat's choice."""

    def describe(token: int, logprob: float) -> dict[str, Any]:
        data = b"" if tokenizer is None else tokenizer.token_bytes(token)
        text = token_label(tokenizer, token) if tokenizer is None else data.decode("utf-8", "replace")
        return {"token": text, "logprob": finite(logprob), "bytes": None if tokenizer is None else list(data)}

    content = [
        {
            **describe(entry.token_id, entry.logprob),
            "top_logprobs": [describe(token, logprob) for token, logprob in entry.top],
        }
        for entry in entries
    ]
    return {"content": content, "refusal": None}


class LegacyFormat:
    """The `logprobs` of one choice of /v1/completions, whole or chunk by chunk: offsets go on from call to call.

    Args:
      tokenizer: of the model.
      top: how many likely tokens were asked for.
    """

    def __init__(self, tokenizer: Tokenizer | None, top: int) -> None:
        self._tokenizer = tokenizer
        self._top = top
        self._offset = 0
        self._text = None if tokenizer is None else TextStream(tokenizer)

    def prompt(self, ids: Sequence[int], entries: Sequence[TokenLogprob], text: str) -> dict[str, Any]:
        """Of an echoed prompt: nothing comes before its first token, so that has no probability.

        Args:
          ids: the prompt.
          entries: those of `ids[1:]`.
          text: how it is echoed; the answer's offsets begin after it.
        """
        first = {"text_offset": [0], "tokens": [token_label(self._tokenizer, ids[0])], "token_logprobs": [None]}
        self._advance(ids[0])
        rest = self.answer(entries)
        self._offset = len(text)
        self._text = None if self._tokenizer is None else TextStream(self._tokenizer)
        joined = {name: values + rest[name] for name, values in first.items()}
        return {**joined, "top_logprobs": [None, *rest["top_logprobs"]] if self._top else None}

    def answer(self, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Of drawn tokens."""
        offsets = [self._advance(entry.token_id) for entry in entries]
        return {
            "text_offset": offsets,
            "tokens": [token_label(self._tokenizer, entry.token_id) for entry in entries],
            "token_logprobs": [finite(entry.logprob) for entry in entries],
            "top_logprobs": [self._likely(entry) for entry in entries] if self._top else None,
        }

    def _likely(self, entry: TokenLogprob) -> dict[str, float]:
        # Labels can coincide, of tokens without text for one: the likelier one stays.
        likely: dict[str, float] = {}
        for token, logprob in (*entry.top, (entry.token_id, entry.logprob)):
            likely.setdefault(token_label(self._tokenizer, token), finite(logprob))
        return likely

    def _advance(self, token: int) -> int:
        """Where in the text the token begins, in characters."""
        offset = self._offset
        if self._text is not None:
            self._offset += len(self._text.push([token]))
        return offset


def join(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """One `logprobs` of what two calls of a `LegacyFormat` returned."""
    return {name: None if values is None else values + second[name] for name, values in first.items()}
