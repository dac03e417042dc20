"""A Hugging Face directory gives the ids of the `tokenizers` library, and comes back as it was written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from text_corpus import chunks
from text_reference import CHATML, load, tiny_metadata

from fusedllm.errors import TokenizerError
from fusedllm.text.data import TokenizerData
from fusedllm.text.gguf_vocab import tokenizer_from_gguf
from fusedllm.text.tokenizer import Tokenizer, from_hf_directory, write_hf_directory

NAMES = ["bpe:smollm", "bpe:llama-bpe", "spm:prefix", "spm:plain"]


def tiny_data(name: str) -> TokenizerData:
    data = tokenizer_from_gguf(tiny_metadata(load("tiny_vocabularies"), name) | {"tokenizer.chat_template": CHATML})
    assert data is not None
    return data


def read(path: Path) -> TokenizerData:
    data = from_hf_directory(path)
    assert data is not None
    return data


def edit(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**content, **values}), encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_write_then_read_is_the_identity(name: str, tmp_path: Path) -> None:
    data = tiny_data(name)
    write_hf_directory(data, tmp_path)
    assert read(tmp_path) == data


@pytest.mark.parametrize("name", NAMES)
def test_ids_and_text_are_those_of_the_library(name: str, tmp_path: Path) -> None:
    write_hf_directory(tiny_data(name), tmp_path)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(read(tmp_path))
    for text in chunks()[:200]:
        ids = library.encode(text).ids
        assert tokenizer.encode(text, add_special=False) == ids
        assert tokenizer.decode(ids) == library.decode(ids)
        assert tokenizer.decode(ids, skip_special_tokens=False) == library.decode(ids, skip_special_tokens=False)


def test_a_post_processor_that_adds_the_first_token_is_not_helped(tmp_path: Path) -> None:
    data = tiny_data("bpe:smollm")
    bos = {"SpecialToken": {"id": data.bos_token, "type_id": 0}}
    text, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    special = {data.bos_token: {"id": data.bos_token, "ids": [0], "tokens": [data.bos_token]}}
    template = {
        "type": "TemplateProcessing",
        "single": [bos, text],
        "pair": [bos, text, second],
        "special_tokens": special,
    }
    write_hf_directory(data, tmp_path)
    edit(tmp_path / "tokenizer.json", post_processor={"type": "Sequence", "processors": [template]})

    def ids_with(**values: Any) -> list[int]:
        (tmp_path / "tokenizer_config.json").unlink(missing_ok=True)
        edit(tmp_path / "tokenizer_config.json", bos_token=data.bos_token, **values)
        return Tokenizer(read(tmp_path)).encode("Hello")

    plain = Tokenizer(data).encode("Hello", add_special=False)
    assert ids_with() == [0, *plain]
    assert ids_with(add_bos_token=True) == [0, *plain]
    assert ids_with(add_bos_token=False) == plain


def test_tokens_and_templates_are_found_wherever_they_may_stand(tmp_path: Path) -> None:
    data = tiny_data("bpe:smollm")
    (tmp_path / "tokenizer.json").write_text(data.tokenizer_json, encoding="utf-8")
    assert read(tmp_path) == TokenizerData(data.tokenizer_json)
    edit(tmp_path / "special_tokens_map.json", bos_token={"content": "<|im_start|>"}, eos_token="<|endoftext|>")
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    edit(
        tmp_path / "tokenizer_config.json", eos_token="<|im_end|>", pad_token={"content": "<tool>"}, chat_template=named
    )
    found = read(tmp_path)
    assert (found.bos_token, found.eos_token, found.special_tokens) == (
        "<|im_start|>",
        "<|im_end|>",
        {"pad_token": "<tool>"},
    )
    assert found.chat_template == "d"
    (tmp_path / "chat_template.jinja").write_bytes(b"line\r\n")
    assert read(tmp_path).chat_template == "line\r\n"


def test_a_directory_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    assert from_hf_directory(tmp_path) is None
    assert from_hf_directory(tmp_path / "nonesuch") is None


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("tokenizer.json", b"{", "is not JSON"),
        ("tokenizer.json", b"[1]", "holds a list"),
        ("tokenizer.json", b"{}", "has no model"),
        ("tokenizer.json", b"\xff\xfe", "is not UTF-8"),
        ("tokenizer.json", b"[" * 100_000, "is not JSON"),
        ("tokenizer_config.json", b"nonsense", "is not JSON"),
        ("tokenizer_config.json", b'{"eos_token": 7}', "names 7 as eos_token"),
        ("tokenizer_config.json", b'{"chat_template": 7}', "is not a text"),
        ("special_tokens_map.json", b'{"bos_token": ["a"]}', "as bos_token"),
        ("chat_template.jinja", b"\xff", "is not UTF-8"),
    ],
)
def test_a_malformed_file_is_refused_by_name(name: str, content: bytes, sentence: str, tmp_path: Path) -> None:
    write_hf_directory(tiny_data("bpe:smollm"), tmp_path)
    # A template beside the configuration would hide the one in it.
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=sentence) as caught:
        from_hf_directory(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_directory_that_can_not_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TokenizerError, match="can't be written"):
        write_hf_directory(tiny_data("bpe:smollm"), tmp_path / "file")


def test_a_token_that_the_vocabulary_does_not_have_is_refused() -> None:
    data = TokenizerData(tiny_data("bpe:smollm").tokenizer_json, bos_token="<nonesuch>", add_bos=True)
    with pytest.raises(TokenizerError, match="bos_token is '<nonesuch>'"):
        Tokenizer(data).encode("a")


def test_a_decoder_that_does_not_join_bytes_is_refused_by_name() -> None:
    content = json.loads(tiny_data("bpe:smollm").tokenizer_json)
    content["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    with pytest.raises(TokenizerError, match="decoder WordPiece"):
        Tokenizer(TokenizerData(json.dumps(content))).decode([5])
