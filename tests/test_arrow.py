"""Arrow checkpoints: what is written is read back in place, and what is damaged is refused in words."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pyarrow as pa
import pytest

from fusedllm.config import ModelConfig, RopeConfig
from fusedllm.errors import CheckpointError
from fusedllm.text.data import TokenizerData
from fusedllm.weights import arrow
from fusedllm.weights.checkpoint import Checkpoint, LazyTensor
from fusedllm.weights.load import load_params
from fusedllm.weights.random import random_checkpoint

CONFIG = ModelConfig(
    family="llama",
    vocab_size=67,
    hidden_size=24,
    intermediate_size=40,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    max_position=64,
    rope=RopeConfig(theta=500_000.0, kind="llama3", factor=8.0, original_max_position=32),
    attention_bias=True,
    sliding_windows=(None, 16),
    eos_token_ids=(2, 3),
)
TOKENIZER = TokenizerData(
    tokenizer_json='{"model": "ünïcode \U0001f999"}', chat_template="{{ messages }}\n", bos_token="<s>", add_bos=True
)


def checkpoint(dtype: str = "bfloat16") -> Checkpoint:
    return dataclasses.replace(random_checkpoint(CONFIG, dtype, seed=3), tokenizer=TOKENIZER)


def with_tensors(base: Checkpoint, **tensors: np.ndarray) -> Checkpoint:
    made = {
        name: LazyTensor(name, values.shape, values.dtype, values.nbytes, lambda values=values: values)
        for name, values in tensors.items()
    }
    return dataclasses.replace(base, tensors=made)


def bits(values: np.ndarray) -> bytes:
    return np.ascontiguousarray(values).tobytes()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    arrow.write(checkpoint(), tmp_path / "model.arrow")
    return tmp_path / "model.arrow"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_written_is_read_back_bit_for_bit(tmp_path, dtype):
    written = checkpoint(dtype)
    arrow.write(written, tmp_path / "model.arrow")
    found = arrow.read(tmp_path / "model.arrow")
    assert (found.config, found.tokenizer, found.format) == (CONFIG, TOKENIZER, "arrow")
    assert list(found.tensors) == list(written.tensors)
    for name, tensor in found.tensors.items():
        assert tensor.read().dtype == tensor.dtype == np.dtype(dtype)
        assert bits(tensor.read()) == bits(written.tensors[name].read())


def test_values_that_compare_oddly_keep_their_bits(tmp_path):
    odd = np.array([0.0, -0.0, np.nan, -np.nan, np.inf, 1e-45, -1e-40], np.float32)
    arrow.write(with_tensors(checkpoint(), odd=odd, half=odd.astype(ml_dtypes.bfloat16)), tmp_path / "odd.arrow")
    found = arrow.read(tmp_path / "odd.arrow").tensors
    assert bits(found["odd"].read()) == bits(odd)
    assert bits(found["half"].read()) == bits(odd.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("name_length", [0, 1, 7, 8, 63, 64, 1000])
def test_every_tensor_begins_on_a_64_byte_boundary_of_the_file(tmp_path, name_length):
    tensors = {f"{'n' * name_length}{size}": np.arange(size, dtype=np.uint8) for size in (1, 2, 7, 8, 63, 64, 65, 1000)}
    arrow.write(with_tensors(checkpoint(), **tensors), tmp_path / "model.arrow")
    content = (tmp_path / "model.arrow").read_bytes()
    for name, tensor in arrow.read(tmp_path / "model.arrow").tensors.items():
        view = tensor.read()
        assert view.ctypes.data % arrow.ALIGNMENT == 0
        assert not view.flags.writeable
        assert bits(view) == bits(tensors[name])
        assert content.index(bits(tensors[name])) % arrow.ALIGNMENT == 0 or view.size < 9


def test_any_arrow_library_can_read_the_table(path):
    with pa.memory_map(str(path)) as source:
        table = pa.ipc.open_file(source).read_all()
    table.validate(full=True)
    assert table.column_names == ["weights", "layer_name", "dtype", "shape"]
    row = table.slice(3, 1).to_pylist()[0]
    tensor = checkpoint().tensors[row["layer_name"]]
    assert (tuple(row["shape"]), row["dtype"], row["weights"]) == (tensor.shape, "bfloat16", bits(tensor.read()))
    assert json.loads(table.schema.metadata[b"fusedllm.config"])["hidden_size"] == CONFIG.hidden_size
    assert table.schema.metadata[b"fusedllm.format_version"] == b"1"


def test_loading_copies_no_byte(path):
    params, report = load_params(arrow.read(path))
    assert report.bytes_copied == 0
    assert report.copies == {}
    view = arrow.read(path).tensors["model.norm.weight"].read()
    assert bits(np.asarray(params.final_norm)) == bits(view)


def test_loaded_arrays_outlive_the_checkpoint_and_the_file(path):
    import gc

    expected = bits(checkpoint().tensors["model.embed_tokens.weight"].read())
    params, _ = load_params(arrow.read(path))
    path.unlink()
    gc.collect()
    assert bits(np.asarray(params.embedding)) == expected


def test_a_table_that_another_program_wrote_is_read_and_its_copies_are_counted(tmp_path, path):
    with pa.memory_map(str(path)) as source:
        table = pa.ipc.open_file(source).read_all()
    columns = ["dtype", "layer_name", "shape", "weights"]
    foreign = table.select(columns).set_column(3, "weights", table["weights"].cast(pa.binary())).combine_chunks()
    with pa.OSFile(str(tmp_path / "foreign.arrow"), "wb") as sink, pa.ipc.new_file(sink, foreign.schema) as writer:
        writer.write_table(foreign)
    found = arrow.read(tmp_path / "foreign.arrow")
    for name, tensor in checkpoint().tensors.items():
        assert bits(found.tensors[name].read()) == bits(tensor.read())
    _, report = load_params(found)
    unaligned = sum(tensor.nbytes for tensor in found.tensors.values() if tensor.read().ctypes.data % 64)
    assert 0 < report.bytes_copied == unaligned == report.copies["not 64-byte aligned"]


def test_a_newer_format_version_is_refused_with_both_numbers(path, tmp_path, monkeypatch):
    monkeypatch.setattr(arrow, "FORMAT_VERSION", 7)
    with monkeypatch.context() as unread:
        unread.setattr(arrow, "read", lambda path: None)
        arrow.write(checkpoint(), tmp_path / "newer.arrow")
    monkeypatch.setattr(arrow, "FORMAT_VERSION", 1)
    with pytest.raises(CheckpointError, match="format version 7; this fusedllm reads up to 1"):
        arrow.read(tmp_path / "newer.arrow")


@pytest.mark.parametrize("keep", [0, 5, 6, 31, 200, 3000, -1, -7, -500])
def test_a_truncated_file_is_refused(path, keep):
    content = path.read_bytes()
    path.write_bytes(content[:keep])
    with pytest.raises(CheckpointError, match=r"model\.arrow"):
        arrow.read(path)


@pytest.mark.parametrize("content", [b"", b"GGUF" + bytes(100), b"ARROW1" + bytes(100), b"ARROW1\0\0" * 20 + b"ARROW1"])
def test_what_is_not_arrow_is_refused(tmp_path, content):
    (tmp_path / "file.arrow").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"file\.arrow"):
        arrow.read(tmp_path / "file.arrow")


def test_a_missing_file_and_a_directory_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        arrow.read(tmp_path / "none.arrow")
    with pytest.raises(CheckpointError):
        arrow.read(tmp_path)


def foreign_file(path: Path, rows: list[dict], *, schema: pa.Schema = arrow.SCHEMA, config: object = CONFIG) -> Path:
    metadata = {} if config is None else {"fusedllm.config": json.dumps(dataclasses.asdict(config))}
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema.with_metadata(metadata)) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema))
    return path


ROW = {"weights": bytes(16), "layer_name": "a", "dtype": "float32", "shape": [2, 2]}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{**ROW, "dtype": "float8"}], "'a' has the unknown dtype 'float8'; known are: float32"),
        ([{**ROW, "shape": [2, 3]}], r"'a' is float32\[2, 3\], which takes 24 bytes, and holds 16"),
        ([{**ROW, "shape": [-2, -2]}], "sizes must be positive"),
        ([{**ROW, "shape": [2, None]}], "sizes must be positive"),
        ([{**ROW, "shape": [2**62, 2**62, 2**62]}], "holds 16"),
        ([ROW, ROW], "holds 'a' twice"),
        ([{**ROW, "layer_name": None}], "without 'layer_name'"),
        ([{**ROW, "weights": None}], "without 'weights'"),
        ([{**ROW, "shape": None}], "without 'shape'"),
    ],
)
def test_a_row_that_contradicts_itself_is_refused(tmp_path, rows, message):
    with pytest.raises(CheckpointError, match=message):
        arrow.read(foreign_file(tmp_path / "bad.arrow", rows))


def test_a_table_of_something_else_is_refused(tmp_path):
    schema = pa.schema([("weights", pa.string()), ("x", pa.int8())])
    with pytest.raises(
        CheckpointError, match="it needs one column 'weights' of type large_binary; it has weights: str"
    ):
        arrow.read(foreign_file(tmp_path / "a.arrow", [{"weights": "a", "x": 1}], schema=schema))
    with pytest.raises(CheckpointError, match=r"without 'fusedllm\.config'"):
        arrow.read(foreign_file(tmp_path / "b.arrow", [ROW], config=None))


def test_a_changed_configuration_or_tokenizer_is_noticed(path):
    content = path.read_bytes()
    for old, new in ((b'"num_kv_heads": 2', b'"num_kv_heads": 4'), (b'"<s>', b'"<t>'), (b"{{ mess", b"{{ miss")):
        assert old in content
        path.write_bytes(content.replace(old, new))
        with pytest.raises(CheckpointError, match="damaged"):
            arrow.read(path)


def test_a_compressed_table_is_refused_with_the_way_out(tmp_path, path):
    with pa.memory_map(str(path)) as source:
        table = pa.ipc.open_file(source).read_all()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with (
        pa.OSFile(str(tmp_path / "small.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, table.schema, options=options) as writer,
    ):
        writer.write_table(table)
    with pytest.raises(CheckpointError, match="compressed; write it without compression"):
        arrow.read(tmp_path / "small.arrow")


def test_a_tensor_that_reads_otherwise_than_announced_is_not_written(tmp_path):
    honest = with_tensors(checkpoint(), a=np.zeros((2, 2), np.float32))
    lying = dataclasses.replace(honest.tensors["a"], shape=(4,))
    with pytest.raises(CheckpointError, match="announced as float32"):
        arrow.write(dataclasses.replace(honest, tensors={"a": lying}), tmp_path / "a.arrow")
    with pytest.raises(CheckpointError, match="a is complex64, which an Arrow checkpoint can't hold"):
        arrow.write(with_tensors(checkpoint(), a=np.zeros(2, np.complex64)), tmp_path / "b.arrow")
