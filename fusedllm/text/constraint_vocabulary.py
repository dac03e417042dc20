"""`Vocabulary`: a tokenizer's tokens as llguidance wants them, built once for each tokenizer."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

from fusedllm.errors import RequestError
from fusedllm.text.constraint_trial import Tokens, Trial, build, matcher
from fusedllm.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance

# In front of a text while it is encoded, where an added space would not touch the text.
_FENCE = "\n"

_vocabularies: weakref.WeakKeyDictionary[Tokenizer, dict[tuple[int, ...], Vocabulary]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def vocabulary_of(tokenizer: Tokenizer, eos_token_ids: Collection[int]) -> Vocabulary:
    """The vocabulary of a tokenizer, with these ids for the end of a text. Safe in any thread.

    Raises:
      RequestError: no end token, or one that the tokenizer does not have.
    """
    ends = tuple(sorted(eos_token_ids))
    if not ends or ends[0] < 0 or ends[-1] >= tokenizer.vocab_size:
        raise RequestError("an output can follow a grammar only if the tokenizer has the model's end token.")
    with _lock:
        known = _vocabularies.setdefault(tokenizer, {})
        if ends not in known:
            known[ends] = Vocabulary(tokenizer, ends)
        return known[ends]


class Vocabulary:
    """What llguidance knows of a tokenizer, the bytes of its tokens being those that `Tokenizer.decode` gives.

    Attributes:
      eos_token_ids: the tokens that end a text.
      size: how many tokens there are.
      trial: where grammars are compiled first.
    """

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: tuple[int, ...]) -> None:
        self.eos_token_ids = frozenset(eos_token_ids)
        tokens = Tokens(
            texts=[tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)],
            special=sorted(tokenizer.special_ids | self.eos_token_ids),
            ends=list(eos_token_ids),
        )
        self.trial = Trial(tokens)
        self.size = len(tokens.texts)
        self._tokenizer = build(tokens, _Encoder(tokenizer, tokens))

    def matcher(self, grammar: str) -> llguidance.LLMatcher:
        """A matcher at the beginning of a grammar; one that is in error if the grammar is."""
        return matcher(self._tokenizer, grammar)

    def fill(self, matcher: llguidance.LLMatcher, words: np.ndarray) -> None:
        """Writes the matcher's mask into the first of these words, uint32, at least one for 32 tokens."""
        count = -(-self.size // 32)
        # The library writes to an address; this is what keeps it inside of the array.
        assert words.flags.c_contiguous
        assert words.size >= count
        matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.itemsize * count)


class _Encoder:
    """How llguidance writes a text that a grammar forces: in the tokens that the model would expect."""

    def __init__(self, tokenizer: Tokenizer, tokens: Tokens) -> None:
        # Held weakly, because what llguidance holds would keep the tokenizer's own entry alive.
        self._tokenizer = weakref.ref(tokenizer)
        self._tokens = tokens
        self._fence = tokenizer.encode(_FENCE, add_special=False, parse_special=False)

    def __call__(self, text: str) -> list[int]:
        tokenizer = self._tokenizer()
        if tokenizer is not None:
            for fence, skipped in (("", 0), (_FENCE, len(self._fence))):
                ids = tokenizer.encode(fence + text, add_special=False, parse_special=False)[skipped:]
                if b"".join(tokenizer.token_bytes(token) for token in ids) == text.encode():
                    return ids
        return self._tokens.longest_first(text)
