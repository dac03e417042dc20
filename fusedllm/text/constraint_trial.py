"""`Trial`: grammars are compiled first in a process that may die of them.

llguidance's limits bound most of what a grammar can cost, and two things not: its compilers recurse on the native
stack, so that a chain of a thousand rules or `$ref`s ends the process, and intersections of regular expressions take
minutes and gigabytes before any limit is looked at. So a stranger's grammar is compiled and walked through for some
tokens here, with a small stack, limited memory and limited time, before the process that serves others compiles it.

Run as a program this file is the other process. It imports nothing of this package then, to start at once.
"""

from __future__ import annotations

import collections
import contextlib
import json
import math
import random
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import llguidance

# A compilation that the limits let through takes tens of milliseconds; the first start of the process is not counted.
TRIAL_SECONDS = 2.0
# On a busy machine a grammar that took too long may be in time later. Asked again at once it would hold up the others.
DOUBT_SECONDS = 60.0
# An eighth of what a thread usually has, so that what fits there fits here: some 100 `$ref`s within one another.
_STACK_BYTES = 1 << 20
# The process itself takes a third of it.
_ADDRESS_BYTES = 1 << 30
_WALK_TOKENS = 16
_VERDICTS = 256

# Where they differ from llguidance's own: how many units of work a mask may take (its 200,000 can be 1.2 s, these
# 0.2 s), states of the lexer (of 1-2 kB each), and no quotations of internal states in messages.
LIMITS: dict[str, Any] = {"step_lexer_fuel": 50_000, "max_lexer_states": 50_000, "verbose_errors": False}


@dataclass(frozen=True)
class Tokens:
    """A vocabulary: the bytes of each token, and the ids of those that are no text and of those that end one."""

    texts: list[bytes]
    special: list[int]
    ends: list[int]

    @cached_property
    def _id_of(self) -> dict[bytes, int]:
        special = frozenset(self.special)
        return {text: token for token, text in enumerate(self.texts) if text and token not in special}

    def longest_first(self, string: str) -> list[int]:
        """Ids whose bytes are the text's, always the longest token that fits, up to a byte that has no token."""
        text = string.encode()
        longest = max(map(len, self._id_of), default=0)
        ids, at = [], 0
        while at < len(text):
            fitting = (text[at : at + length] for length in range(min(longest, len(text) - at), 0, -1))
            found = next((piece for piece in fitting if piece in self._id_of), b"")
            if not found:
                break
            ids.append(self._id_of[found])
            at += len(found)
        return ids

    def to_json(self) -> str:
        """One line; `from_json` is its inverse."""
        return json.dumps({**asdict(self), "texts": [text.decode("latin-1") for text in self.texts]})

    @classmethod
    def from_json(cls, line: str) -> Tokens:
        """What `to_json` wrote."""
        values = json.loads(line)
        return cls(**{**values, "texts": [text.encode("latin-1") for text in values["texts"]]})


def build(tokens: Tokens, encode: Callable[[str], list[int]]) -> llguidance.LLTokenizer:
    """llguidance's form of a vocabulary; `encode` writes a text in its tokens."""
    import llguidance

    wrapper = llguidance.TokenizerWrapper(_GTokenizer(tokens, encode))
    return llguidance.LLTokenizer(wrapper, eos_token=tokens.ends)


class _GTokenizer:
    """The attributes that llguidance's wrapper looks at."""

    bos_token_id = None

    def __init__(self, tokens: Tokens, encode: Callable[[str], list[int]]) -> None:
        self.eos_token_id = tokens.ends[0]
        self.tokens = tokens.texts
        self.special_token_ids = tokens.special
        self._encode = encode

    def __call__(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise TypeError("texts only; this is how the wrapper finds out.")
        return self._encode(text)


def matcher(tokenizer: llguidance.LLTokenizer, grammar: str) -> llguidance.LLMatcher:
    """A matcher at the beginning of a grammar in llguidance's format; one that is in error if the grammar is."""
    import llguidance

    return llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=llguidance.LLParserLimits(**LIMITS))


class Trial:
    """Tries grammars out in a process of its own, which starts with the first of them. Safe in any thread."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        self._process: subprocess.Popen[str] | None = None
        self._close: weakref.finalize[[subprocess.Popen[str]], Trial] | None = None
        self._lock = threading.Lock()
        self._lookup = threading.Lock()
        # Of each grammar the verdict, and until when it holds.
        self._verdicts: collections.OrderedDict[str, tuple[str | None, float]] = collections.OrderedDict()

    def try_out(self, grammar: str) -> str | None:
        """What is wrong with a grammar in llguidance's format, or `None`. One that is known waits for no trial."""
        found = self._known(grammar)
        if found is None:
            with self._lock:
                # Another thread may have asked the same meanwhile.
                found = self._known(grammar) or self._learn(grammar, *self._ask(grammar))
        return found[0]

    def _known(self, grammar: str) -> tuple[str | None, float] | None:
        with self._lookup:
            found = self._verdicts.get(grammar)
            if found is None or found[1] < time.monotonic():
                return None
            self._verdicts.move_to_end(grammar)
            return found

    def _learn(self, grammar: str, verdict: str | None, certain: bool) -> tuple[str | None, float]:
        found = (verdict, math.inf if certain else time.monotonic() + DOUBT_SECONDS)
        with self._lookup:
            self._verdicts[grammar] = found
            self._verdicts.move_to_end(grammar)
            if len(self._verdicts) > _VERDICTS:
                self._verdicts.popitem(last=False)
        return found

    def close(self) -> None:
        """Ends the process; the next grammar starts another."""
        with self._lock:
            self._end()

    def _ask(self, grammar: str) -> tuple[str | None, bool]:
        process = self._running()
        assert process.stdin
        assert process.stdout
        timer = threading.Timer(TRIAL_SECONDS, process.kill)
        timer.start()
        reply = ""
        with contextlib.suppress(OSError):
            process.stdin.write(json.dumps(grammar) + "\n")
            process.stdin.flush()
            reply = process.stdout.readline()
        timer.cancel()
        if not reply.endswith("\n"):
            self._end()
            return "it is too complex", False
        return json.loads(reply), True

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self._end()
            # A session of its own: an interrupt at the terminal is for the server, whose end closes our input.
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,
            )
            self._close = weakref.finalize(self, _close, self._process)
            assert self._process.stdin
            assert self._process.stdout
            self._process.stdin.write(self._tokens.to_json() + "\n")
            self._process.stdin.flush()
            self._process.stdout.readline()
        return self._process

    def _end(self) -> None:
        if self._close is not None:
            self._close()
        self._process = self._close = None


def _close(process: subprocess.Popen[str]) -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            if pipe:
                pipe.close()
    process.wait()


def _walk(tokenizer: llguidance.LLTokenizer, grammar: str) -> str | None:
    """Compiles a grammar and goes on by some tokens, as a request would; the error's message if there is one."""
    walked = matcher(tokenizer, grammar)
    choose = random.Random(0)
    for _ in range(_WALK_TOKENS):
        if walked.is_error():
            return str(walked.get_error())
        if walked.is_stopped():
            break
        bits = int.from_bytes(walked.compute_bitmask(), "little")
        allowed = [token for token in _set_bits(bits) if token not in tokenizer.eos_tokens]
        if not allowed or not walked.try_consume_tokens([choose.choice(allowed)]):
            break
    return str(walked.get_error()) if walked.is_error() else None


def _set_bits(bits: int) -> Iterator[int]:
    text = bin(bits)[:1:-1]
    at = text.find("1")
    while at >= 0:
        yield at
        at = text.find("1", at + 1)


def main() -> None:
    """The other process: a vocabulary comes first, then a grammar a line; a verdict a line goes back."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # Where there is no such limit, time still ends it.
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_BYTES, _ADDRESS_BYTES))
    tokens = Tokens.from_json(sys.stdin.readline())
    tokenizer = build(tokens, tokens.longest_first)
    print(flush=True)
    threading.stack_size(_STACK_BYTES)
    for line in sys.stdin:
        thread = threading.Thread(target=_reply, args=(tokenizer, json.loads(line)))
        thread.start()
        thread.join()


def _reply(tokenizer: llguidance.LLTokenizer, grammar: str) -> None:
    print(json.dumps(_walk(tokenizer, grammar)), flush=True)


if __name__ == "__main__":
    main()
