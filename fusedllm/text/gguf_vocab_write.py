"""A tokenizer as a GGUF's metadata: the inverse of `gguf_vocab.py`.

A GGUF can name only what llama.cpp has: byte-level BPE with a splitting of text that has a name there, and
SentencePiece's BPE. What would split or merge otherwise once it is there is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fusedllm.errors import TokenizerError
from fusedllm.text.data import TokenizerData
from fusedllm.text.gguf_vocab import NAMED_IDS, TokenType, missing_bytes, sentencepiece_merges
from fusedllm.text.pretokenizers import DIGIT_PATTERN, GPT2_PATTERN, PRE_TOKENIZERS, name_of
from fusedllm.text.special import SPACE_MARK

# A normalizer of Qwen's that llama.cpp leaves out; nearly all text has this form already.
_NEGLECTED_NORMALIZER = "NFC"
_BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))


def tokenizer_to_gguf(data: TokenizerData, vocab_size: int) -> dict[str, Any]:
    """The keys `tokenizer.*` of a GGUF.

    Args:
      data: a tokenizer.
      vocab_size: rows of the model's embedding; ids that have no token get one that no text contains.

    Returns:
      GGUF keys to plain Python values; lists are of one type.

    Raises:
      TokenizerError: a tokenizer that a GGUF can't hold, or one with more tokens than the embedding has rows.
    """
    try:
        return _metadata(data, _parse(data.tokenizer_json), vocab_size)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise TokenizerError(f"the tokenizer is malformed ({type(error).__name__}: {error}).") from error


def _metadata(data: TokenizerData, document: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    model = document["model"]
    tokens, types = _tokens(document, model, vocab_size)
    byte_fallback = model.get("byte_fallback") is True
    if byte_fallback:
        kind, pre = "llama", "default"
        parts: dict[str, Any] = {
            "scores": _scores(document, tokens, types),
            "add_space_prefix": _adds_space(document),
        }
    else:
        kind, pre = "gpt2", _pre_name(document, tokens)
        parts = {"merges": [" ".join(pair) for pair in _merges(model)]}
    named = {"bos": data.bos_token, "eos": data.eos_token}
    named |= {name: data.special_tokens.get(key) for name, key in NAMED_IDS.items()}
    if byte_fallback and named["unknown"] is None:
        named["unknown"] = model.get("unk_token")
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    metadata = {"model": kind, "pre": pre, "tokens": tokens, "token_type": types, **parts}
    for name, token in named.items():
        if token is not None:
            if token not in ids:
                raise TokenizerError(f"the {name} token is {token!r}, which is not in the vocabulary.")
            metadata[f"{name}_token_id"] = ids[token]
    metadata["add_bos_token"] = data.add_bos
    metadata["add_eos_token"] = _appends_eos(document, data)
    result = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    if data.chat_template is not None:
        result["tokenizer.chat_template"] = data.chat_template
    return result


def _parse(text: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except ValueError as error:
        raise TokenizerError(f"the tokenizer is not JSON: {error}.") from error
    model = document.get("model") if isinstance(document, dict) else None
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        found = model.get("type") if isinstance(model, dict) else None
        raise TokenizerError(f"the tokenizer has a model of the kind {found!r}; a GGUF is written of BPE only.")
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            raise TokenizerError(f"the tokenizer's model has {key} = {model[key]!r}, which a GGUF can't say.")
    result: dict[str, Any] = document
    return result


def _added(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return document.get("added_tokens") or []


def _tokens(document: Mapping[str, Any], model: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Every token by id, and its type."""
    by_id: dict[int, str] = {token_id: token for token, token_id in model["vocab"].items()}
    types = dict.fromkeys(by_id, TokenType.NORMAL)
    if model.get("byte_fallback") is True:
        types |= {model["vocab"][token]: TokenType.BYTE for token in _BYTE_TOKENS if token in model["vocab"]}
    for token in _added(document):
        for key in ("single_word", "lstrip", "rstrip"):
            if token.get(key):
                raise TokenizerError(f"the added token {token['content']!r} has {key}, which a GGUF can't say.")
        by_id[token["id"]] = token["content"]
        types[token["id"]] = TokenType.CONTROL if token.get("special") else TokenType.USER_DEFINED
        if token["content"] == model.get("unk_token"):
            types[token["id"]] = TokenType.UNKNOWN
    count = max(by_id) + 1
    if count > vocab_size:
        raise TokenizerError(f"the tokenizer has {count} tokens, and the model's embedding {vocab_size} rows.")
    known = set(by_id.values())
    if len(known) != len(by_id):
        raise TokenizerError("two ids of the tokenizer have the same token, which a GGUF can't say.")
    for token_id in set(range(vocab_size)) - by_id.keys():
        name = f"[PAD{token_id}]"
        by_id[token_id] = name if name not in known else f"{name}_{token_id}"
        types[token_id] = TokenType.UNUSED
    return [by_id[token_id] for token_id in range(vocab_size)], [int(types[token_id]) for token_id in range(vocab_size)]


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pairs by rank, from either way of writing them."""
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model.get("merges") or []]
    if any(len(pair) != 2 or " " in pair[0] + pair[1] for pair in pairs):
        raise TokenizerError("a merge of the tokenizer is not two tokens without a space, which is all a GGUF can say.")
    return [(left, right) for left, right in pairs]


def _steps(part: Any, inner: str) -> list[Mapping[str, Any]]:
    """The members of a `Sequence`, of one step, or of nothing."""
    if part is None:
        return []
    return list(part[inner]) if part.get("type") == "Sequence" else [part]


def _pre_name(document: Mapping[str, Any], tokens: Sequence[str]) -> str:
    """The name of the splitting before byte-level BPE."""
    normalizers = [step["type"] for step in _steps(document.get("normalizer"), "normalizers")]
    if normalizers not in ([], [_NEGLECTED_NORMALIZER]):
        raise TokenizerError(f"the tokenizer normalizes text by {', '.join(normalizers)}, which a GGUF can't say.")
    patterns = _patterns(document, missing_bytes(set(tokens)))
    name = name_of(patterns, document["model"].get("ignore_merges") is True)
    if name is None:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise TokenizerError(
            f"llama.cpp has no name for how this tokenizer splits text ({' then '.join(patterns)}); known are {known}."
        )
    return name


def _patterns(document: Mapping[str, Any], barrier: str) -> list[str]:
    """The regular expressions that the pre-tokenizer applies one after the other."""
    patterns: list[str] = []
    in_bytes = False
    for step in _steps(document.get("pre_tokenizer"), "pretokenizers"):
        kind = step["type"]
        regex = step["pattern"].get("Regex") if kind == "Split" else None
        if kind == "ByteLevel" and not step.get("add_prefix_space") and not in_bytes:
            patterns += [GPT2_PATTERN] if step.get("use_regex", True) else []
            in_bytes = True
        elif in_bytes and regex == barrier:
            continue
        elif kind == "Digits" and step.get("individual_digits") and not in_bytes:
            patterns.append(DIGIT_PATTERN)
        elif regex and step.get("behavior") == "Isolated" and not step.get("invert") and not in_bytes:
            patterns.append(regex)
        else:
            raise TokenizerError(f"the tokenizer splits text by {json.dumps(step)}, which a GGUF can't say.")
    if not in_bytes:
        raise TokenizerError(
            "the tokenizer is neither byte-level BPE nor SentencePiece's BPE, which is all a GGUF has."
        )
    return patterns


def _adds_space(document: Mapping[str, Any]) -> bool:
    """Whether SentencePiece's tokenizer puts a space in front of a text; spaces become a mark in any case."""
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
    prepends = {"type": "Prepend", "prepend": SPACE_MARK}
    normalizers = _steps(document.get("normalizer"), "normalizers")
    pre_tokenizers = _steps(document.get("pre_tokenizer"), "pretokenizers")
    if not pre_tokenizers and normalizers in ([replaces], [prepends, replaces]):
        return prepends in normalizers
    if not normalizers and len(pre_tokenizers) == 1 and pre_tokenizers[0]["type"] == "Metaspace":
        (step,) = pre_tokenizers
        scheme = step.get("prepend_scheme", "always")
        if step.get("replacement", SPACE_MARK) == SPACE_MARK and step.get("split") is False:
            return bool(scheme != "never")
    raise TokenizerError("the tokenizer treats spaces in a way that a GGUF can't say.")


def _scores(document: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> list[float]:
    """A score for each token, of which llama.cpp merges the highest: the earlier a merge, the higher the token's.

    Tokens whose merges are interleaved get the same score: so they were ordered when the merges were made.
    """
    pairs = _merges(document["model"])
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for rank, (left, right) in enumerate(pairs):
        first.setdefault(left + right, rank)
        last[left + right] = rank
    score, end, by_token = 0, -1, {}
    for token, rank in first.items():
        score -= rank > end
        end = max(end, last[token])
        by_token[token] = float(score)
    scores = [by_token.get(token, 0.0) for token in tokens]
    ordinary = {token for token, kind in zip(tokens, types, strict=True) if kind == TokenType.NORMAL}
    implied = {(left, right) for left, right in sentencepiece_merges(tokens, scores) if left + right in ordinary}
    if implied != {(left, right) for left, right in pairs if left + right in ordinary}:
        raise TokenizerError(
            "the merges of the tokenizer are not all the ways to make its tokens, which a SentencePiece vocabulary in "
            "a GGUF means."
        )
    return scores


def _appends_eos(document: Mapping[str, Any], data: TokenizerData) -> bool:
    """Whether the post-processor ends a plain prompt with the end-of-sequence token."""
    templates = [
        step for step in _steps(document.get("post_processor"), "processors") if step["type"] == "TemplateProcessing"
    ]
    after = [
        piece["SpecialToken"]["id"]
        for template in templates
        for piece in template["single"][_index_of_text(template["single"]) + 1 :]
    ]
    if after and after != [data.eos_token]:
        raise TokenizerError(f"the tokenizer ends a prompt with {' '.join(after)}, which a GGUF can't say.")
    return bool(after)


def _index_of_text(pieces: Sequence[Mapping[str, Any]]) -> int:
    return ["Sequence" in piece for piece in pieces].index(True)
