"""Token ids are llama.cpp's, and text survives the way there and back."""

from __future__ import annotations

import importlib.util
import threading
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from text_corpus import chunks
from text_reference import PLAIN_CHAT_CASES, SPECIAL, digests, load, tiny_metadata

from fusedllm.errors import RequestError, TokenizerError
from fusedllm.text.data import TokenizerData
from fusedllm.text.gguf_vocab import tokenizer_from_gguf
from fusedllm.text.pretokenizers import PRE_TOKENIZERS
from fusedllm.text.tokenizer import Tokenizer

TINY = [*(f"bpe:{pre}" for pre in PRE_TOKENIZERS), "spm:prefix", "spm:plain"]


def build(metadata: dict[str, Any]) -> Tokenizer:
    data = tokenizer_from_gguf(metadata)
    assert data is not None
    return Tokenizer(data)


@cache
def tiny(name: str) -> Tokenizer:
    return build(tiny_metadata(load("tiny_vocabularies"), name))


@pytest.fixture(scope="module")
def smollm2_gguf() -> Path:
    from fusedllm.weights.registry import fetch

    return fetch("smollm2-135m")


@pytest.fixture(scope="module")
def smollm2_metadata(smollm2_gguf: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    fields = GGUFReader(smollm2_gguf).fields
    return {key: field.contents() for key, field in fields.items() if key.startswith("tokenizer.")}


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2_metadata: dict[str, Any]) -> Tokenizer:
    return build(smollm2_metadata)


def test_the_corpus_is_large_and_has_not_changed() -> None:
    texts = chunks()
    assert sum(len(text.encode()) for text in texts) >= 200_000
    assert digests([list(text.encode()) for text in texts[:25]]) == "648b1aee"


@pytest.mark.parametrize("parse_special", [True, False])
def test_ids_of_a_real_vocabulary_are_those_of_llama_cpp(smollm2_tokenizer: Tokenizer, parse_special: bool) -> None:
    ids = [smollm2_tokenizer.encode(text, parse_special=parse_special) for text in chunks()]
    assert digests(ids) == load("digests")["smollm2"][not parse_special]


@pytest.mark.parametrize("name", TINY)
def test_ids_of_every_pre_tokenizer_are_those_of_llama_cpp(name: str) -> None:
    # Texts that begin with the token that belongs in front of every text: llama.cpp would have it twice.
    with_special, plain = load("digests")[name]
    tokenizer = tiny(name)
    ids = [tokenizer.encode(text) for text in chunks()]
    doubled = tokenizer.data.bos_token if tokenizer.data.add_bos else None
    ids = [[bos_id, *row] if text.startswith(doubled or "\0") else row for text, row, bos_id in _rows(tokenizer, ids)]
    assert digests(ids) == with_special
    assert digests([tokenizer.encode(text, parse_special=False) for text in chunks()]) == plain


def _rows(tokenizer: Tokenizer, ids: list[list[int]]) -> list[tuple[str, list[int], int]]:
    return [(text, row, tokenizer.bos_token_id or 0) for text, row in zip(chunks(), ids, strict=True)]


@pytest.mark.reference
@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="needs the extra `reference`")
def test_ids_are_those_that_llama_cpp_gives_now(
    smollm2_tokenizer: Tokenizer, smollm2_gguf: Path, tmp_path: Path
) -> None:
    from reference.make_tokenizer_reference import LlamaCpp, write_gguf

    pairs = [(smollm2_tokenizer, smollm2_gguf)]
    for name in ("bpe:llama-bpe", "bpe:qwen2", "spm:prefix"):
        path = tmp_path / f"{name.replace(':', '-')}.gguf"
        write_gguf(path, tiny_metadata(load("tiny_vocabularies"), name))
        pairs.append((tiny(name), path))
    for tokenizer, path in pairs:
        theirs = LlamaCpp(path)
        for text in chunks():
            text = "." + text
            assert tokenizer.encode(text) == theirs.encode(text)
            assert tokenizer.encode(text, parse_special=False) == theirs.encode(text, parse_special=False)


# SmolLM2 has no token for these bytes (control characters, and the first bytes of unassigned planes), so that neither
# llama.cpp nor we can write them.
_NO_TOKEN = [*(chr(code) for code in (0x04, 0x06, 0x13, 0x14, 0x16, 0x1D))]
_TEXT = st.text(st.characters(exclude_characters=_NO_TOKEN, exclude_categories=["Cs"], max_codepoint=0x3FFFF))
_MIXED = st.lists(st.one_of(_TEXT, st.sampled_from([*SPECIAL, " ", "\n\n", "  ", "👨‍👩‍👧", "don't", "12345"]))).map(
    "".join
)


@given(text=_MIXED)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_text_to_ids_to_text_is_the_identity(smollm2_tokenizer: Tokenizer, text: str) -> None:
    for parse_special in (True, False):
        ids = smollm2_tokenizer.encode(text, add_special=False, parse_special=parse_special)
        assert smollm2_tokenizer.decode(ids, skip_special_tokens=False) == text


@given(text=_TEXT)
@example(text="<|im_end|>")
@example(text="<s> a </s>")
@settings(deadline=None)
def test_sentencepiece_text_to_ids_to_text_is_the_identity(text: str) -> None:
    # A space mark is a space to SentencePiece.
    text = text.replace("\u2581", " ")
    tokenizer = tiny("spm:prefix")
    ids = tokenizer.encode(text, add_special=False, parse_special=False)
    # This vocabulary's merges lead from the characters of a special token to its id, as in llama.cpp.
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_the_chat_template_of_a_real_model_renders_as_apply_chat_template_does(smollm2_tokenizer: Tokenizer) -> None:
    template = smollm2_tokenizer.chat_template()
    texts = [template.render(case.messages, **case.variables) for case in PLAIN_CHAT_CASES]
    assert digests([list(text.encode()) for text in texts]) == load("digests")["smollm2_chat"]


def test_the_beginning_of_sequence_token_is_there_exactly_once() -> None:
    tokenizer = tiny("bpe:llama-bpe")
    bos = tokenizer.bos_token_id
    assert bos is not None
    for text in ("", "Hello", "<|endoftext|>Hello", "<|endoftext|><|endoftext|>Hello"):
        assert tokenizer.encode(text).count(bos) == max(
            1, text.count("<|endoftext|>") - (text.count("<|endoftext|>") > 1)
        )
    assert bos not in tokenizer.encode("Hello", add_special=False)


def test_an_end_of_sequence_token_is_added_where_the_file_asks_for_one() -> None:
    metadata = tiny_metadata(load("tiny_vocabularies"), "bpe:smollm") | {"tokenizer.ggml.add_eos_token": True}
    tokenizer = build(metadata)
    assert tokenizer.encode("Hello")[-1] == tokenizer.eos_token_id
    assert tokenizer.encode("Hello", add_special=False)[-1] != tokenizer.eos_token_id


def test_special_tokens_are_text_when_asked_and_skipped_in_decoding() -> None:
    tokenizer = tiny("bpe:qwen2")
    ids = tokenizer.encode("a<|im_end|><tool>b")
    end, tool = tokenizer.id_of("<|im_end|>"), tokenizer.id_of("<tool>")
    assert end in ids
    assert tool in ids
    assert end in tokenizer.special_ids
    assert tool not in tokenizer.special_ids
    assert tokenizer.decode(ids) == "a<tool>b"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a<|im_end|><tool>b"


def test_a_tokenizer_tells_of_its_tokens(smollm2_tokenizer: Tokenizer) -> None:
    assert smollm2_tokenizer.vocab_size == 49152
    assert (smollm2_tokenizer.bos_token_id, smollm2_tokenizer.eos_token_id) == (1, 2)
    assert smollm2_tokenizer.stop_ids == {0, 2}
    space_the = smollm2_tokenizer.id_of("Ġthe")
    assert space_the is not None
    assert smollm2_tokenizer.token_text(space_the) == "Ġthe"
    assert smollm2_tokenizer.token_bytes(space_the) == b" the"
    assert smollm2_tokenizer.id_of("no such token") is None
    assert smollm2_tokenizer.decode([10**9, -1]) == ""
    with pytest.raises(TokenizerError, match="no token 49152"):
        smollm2_tokenizer.token_text(49152)


def test_stored_data_gives_the_same_tokenizer() -> None:
    data = tiny("spm:prefix").data
    again = TokenizerData.from_json(data.to_json())
    assert again == data


def test_a_surrogate_or_something_that_is_no_text_is_refused() -> None:
    for prompt in ("a\ud800b", 5):
        with pytest.raises(RequestError):
            tiny("bpe:smollm").encode(prompt)  # type: ignore[arg-type]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown model": ({"tokenizer.ggml.model": "t5"}, "kind 't5'; known are gpt2, llama"),
    "unknown pre": ({"tokenizer.ggml.pre": "nonesuch"}, "pre-tokenizer 'nonesuch'; known are .*smollm"),
    "no pre": ({"tokenizer.ggml.pre": None}, "names no pre-tokenizer"),
    "no tokens": ({"tokenizer.ggml.tokens": None}, "tokens of the GGUF is not a list"),
    "tokens of numbers": ({"tokenizer.ggml.tokens": [1, 2]}, "tokens of the GGUF is not a list"),
    "a token twice": ({"tokenizer.ggml.tokens": ["a", "b", "a"]}, "holds 'a' twice"),
    "no merges": ({"tokenizer.ggml.merges": None}, "no tokenizer.ggml.merges"),
    "a merge of one": ({"tokenizer.ggml.merges": ["a"]}, "not two tokens"),
    "a merge of numbers": ({"tokenizer.ggml.merges": [7]}, "not two tokens"),
    "a merge of strangers": ({"tokenizer.ggml.merges": ["a nonesuch"]}, "not two tokens"),
    "too few types": ({"tokenizer.ggml.token_type": [1]}, "token_type of the GGUF is not a list of"),
    "types of text": ({"tokenizer.ggml.token_type": "3"}, "token_type of the GGUF is not a list of"),
    "id beyond": ({"tokenizer.ggml.eos_token_id": 10**6}, "eos_token_id of the GGUF is 1000000"),
    "id of text": ({"tokenizer.ggml.bos_token_id": "<s>"}, "bos_token_id of the GGUF is '<s>'"),
    "bos without id": ({"tokenizer.ggml.bos_token_id": None, "tokenizer.ggml.add_bos_token": True}, "names none"),
    "template": ({"tokenizer.chat_template": 3}, "chat_template of the GGUF is not a text"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_malformed_vocabulary_is_refused_in_one_sentence(case: str) -> None:
    change, sentence = BAD[case]
    with pytest.raises(TokenizerError, match=sentence) as caught:
        tokenizer_from_gguf({**tiny_metadata(load("tiny_vocabularies"), "bpe:smollm"), **change})
    assert "\n" not in str(caught.value)


def test_a_gguf_without_a_vocabulary_has_no_tokenizer() -> None:
    assert tokenizer_from_gguf({}) is None
    assert tokenizer_from_gguf({"tokenizer.ggml.model": "no_vocab"}) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model": {"type": "BPE"}}'])
def test_a_tokenizer_json_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(TokenizerError, match="can't be built"):
        Tokenizer(TokenizerData(tokenizer_json=text)).encode("a")


def test_other_threads_run_while_a_long_text_is_encoded(smollm2_tokenizer: Tokenizer) -> None:
    smollm2_tokenizer.encode("a")
    beats, stop = [0], threading.Event()

    def beat() -> None:
        while not stop.wait(0.001):
            beats[0] += 1

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        smollm2_tokenizer.encode("1" * 300_000)
    finally:
        stop.set()
        thread.join()
    # It takes some tenths of a second.
    assert beats[0] > 20
