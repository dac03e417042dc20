"""`fusedllm quantize`: from file to file, into tables and into other formats, and one sentence where it can't be."""

from __future__ import annotations

import dataclasses
import os
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_calibrate import CONFIG

import fusedllm
from fusedllm.cli.main import main
from fusedllm.errors import CheckpointError, QuantizationError
from fusedllm.quantizing import quantize_file
from fusedllm.weights.convert import convert
from fusedllm.weights.gguf_grouped import DequantizedWarning
from fusedllm.weights.open import open_checkpoint
from fusedllm.weights.random import random_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(random_checkpoint(CONFIG, "float32"), tmp_path_factory.mktemp("source") / "model.arrow")


def run(*arguments: object) -> int:
    return main(["quantize", *map(str, arguments)])


def test_into_a_table_that_runs(source, tmp_path, capsys):
    target = tmp_path / "q.arrow"
    assert run(source, target, "--scheme", "int4-g32", "--rule", "lm_head=int8", "--rule", "o_proj=keep") == 0
    assert "bits per weight" in capsys.readouterr().out
    kinds = {name: tensor.quantization for name, tensor in open_checkpoint(target).tensors.items()}
    assert kinds["lm_head.weight"] == "int8"
    assert kinds["model.layers.0.self_attn.o_proj.weight"] is None
    assert kinds["model.layers.1.mlp.up_proj.weight"] == "int4-g32"
    assert len(fusedllm.load(target, max_context=64).generate([[1, 2, 3]], max_tokens=3)[0].token_ids) == 3


def test_into_parquet_with_the_report_printed(source, tmp_path, capsys):
    assert run(source, tmp_path / "q.parquet", "--scheme", "int8", "--report") == 0
    assert "model.layers.0.mlp.down_proj.weight" in capsys.readouterr().out
    assert pq.read_table(tmp_path / "q.parquet").num_rows == len(random_checkpoint(CONFIG, "float32").tensors)


def test_a_quantized_table_in_parquet_is_loaded_by_its_content(source, tmp_path):
    assert run(source, tmp_path / "q.arrow", "--scheme", "int4-g32") == 0
    assert run(source, tmp_path / "q.parquet", "--scheme", "int4-g32") == 0
    prompt = list(range(20))
    expected = fusedllm.load(tmp_path / "q.arrow", max_context=64).logits(prompt)
    (tmp_path / "alone").mkdir()
    for name in ("q.bin", "alone/q.parquet", "alone"):
        if name != "alone":
            (tmp_path / name).write_bytes((tmp_path / "q.parquet").read_bytes())
        np.testing.assert_array_equal(fusedllm.load(tmp_path / name, max_context=64).logits(prompt), expected)


def test_a_parquet_file_that_is_no_model_is_refused(source, tmp_path):
    weights = {"a": np.ones((2, 32), np.float32)}
    pq.write_table(fusedllm.quantize(weights), tmp_path / "nameless.parquet")
    pq.write_table(fusedllm.dequantize(fusedllm.quantize(weights)), tmp_path / "floats.parquet")
    assert run(source, tmp_path / "cut.parquet") == 0
    os.truncate(tmp_path / "cut.parquet", 1000)
    for name, sentence in (
        ("nameless", "does not say which model"),
        ("floats", "is not quantized"),
        ("cut", "is not a whole Parquet file"),
    ):
        with pytest.raises(CheckpointError, match=rf"{name}\.parquet {sentence}"):
            open_checkpoint(tmp_path / f"{name}.parquet")


@pytest.mark.parametrize("name", ["q.arrow", "q.parquet", "table", "checkpoint", "directory"])
def test_what_is_quantized_already_is_refused_wherever_it_lies(source, tmp_path, name):
    quantized = fusedllm.quantize(source, "int8")
    path = tmp_path / f"q.{name.removeprefix('q.') if name.startswith('q.') else 'arrow'}"
    if path.suffix == ".parquet":
        pq.write_table(quantized, path)
    else:
        with pa.ipc.new_file(path, quantized.schema) as writer:
            writer.write_table(quantized)
    held = {"table": quantized, "checkpoint": open_checkpoint(path), "directory": tmp_path}
    with pytest.raises(QuantizationError, match=r"quantized already: quantize the weights that fusedllm\.dequantize"):
        fusedllm.quantize(held.get(name, path), "int4-g32")


def test_a_format_that_is_asked_for_is_written_whatever_the_suffix(source, tmp_path):
    assert run(source, tmp_path / "q.bin", "--scheme", "int4-g32", "--format", "arrow") == 0
    assert {tensor.quantization for tensor in open_checkpoint(tmp_path / "q.bin").tensors.values()} == {
        "int4-g32",
        None,
    }


def test_a_directory_that_is_missing_is_made_for_every_format(source, tmp_path):
    for name in ("q.arrow", "q.gguf"):
        assert run(source, tmp_path / "new" / name[2:] / name, "--scheme", "int4-g32-sym") == 0


@pytest.mark.parametrize(("name", "kind"), [("q.gguf", "Q4_0"), ("q.safetensors", "int4-g32-sym")])
def test_into_the_formats_of_others(source, tmp_path, name, kind):
    assert run(source, tmp_path / name, "--scheme", "int4-g32-sym", "--rule", "embed|head=keep") == 0
    found = {tensor.quantization for tensor in open_checkpoint(tmp_path / name).tensors.values()}
    assert found == {kind, None}
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(("name", "start"), [("q.PARQUET", b"PAR1"), ("q.Arrow", b"ARROW1"), ("q", b"ARROW1")])
def test_a_table_is_written_as_its_suffix_says_in_either_case(tmp_path, name, start):
    made = quantize_file({"a": np.ones((2, 32), np.float32)}, tmp_path / name)
    assert made.read_bytes().startswith(start)
    assert fusedllm.dequantize(made)["layer_name"].to_pylist() == ["a"]


@pytest.mark.parametrize("name", ["q.gguf", "q.GGUF", "q.safetensors", "q.orbax"])
def test_a_table_is_not_written_under_the_name_of_another_format(source, tmp_path, name):
    with pytest.raises(QuantizationError, match=rf"{name} is no table, .* `fusedllm quantize` .* write the other"):
        quantize_file(source, tmp_path / name)
    quantize_file({"a": np.ones((2, 32), np.float32)}, tmp_path / name, format="parquet")
    assert (tmp_path / name).read_bytes().startswith(b"PAR1")
    with pytest.raises(QuantizationError, match="gguf is no table"):
        quantize_file(source, tmp_path / "q", format="gguf")


@pytest.mark.parametrize("name", ["q.PARQUET", "q.GGUF", "q.SafeTensors"])
def test_the_command_takes_suffixes_in_either_case(source, tmp_path, name):
    assert run(source, tmp_path / name, "--scheme", "int4-g32-sym") == 0
    kinds = {tensor.quantization for tensor in open_checkpoint(tmp_path / name).tensors.values()}
    assert kinds & {"int4-g32-sym", "Q4_0"}


def test_codes_that_a_gguf_has_no_blocks_for_are_counted(source, tmp_path):
    rules = ["--rule", "embed|head|norm=keep", "--rule", "mlp=fp8"]
    with pytest.warns(
        DequantizedWarning, match=r"6 of 14 quantized tensors are written as floats, .* \(fp8, 96 x 64\)"
    ):
        assert run(source, tmp_path / "q.gguf", "--scheme", "int4-g32-sym", *rules) == 0
    kinds = [tensor.quantization for tensor in open_checkpoint(tmp_path / "q.gguf").tensors.values()]
    assert kinds.count("Q4_0") == 8
    with pytest.warns(DequantizedWarning, match="1 of 16"):
        assert run(source, tmp_path / "r.gguf", "--scheme", "int8", "--rule", "lm_head=fp8") == 0


def test_a_gguf_that_would_hold_floats_alone_is_refused(source, tmp_path, capsys):
    narrow = dataclasses.replace(CONFIG, hidden_size=48, head_dim=12, intermediate_size=40)
    odd = convert(random_checkpoint(narrow, "float32"), tmp_path / "odd.arrow")
    for arguments, what in (
        ([source, "--scheme", "fp8"], "for fp8: choose a scheme"),
        ([source, "--scheme", "fp8", "--rule", "head=keep"], "(fp8, 97 x 64): choose"),
        ([odd, "--scheme", "int8"], "(int8, 97 x 48): choose"),
    ):
        assert run(*arguments[:1], tmp_path / "q.gguf", *arguments[1:]) == 2
        message = capsys.readouterr().err.split("\r")[-1]
        assert "q.gguf would hold floats alone, as a GGUF has no blocks for" in message
        assert what in message
    assert [path.name for path in tmp_path.iterdir()] == ["odd.arrow"]


def test_our_warnings_are_sentences_on_the_terminal():
    main(["models"])
    said = warnings.formatwarning("three are lost.", DequantizedWarning, "file.py", 3)
    assert said == "fusedllm: three are lost.\n"
    assert "file.py:3" in warnings.formatwarning("another's.", UserWarning, "file.py", 3)


@pytest.mark.parametrize("suffix", ["arrow", "parquet"])
def test_a_table_that_does_not_say_its_model_is_refused_before_it_is_quantized(
    source, tmp_path, capsys, suffix, monkeypatch
):
    table = fusedllm.dequantize(fusedllm.quantize(source, rules={".": "keep"})).replace_schema_metadata()
    path = tmp_path / f"weights.{suffix}"
    if suffix == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    assert run(path, tmp_path / "q.gguf", "--scheme", "int8", "--model", source) == 0
    # What the file calls itself is no temporary name.
    assert b"general.name" in (content := (tmp_path / "q.gguf").read_bytes())
    assert b"quantized" not in content[: content.index(b"token_embd")].replace(b"quantization", b"")
    monkeypatch.setattr("fusedllm.quantizing.quantize", None)
    capsys.readouterr()
    assert run(path, tmp_path / "r.gguf", "--scheme", "int8") == 2
    assert f"{path} does not say which model its weights are of" in (message := capsys.readouterr().err)
    assert "--model" in message
    assert not (tmp_path / "r.gguf").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["q.bin"], "the suffix of"),
        (["q.orbax"], "which holds no codes"),
        (["q.arrow", "--scheme", "int5"], "no scheme 'int5'"),
        (["q.arrow", "--method", "magic"], "no quantization method 'magic'"),
        (["q.arrow", "--rule", "nonsense"], "PATTERN=SCHEME"),
        (["q.arrow", "--method", "gptq"], "needs a tokenizer"),
        (["there.arrow"], "exists already"),
    ],
)
def test_what_can_not_be_is_one_sentence_and_leaves_nothing(source, tmp_path, capsys, arguments, sentence):
    (tmp_path / "there.arrow").write_text("mine")
    assert run(source, tmp_path / arguments[0], *arguments[1:]) == 2
    message = capsys.readouterr().err
    assert sentence in message
    assert message.count("\n") == 1
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]
