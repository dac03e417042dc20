"""How the pre-tokenizers that a GGUF names by `tokenizer.ggml.pre` split text into words: a table of patterns.

The truth for the names, the patterns and the flags is llama.cpp (`src/llama-vocab.cpp`, `src/unicode.cpp`): a GGUF
carries a name only, and means whatever llama.cpp does for it, even where the model's first authors did otherwise.
Patterns are in the syntax of Oniguruma, which the `tokenizers` library uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# English contractions. Spelled out in both cases, because case-insensitive matching in Oniguruma would also fold
# letters from outside ASCII (a long s after an apostrophe), which llama.cpp does not.
_CONTRACTION = r"'(?:[sS]|[tT]|[rR][eE]|[vV][eE]|[mM]|[lL][lL]|[dD])"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ASCII_PUNCTUATION = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""
_CJK_AND_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
# llama.cpp sees case in ASCII only: any other letter may stand in either half of a word.
_LOWER_AT_THE_END = r"[^\r\n\p{L}\p{N}]?(?:(?=\p{L})[^a-z])*(?:(?=\p{L})[^A-Z])+"
_UPPER_AT_THE_START = r"[^\r\n\p{L}\p{N}]?(?:(?=\p{L})[^a-z])+(?:(?=\p{L})[^A-Z])*"


def _words(digits: str, letters: str = r"\p{L}", contraction: str = _CONTRACTION) -> str:
    """The pattern family that began with GPT-4: contractions, words, digit groups, punctuation, whitespace."""
    return (
        rf"{contraction}|[^\r\n\p{{L}}\p{{N}}]?[{letters}]+|{digits}"
        rf"| ?[^\s{letters}\p{{N}}]+[\r\n]*|{_SPACES}"
    )


def _cased_words(digits: str, suffix: str) -> str:
    """Words that also split where lower case turns into upper case; `suffix` may follow a word."""
    word = rf"{_LOWER_AT_THE_END}{suffix}|{_UPPER_AT_THE_START}{suffix}"
    return rf"{word}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """One way to split text into words.

    Attributes:
      patterns: regular expressions, applied one after the other to the pieces that the last one left. What a pattern
        matches, and what lies between two matches, becomes a piece.
      ignore_merges: whether a word that is a token of its own is taken whole, without consulting the merges.
      add_bos: whether a prompt starts with the beginning-of-sequence token if the file does not say.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_PLAIN_GPT2 = PreTokenizer((_GPT2,))
_SINGLE_DIGITS_GPT2 = PreTokenizer((r"\p{N}", _GPT2))
_LLAMA3 = PreTokenizer((_words(r"\p{N}{1,3}"),), ignore_merges=True, add_bos=True)
_LLAMA3_WITH_MERGES = PreTokenizer((_words(r"\p{N}{1,3}"),))
_QWEN2 = PreTokenizer((_words(r"\p{N}"),))
_GPT4O = PreTokenizer((_cased_words(r"\p{N}{1,3}", f"(?:{_CONTRACTION})?"),))
_DEEPSEEK3 = PreTokenizer(
    (
        r"\p{N}{1,3}",
        _CJK_AND_KANA,
        rf"{_ASCII_PUNCTUATION}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*"
        rf"|{_SPACES}",
    )
)

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "default": PreTokenizer((r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": _PLAIN_GPT2,
    "phi-2": _PLAIN_GPT2,
    "mpt": _PLAIN_GPT2,
    "olmo": _PLAIN_GPT2,
    "jais": _PLAIN_GPT2,
    "gigachat": _PLAIN_GPT2,
    "a.x-4.0": _PLAIN_GPT2,
    "mellum": _PLAIN_GPT2,
    "exaone4": _PLAIN_GPT2,
    "trillion": _PLAIN_GPT2,
    "granite-docling": _PLAIN_GPT2,
    "smollm": _SINGLE_DIGITS_GPT2,
    "starcoder": _SINGLE_DIGITS_GPT2,
    "refact": _SINGLE_DIGITS_GPT2,
    "command-r": _SINGLE_DIGITS_GPT2,
    "codeshell": _SINGLE_DIGITS_GPT2,
    "exaone": _SINGLE_DIGITS_GPT2,
    "minerva-7b": _SINGLE_DIGITS_GPT2,
    "falcon": PreTokenizer((r"[\p{P}$+<=>^~|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "falcon3": _LLAMA3,
    "falcon-h1": _LLAMA3,
    "pixtral": _LLAMA3,
    "midm-2.0": _LLAMA3,
    "lfm2": _LLAMA3,
    "dbrx": _LLAMA3_WITH_MERGES,
    "smaug-bpe": _LLAMA3_WITH_MERGES,
    "chatglm-bpe": _LLAMA3_WITH_MERGES,
    "glm4": PreTokenizer(_LLAMA3.patterns, ignore_merges=True),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "megrez": _QWEN2,
    "stablelm2": _QWEN2,
    "hunyuan": _QWEN2,
    "grok-2": _QWEN2,
    "qwen35": PreTokenizer((_words(r"\p{N}", letters=r"\p{L}\p{M}"),)),
    "tekken": PreTokenizer((_cased_words(r"\p{N}", ""),), ignore_merges=True, add_bos=True),
    "gpt-4o": _GPT4O,
    "llama4": _GPT4O,
    "minimax-m2": _GPT4O,
    "deepseek-v3": _DEEPSEEK3,
    "hunyuan-dense": _DEEPSEEK3,
    "seed-coder": PreTokenizer(
        (rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",)
    ),
    "bailingmoe": PreTokenizer(
        (
            rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
            r"|\s*[\r\n]|\s+(?!\S)|\s+",
        )
    ),
}

# Of several names for the same splitting the one that llama.cpp's converter writes; else the first of the table.
_PREFERRED = ("llama-bpe",)
# What `tokenizer.json` files write where the patterns above have the other: the same, except that llama.cpp ignores
# the case of contractions and sees that of words in ASCII only.
_SPELLINGS = (
    ("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", rf"(?:{_CONTRACTION})?"),
    ("(?i:'s|'t|'re|'ve|'m|'ll|'d)", _CONTRACTION),
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
        _LOWER_AT_THE_END,
    ),
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
        _UPPER_AT_THE_START,
    ),
    (r"[\p{L}]", r"\p{L}"),
)
GPT2_PATTERN, DIGIT_PATTERN = _GPT2, r"\p{N}"


def name_of(patterns: Sequence[str], ignore_merges: bool) -> str | None:
    """The name by which a GGUF says that text is split by `patterns`; `None` where llama.cpp knows none.

    Args:
      patterns: regular expressions as in `PreTokenizer`, in the spelling of this table or of published models.
      ignore_merges: as in `PreTokenizer`.
    """
    wanted = (tuple(map(_spelled, patterns)), ignore_merges)
    ordered = (*_PREFERRED, *(name for name in PRE_TOKENIZERS if name not in _PREFERRED))
    for name in ordered:
        found = PRE_TOKENIZERS[name]
        if (tuple(map(_spelled, found.patterns)), found.ignore_merges) == wanted:
            return name
    return None


def _spelled(pattern: str) -> str:
    for theirs, ours in _SPELLINGS:
        pattern = pattern.replace(theirs, ours)
    return pattern
