"""The tokenizer in a GGUF's metadata, rebuilt in the form of the `tokenizers` library.

Keys and token types are those of the GGUF specification (ggml-org/ggml, `docs/gguf.md`); what a vocabulary means is
what llama.cpp does with it (`src/llama-vocab.cpp`).
"""

from __future__ import annotations

import collections
import json
import math
from collections.abc import Collection, Mapping, Sequence
from enum import IntEnum
from typing import Any

from fusedllm.errors import TokenizerError
from fusedllm.text.data import TokenizerData
from fusedllm.text.pieces import BYTE_LEVEL_ALPHABET
from fusedllm.text.pretokenizers import PRE_TOKENIZERS, PreTokenizer
from fusedllm.text.special import CONTROL_TEXTS, SPACE_MARK

_MODELS = ("gpt2", "llama")
# Named ids of a GGUF and what chat templates (and the stop rule) call their tokens.
NAMED_IDS = {
    "unknown": "unk_token",
    "padding": "pad_token",
    "seperator": "sep_token",
    "eot": "eot_token",
    "eom": "eom_token",
}
# llama.cpp's fallback for SentencePiece vocabularies whose file does not name these ids.
_SENTENCEPIECE_IDS = {"unknown": 0, "bos": 1, "eos": 2}


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# Plain integers in a set, and types compared at once below: a vocabulary is read at every start.
_ADDED = frozenset(map(int, (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED)))


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> TokenizerData | None:
    """The tokenizer that GGUF metadata describes, or `None` where there is none.

    Args:
      metadata: GGUF keys (`tokenizer.ggml.tokens`, ...) to plain Python values; other keys are ignored.

    Raises:
      TokenizerError: a vocabulary or pre-tokenizer of an unknown kind (with the known ones), or a malformed one.
    """
    model = metadata.get("tokenizer.ggml.model")
    if model in (None, "none", "no_vocab"):
        return None
    if model not in _MODELS:
        raise TokenizerError(f"the GGUF has a tokenizer of the kind '{model}'; known are {', '.join(_MODELS)}")
    tokens = _tokens(metadata)
    types = _token_types(metadata, tokens)
    if model == "gpt2":
        pre = _pre_tokenizer(metadata)
        add_bos = pre.add_bos
        parts = _byte_level(_merges(metadata, tokens), set(tokens), pre)
    else:
        add_bos = True
        parts = _sentencepiece(tokens, _scores(metadata, len(tokens)), bool(_flag(metadata, "add_space_prefix", True)))
        metadata = {
            **{f"tokenizer.ggml.{name}_token_id": value for name, value in _SENTENCEPIECE_IDS.items()},
            **metadata,
        }
    bos_token, eos_token = (_named_token(metadata, name, tokens) for name in ("bos", "eos"))
    add_bos = _flag(metadata, "add_bos_token", add_bos)
    if add_bos and bos_token is None:
        raise TokenizerError("the GGUF asks for a beginning-of-sequence token and names none (bos_token_id)")
    if _flag(metadata, "add_eos_token", False) and eos_token is not None:
        parts["post_processor"] = _append(eos_token, tokens.index(eos_token))
    named = {key: _named_token(metadata, name, tokens) for name, key in NAMED_IDS.items()}
    return TokenizerData(
        tokenizer_json=_to_json(tokens, types, parts),
        chat_template=_chat_template(metadata),
        bos_token=bos_token,
        eos_token=eos_token,
        add_bos=add_bos,
        special_tokens={key: token for key, token in named.items() if token is not None},
    )


def _byte_level(merges: list[str], tokens: Collection[str], pre: PreTokenizer) -> dict[str, Any]:
    """The parts of a `tokenizer.json` for GPT-2's byte-level BPE."""
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in pre.patterns
    ]
    missing = missing_bytes(tokens)
    barrier = [{"type": "Split", "pattern": {"Regex": missing}, "behavior": "Isolated", "invert": False}]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level, *(barrier if missing else [])]},
        "decoder": byte_level,
        "model": {"ignore_merges": pre.ignore_merges, "merges": merges},
    }


def missing_bytes(tokens: Collection[str]) -> str:
    """A regular expression for the bytes that have no token in a byte-level vocabulary; empty where all have one.

    Such a byte has no id, here as in llama.cpp, but what stands on its two sides must not be merged.
    """
    missing = "".join(rf"\x{{{ord(character):x}}}" for character in BYTE_LEVEL_ALPHABET if character not in tokens)
    return missing and f"[{missing}]"


def sentencepiece_merges(tokens: Sequence[str], scores: Sequence[float]) -> list[list[str]]:
    """Every way to make a token of two others, `[left, right]`, those with the highest score first."""
    known = set(tokens)
    merges = [
        (-score, -cut, token[:cut], token[cut:])
        for token, score in zip(tokens, scores, strict=True)
        for cut in range(1, len(token))
        if token[:cut] in known and token[cut:] in known
    ]
    # Of the ways to make one token, the one with the longer left half comes first: merging from the left, as
    # llama.cpp breaks ties, leaves runs of one character with their longer pieces on the left.
    merges.sort(key=lambda merge: merge[:2])
    return [[left, right] for _, _, left, right in merges]


def _sentencepiece(tokens: Sequence[str], scores: Sequence[float], add_space_prefix: bool) -> dict[str, Any]:
    """The parts of a `tokenizer.json` for SentencePiece's BPE: merges by score, bytes for what has no token."""
    space = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
    prefix = [{"type": "Prepend", "prepend": SPACE_MARK}] if add_space_prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if add_space_prefix else []
    unmark = {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "}
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, space]},
        "decoder": {"type": "Sequence", "decoders": [unmark, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": {"byte_fallback": True, "fuse_unk": True, "merges": sentencepiece_merges(tokens, scores)},
    }


def _append(token: str, token_id: int) -> dict[str, Any]:
    """A post-processor that ends a prompt with one token."""
    sequence, special = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": token, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [sequence, special],
        "pair": [sequence, special, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }


def _to_json(tokens: Sequence[str], types: Sequence[float], parts: Mapping[str, Any]) -> str:
    added = [
        {
            "id": token_id,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": token_type != TokenType.USER_DEFINED,
        }
        for token_id, (token, token_type) in enumerate(zip(tokens, types, strict=True))
        if token_type in _ADDED
    ]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    document = {"version": "1.0", "added_tokens": added, "normalizer": None, "pre_tokenizer": None, **parts}
    document["model"] = {"type": "BPE", "vocab": vocabulary, **parts["model"]}
    return json.dumps(document, ensure_ascii=False)


def _tokens(metadata: Mapping[str, Any]) -> list[str]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, Sequence) or set(map(type, tokens)) != {str}:
        raise TokenizerError("tokenizer.ggml.tokens of the GGUF is not a list of texts")
    # An empty token can't be found in any text; llama.cpp gives it this name too.
    tokens = [token or f"[EMPTY_{token_id}]" for token_id, token in enumerate(tokens)]
    if len(set(tokens)) != len(tokens):
        twice = collections.Counter(tokens).most_common(1)[0][0]
        raise TokenizerError(f"tokenizer.ggml.tokens of the GGUF holds {twice!r} twice")
    return tokens


def _token_types(metadata: Mapping[str, Any], tokens: Sequence[str]) -> list[float]:
    types = _numbers(metadata, "token_type", len(tokens), default=TokenType.NORMAL)
    return [
        TokenType.CONTROL if token in CONTROL_TEXTS else token_type
        for token, token_type in zip(tokens, types, strict=True)
    ]


def _scores(metadata: Mapping[str, Any], count: int) -> list[float]:
    return _numbers(metadata, "scores", count, default=0.0)


def _numbers(metadata: Mapping[str, Any], name: str, count: int, default: float) -> list[float]:
    values = metadata.get(f"tokenizer.ggml.{name}")
    if values is None:
        return [default] * count
    values = list(values) if isinstance(values, Sequence) and not isinstance(values, str) else [None]
    if len(values) < count or not set(map(type, values)) <= {int, float} or any(map(math.isnan, values)):
        raise TokenizerError(f"tokenizer.ggml.{name} of the GGUF is not a list of {count} numbers")
    return values[:count]


def _merges(metadata: Mapping[str, Any], tokens: Sequence[str]) -> list[str]:
    lines: Any = metadata.get("tokenizer.ggml.merges")
    if not isinstance(lines, Sequence) or isinstance(lines, str):
        raise TokenizerError("the GGUF has no tokenizer.ggml.merges, which a gpt2 vocabulary needs")
    try:
        # The first of two equal merges counts, in llama.cpp; the library would take the last.
        distinct: list[str] = list(dict.fromkeys(lines))
        merges = [line.split(" ") for line in distinct]
        parts = (*(left for left, _ in merges), *(right for _, right in merges), *map("".join, merges))
        sound = set(tokens).issuperset(parts)
    except (AttributeError, TypeError, ValueError):
        sound = False
    if sound:
        return distinct
    raise TokenizerError("tokenizer.ggml.merges of the GGUF holds a line that is not two tokens that make a third")


def _pre_tokenizer(metadata: Mapping[str, Any]) -> PreTokenizer:
    name = metadata.get("tokenizer.ggml.pre")
    found = PRE_TOKENIZERS.get(name) if isinstance(name, str) else None
    if found is None:
        what = "names no pre-tokenizer (tokenizer.ggml.pre)" if name is None else f"names the pre-tokenizer '{name}'"
        raise TokenizerError(f"the GGUF {what}; known are {', '.join(sorted(PRE_TOKENIZERS))}")
    return found


def _named_token(metadata: Mapping[str, Any], name: str, tokens: Sequence[str]) -> str | None:
    key = f"tokenizer.ggml.{name}_token_id"
    token_id = metadata.get(key)
    if token_id is None:
        return None
    if not isinstance(token_id, int) or not 0 <= token_id < len(tokens):
        raise TokenizerError(f"{key} of the GGUF is {token_id!r}, and the vocabulary has {len(tokens)} tokens")
    return tokens[token_id]


def _flag(metadata: Mapping[str, Any], name: str, default: bool) -> bool:
    return bool(metadata.get(f"tokenizer.ggml.{name}", default))


def _chat_template(metadata: Mapping[str, Any]) -> str | None:
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise TokenizerError("tokenizer.chat_template of the GGUF is not a text")
    return template
