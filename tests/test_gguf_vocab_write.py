"""A tokenizer goes into a GGUF and comes out the same, for our reader and for llama.cpp, or is refused by name."""

from __future__ import annotations

import dataclasses
import json
import re
import unicodedata
from typing import Any

import pytest
from peer_llama_cpp import needs_llama_cpp, token_ids
from test_gguf_write import CONFIG, random, written
from text_corpus import chunks
from text_reference import CHATML, load, tiny_metadata

from fusedllm.errors import TokenizerError
from fusedllm.text.data import TokenizerData
from fusedllm.text.gguf_vocab import tokenizer_from_gguf
from fusedllm.text.gguf_vocab_write import tokenizer_to_gguf
from fusedllm.text.tokenizer import Tokenizer
from fusedllm.weights import gguf_write

replace = dataclasses.replace


def tiny_data(name: str, **keys: Any) -> TokenizerData:
    metadata = tiny_metadata(load("tiny_vocabularies"), name) | {"tokenizer.chat_template": CHATML} | keys
    data = tokenizer_from_gguf(metadata)
    assert data is not None
    return data


def with_json(data: TokenizerData, **changes: Any) -> TokenizerData:
    """`data` with other values in its `tokenizer.json`; those of `model` are merged into it."""
    document = json.loads(data.tokenizer_json)
    document["model"] |= changes.pop("model", {})
    return replace(data, tokenizer_json=json.dumps({**document, **changes}))


def size_of(data: TokenizerData) -> int:
    return Tokenizer(data).vocab_size


TOKENIZERS = ["bpe:smollm", "bpe:llama-bpe", "bpe:qwen2", "bpe:tekken", "bpe:default", "spm:prefix", "spm:plain"]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_reads_back_as_it_was(name, tmp_path):
    data = tiny_data(name)
    config = replace(CONFIG, vocab_size=size_of(data), bos_token_id=None, eos_token_ids=())
    found = written(replace(random(config), tokenizer=data), tmp_path / "model.gguf")
    assert found.tokenizer == data
    # What the tokenizer names is in the configuration too.
    assert found.config.eos_token_ids == (Tokenizer(data).eos_token_id,)


def test_a_prompt_that_ends_in_a_token_reads_back_so(tmp_path):
    data = tiny_data("bpe:smollm", **{"tokenizer.ggml.add_eos_token": True})
    assert tokenizer_from_gguf(tokenizer_to_gguf(data, size_of(data))) == data
    twice = json.loads(data.tokenizer_json)["post_processor"]
    twice["single"] += twice["single"][-1:]
    with pytest.raises(TokenizerError, match="ends a prompt with"):
        tokenizer_to_gguf(with_json(data, post_processor=twice), size_of(data))


_MISSING = re.compile("[\x0b\U00040000-\U000bffff]")
_SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_PUBLISHED = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}@| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


# As the families publish it -> the name for it, whose tiny vocabulary must then split alike.
PUBLISHED = {
    "llama-bpe": sequence({**_SPLIT, "pattern": {"Regex": _PUBLISHED.replace("@", "{1,3}")}}, _BYTES),
    "qwen2": sequence({**_SPLIT, "pattern": {"Regex": _PUBLISHED.replace("@", "")}}, _BYTES),
    "smollm": sequence({"type": "Digits", "individual_digits": True}, {**_BYTES, "use_regex": True}),
    "gpt-2": {**_BYTES, "use_regex": True},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_spelling_of_published_models_is_known_by_its_name(name):
    data = tiny_data(f"bpe:{name}")
    normalizer = {"type": "NFC"} if name == "qwen2" else None
    published = with_json(data, pre_tokenizer=PUBLISHED[name], normalizer=normalizer)
    metadata = tokenizer_to_gguf(published, size_of(data))
    assert metadata["tokenizer.ggml.pre"] == name
    found = tokenizer_from_gguf(metadata)
    assert found is not None
    ours, theirs = Tokenizer(found), Tokenizer(published)
    # Left out: bytes that this small vocabulary has no token for (the published ones have all), and what NFC changes.
    texts = [text for text in chunks()[:250] if not _MISSING.search(text) and unicodedata.is_normalized("NFC", text)]
    assert len(texts) > 40
    for text in texts:
        assert ours.encode(text) == theirs.encode(text)


def test_sentencepiece_in_its_newer_form_is_the_same():
    data = tiny_data("spm:prefix")
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
    newer = with_json(data, normalizer=None, pre_tokenizer=metaspace)
    assert tokenizer_to_gguf(newer, size_of(data)) == tokenizer_to_gguf(data, size_of(data))
    never = with_json(data, normalizer=None, pre_tokenizer={**metaspace, "prepend_scheme": "never"})
    assert tokenizer_to_gguf(never, size_of(data))["tokenizer.ggml.add_space_prefix"] is False


def test_rows_of_the_embedding_without_a_token_get_one():
    data = tiny_data("bpe:smollm")
    count = size_of(data)
    metadata = tokenizer_to_gguf(data, count + 3)
    assert metadata["tokenizer.ggml.tokens"][count:] == [f"[PAD{count + extra}]" for extra in range(3)]
    assert metadata["tokenizer.ggml.token_type"][count:] == [5, 5, 5]
    found = tokenizer_from_gguf(metadata)
    assert found is not None
    assert [Tokenizer(found).encode(text) for text in chunks()[:50]] == [
        Tokenizer(data).encode(text) for text in chunks()[:50]
    ]


def test_every_token_that_ends_a_generation_has_a_place(tmp_path):
    data = tiny_data("bpe:smollm", **{"tokenizer.ggml.eot_token_id": 3})
    eos, bos = Tokenizer(data).eos_token_id, Tokenizer(data).bos_token_id
    config = replace(CONFIG, vocab_size=size_of(data), bos_token_id=bos, eos_token_ids=(7, eos))
    found = written(replace(random(config), tokenizer=data), tmp_path / "model.gguf")
    # The tokenizer's own come first; the one that only the configuration names takes the place that is left.
    assert found.config.eos_token_ids == (eos, 3, 7)
    assert found.config.bos_token_id == bos
    # Texts that everybody knows as an end need no place.
    end = Tokenizer(data).id_of("<|endoftext|>")
    written(replace(random(replace(config, eos_token_ids=(7, eos, end))), tokenizer=data), tmp_path / "other.gguf")


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unigram": ({"model": {"type": "Unigram"}}, "a model of the kind 'Unigram'; a GGUF is written of BPE only"),
    "suffix": ({"model": {"end_of_word_suffix": "</w>"}}, "end_of_word_suffix = '</w>'"),
    "splitting": (
        {"pre_tokenizer": sequence({**_SPLIT, "pattern": {"Regex": "x+"}}, _BYTES)},
        r"no name for how this tokenizer splits text \(x\+\); known are .*smollm",
    ),
    "step": ({"pre_tokenizer": sequence({"type": "Punctuation"}, _BYTES)}, 'splits text by {"type": "Punctuation"}'),
    "no bytes": ({"pre_tokenizer": None}, "neither byte-level BPE nor SentencePiece's"),
    "lower case": ({"normalizer": {"type": "Lowercase"}}, "normalizes text by Lowercase"),
    "strip": (
        {"added_tokens": [{"id": 0, "content": "<|endoftext|>", "special": True, "rstrip": True}]},
        r"'<\|endoftext\|>' has rstrip",
    ),
    "same text": ({"added_tokens": [{"id": 1, "content": "<|endoftext|>", "special": True}]}, "have the same token"),
    "merges of three": ({"model": {"merges": ["a b c"]}}, "not two tokens without a space"),
    "nonsense": ({"pre_tokenizer": {"kind": 3}}, "is malformed"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_tokenizer_that_a_gguf_can_not_hold_is_one_sentence(case):
    changes, said = BAD[case]
    data = tiny_data("bpe:smollm")
    with pytest.raises(TokenizerError, match=said) as caught:
        tokenizer_to_gguf(with_json(data, **changes), size_of(data))
    assert "\n" not in str(caught.value)


def test_more_tokens_than_rows_and_a_name_without_a_token_are_refused():
    data = tiny_data("bpe:smollm")
    with pytest.raises(TokenizerError, match=rf"has {size_of(data)} tokens, and the model's embedding 100 rows"):
        tokenizer_to_gguf(data, 100)
    with pytest.raises(TokenizerError, match="the eos token is 'nonesuch'"):
        tokenizer_to_gguf(replace(data, eos_token="nonesuch"), size_of(data))


def test_sentencepiece_with_other_merges_than_its_tokens_imply_is_refused():
    data = tiny_data("spm:prefix")
    merges = json.loads(data.tokenizer_json)["model"]["merges"]
    with pytest.raises(TokenizerError, match="not all the ways to make its tokens"):
        tokenizer_to_gguf(with_json(data, model={"merges": merges[:-5]}), size_of(data))
    with pytest.raises(TokenizerError, match="treats spaces in a way"):
        tokenizer_to_gguf(with_json(data, normalizer=None), size_of(data))


@needs_llama_cpp
def test_llama_cpp_splits_text_as_the_tokenizer_that_was_written(tmp_path):
    texts = [f".{text}" for text in chunks()[:60]]
    for name in TOKENIZERS:
        data = tiny_data(name)
        config = replace(CONFIG, vocab_size=size_of(data) + 2, hidden_size=32, num_heads=1, num_kv_heads=1, head_dim=32)
        gguf_write.write(replace(random(config), tokenizer=data), tmp_path / f"{name[4:]}.gguf")
    found = token_ids([tmp_path / f"{name[4:]}.gguf" for name in TOKENIZERS], texts)
    for name, ids in zip(TOKENIZERS, found, strict=True):
        assert ids == [Tokenizer(tiny_data(name)).encode(text) for text in texts], name
