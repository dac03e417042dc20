"""`Constraint`: which tokens may come next in an output that follows JSON, a regular expression, or a grammar.

The library `llguidance` does the work: derivatives of regular expressions for the lexer, Earley's algorithm for the
parser, and a walk over the vocabulary as a trie. What a stranger may ask of it is bounded here: the source's length,
what it costs to compile (`constraint_trial.py`), and the time that its masks take.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from fusedllm.errors import RequestError
from fusedllm.text.constraint_vocabulary import Vocabulary, vocabulary_of
from fusedllm.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance

ConstraintKind = Literal["json_object", "json_schema", "regex", "grammar", "choice"]

# The largest published schemas of tool servers have some tens of thousands of characters.
MAX_SOURCE = 1 << 16
# A model that begins with blanks may never stop. This many are enough for indented JSON that is 32 levels deep.
_WHITESPACE = r"[ \n\r\t]{1,65}"
# Processor seconds that all masks of one constraint may take. An ordinary one takes 0.0001; the first ones build the
# lexer's states. The engine's other requests wait for them.
FIRST_MASKS_SECONDS = 1.0
MASK_SECONDS = 0.01
# How the library's error begins where neither a token nor the end may come.
_NO_TEXT = "NoExtension"
# Of an error of the library; it quotes the source, which may be long.
_MAX_DETAIL = 300

_NAMES: dict[ConstraintKind, str] = {
    "json_object": "JSON object",
    "json_schema": "JSON schema",
    "regex": "regular expression",
    "grammar": "grammar",
    "choice": "choice",
}


class Constraint:
    """A grammar and how far an output has come in it; `compile` makes one.

    Every request needs one of its own (`fresh`). Not safe for several threads at once; two constraints of one tokenizer
    or of one source are independent.
    """

    def __init__(self, start: llguidance.LLMatcher, vocabulary: Vocabulary, vocab_size: int) -> None:
        self._start = start
        self._matcher = start.deep_copy()
        self._vocabulary = vocabulary
        self._vocab_size = vocab_size
        self._ended = False
        self._seconds_left = FIRST_MASKS_SECONDS

    @classmethod
    def compile(
        cls,
        kind: ConstraintKind,
        source: Any,
        tokenizer: Tokenizer,
        eos_token_ids: Collection[int],
        vocab_size: int | None = None,
    ) -> Constraint:
        """Reads what an output is to follow. Takes milliseconds, for a hostile source up to some two seconds.

        Args:
          kind: `json_object` (any JSON object), `json_schema`, `regex` (Rust's syntax, anchored at both ends),
            `grammar` (Lark's syntax as llguidance knows it), or `choice` (one of several texts).
          source: nothing, a schema as text or as Python values, a text, a text, a list of texts.
          tokenizer: whose ids the output has.
          eos_token_ids: allowed exactly where the output may end. At least one.
          vocab_size: rows of the model's logits, where they are more than the tokenizer has tokens.

        Raises:
          RequestError: a source that is not of its kind, is too long, asks for what llguidance does not implement, or
            is too complex.
        """
        if kind not in get_args(ConstraintKind):
            raise RequestError(f"there is no constraint of the kind {kind!r}; known are {', '.join(_NAMES)}.")
        vocabulary = vocabulary_of(tokenizer, eos_token_ids)
        grammar = _grammar_of(kind, source)
        refusal = vocabulary.trial.try_out(grammar)
        if refusal is None:
            matcher = vocabulary.matcher(grammar)
            refusal = matcher.get_error() if matcher.is_error() else None
        if refusal is not None:
            raise RequestError(f"the {_NAMES[kind]} can't be followed: {_one_line(refusal)}.")
        return cls(matcher, vocabulary, tokenizer.vocab_size if vocab_size is None else vocab_size)

    def mask(self) -> np.ndarray:
        """uint32 `[ceil(vocab / 32)]`: bit `t % 32` of word `t // 32` says whether token `t` may come next.

        Raises:
          RequestError: the grammar has become too complex here, or its masks take too long.
        """
        words = np.zeros(-(-self._vocab_size // 32), np.uint32)
        if self._ended:
            return self._only_ends(words)
        began = time.thread_time()
        self._vocabulary.fill(self._matcher, words)
        # The library answers an error with a mask of the end tokens.
        self._check()
        self._seconds_left += MASK_SECONDS - (time.thread_time() - began)
        if self._seconds_left < 0:
            raise RequestError("the grammar takes too long to follow; use a simpler one.")
        return words

    def accept(self, token: int) -> None:
        """Goes on by a token, an end token included.

        Raises:
          RequestError: a token that may not come here; nothing has changed then.
        """
        if token in self._vocabulary.eos_token_ids:
            accepted = self._ended or (self._matcher.is_accepting() and not self._matcher.is_error())
            self._ended |= accepted
        else:
            known = 0 <= token < self._vocabulary.size
            accepted = known and not self._ended and self._matcher.try_consume_tokens([token]) == 1
            self._check()
        if not accepted:
            raise RequestError(f"token {token} may not come here by the grammar.")

    @property
    def finished(self) -> bool:
        """Whether nothing but an end token may come."""
        return self._ended or self._matcher.is_stopped()

    def copy(self) -> Constraint:
        """Another one that has come as far as this one."""
        other = self.fresh()
        other._matcher = self._matcher.deep_copy()
        other._ended, other._seconds_left = self._ended, self._seconds_left
        return other

    def fresh(self) -> Constraint:
        """Another one at the beginning."""
        return Constraint(self._start, self._vocabulary, self._vocab_size)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RequestError(f"the grammar can't be followed further: {_one_line(self._matcher.get_error())}.")

    def _only_ends(self, words: np.ndarray) -> np.ndarray:
        for token in self._vocabulary.eos_token_ids:
            words[token // 32] |= np.uint32(1 << token % 32)
        return words


def _grammar_of(kind: ConstraintKind, source: Any) -> str:
    """The source in llguidance's own format, with nothing checked but its type and length."""
    import llguidance

    read: dict[ConstraintKind, Callable[[Any], str]] = {
        "json_object": lambda _: _json_grammar('{"type": "object"}'),
        "json_schema": lambda schema: _json_grammar(_schema_text(schema)),
        "regex": lambda text: llguidance.LLMatcher.grammar_from_regex(_text("regex", text)),
        "grammar": lambda text: llguidance.LLMatcher.grammar_from_lark(_text("grammar", text)),
        "choice": lambda texts: llguidance.LLMatcher.grammar_from_lark(_choice_grammar(texts)),
    }
    return read[kind](source)


def _text(kind: ConstraintKind, text: object) -> str:
    if not isinstance(text, str):
        raise RequestError(f"a {_NAMES[kind]} must be a text, and is a {type(text).__name__}.")
    if len(text) > MAX_SOURCE:
        raise RequestError(f"the {_NAMES[kind]} has {len(text)} characters; at most {MAX_SOURCE} are allowed.")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise RequestError(f"the {_NAMES[kind]} holds half of a surrogate pair, which UTF-8 can't write.")
    return text


def _schema_text(schema: object) -> str:
    if isinstance(schema, str):
        return _text("json_schema", schema)
    try:
        return _text("json_schema", json.dumps(schema))
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"the JSON schema can't be written as JSON: {_one_line(str(error))}.") from error


def _json_grammar(schema: str) -> str:
    import llguidance

    try:
        return llguidance.LLMatcher.grammar_from_json_schema(schema, {"whitespace_pattern": _WHITESPACE})
    except ValueError as error:
        raise RequestError(f"the JSON schema is not JSON: {_one_line(str(error))}.") from error


def _choice_grammar(texts: object) -> str:
    if not isinstance(texts, Sequence) or isinstance(texts, str) or not texts:
        raise RequestError("a choice must be a list of at least one text.")
    if not all(isinstance(text, str) and text for text in texts):
        raise RequestError("a choice must be a list of texts of at least one character each.")
    # One lexeme, whose alternatives have no limit; those of a rule have. Lark's strings are JSON's.
    return _text("choice", "start: CHOICE\nCHOICE: " + " | ".join(json.dumps(text) for text in texts))


def _one_line(message: str) -> str:
    """An error of the library in one line, without the mark below the quoted source."""
    if message.startswith(_NO_TEXT):
        return "there is no text that it allows"
    lines = [line.strip().rstrip(".:;") for line in message.splitlines()]
    text = "; ".join(line for line in lines if line.strip("^ ") and not line.startswith("<"))
    return text if len(text) <= _MAX_DETAIL else f"{text[:_MAX_DETAIL]}..."
