"""Tables that lie: damaged files, nulls out of sight, foreign widths: a sentence, never a wrong result or a crash."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fusedllm
from fusedllm.errors import FusedLLMError, QuantizationError
from fusedllm.kernels.grouped import GroupedScheme
from fusedllm.quantizing import quantize_file

ROWS = np.random.default_rng(3).standard_normal((2, 64)).astype(np.float32)
LISTS = pa.table(
    {
        "layer_name": ["a", "b"],
        "weights": pa.array([row.tolist() for row in ROWS], pa.list_(pa.float32())),
        "shape": [[2, 32], [2, 32]],
    }
)
BYTES = pa.table(
    {"layer_name": ["a", "b"], "weights": pa.array([row.tobytes() for row in ROWS]), "dtype": ["float32", "float32"]}
)
QUANTIZED = fusedllm.quantize(LISTS, "int4-g32")
# What a damaged offset, length or count is likely to do harm with.
NUMBERS = (2**31 - 1, 2**40, 2**63 - 1, -1, 2**20, 1000, 5, 0)
MUTATIONS = 300


def written(table: pa.Table, path: Path) -> bytes:
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)
    return path.read_bytes()


def mutated(whole: bytes, rng: random.Random) -> bytes:
    data = bytearray(whole)
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.randrange(8, len(data) - 8)
        if rng.random() < 0.5:
            data[at] = rng.randrange(256)
        else:
            data[at & ~7 : (at & ~7) + 8] = rng.choice(NUMBERS).to_bytes(8, "little", signed=True)
    return bytes(data)


@pytest.mark.parametrize(
    ("table", "call"),
    [(LISTS, fusedllm.quantize), (BYTES, fusedllm.quantize), (QUANTIZED, fusedllm.dequantize)],
    ids=["lists", "bytes", "quantized"],
)
def test_a_damaged_file_is_refused_or_read_and_nothing_else(table: pa.Table, call: Callable[..., object], tmp_path):
    """Before buffers were checked one file in a hundred ended the process."""
    whole = written(table, tmp_path / "whole.arrow")
    rng = random.Random(0)
    refused = []
    for _ in range(MUTATIONS):
        path = tmp_path / "damaged.arrow"
        path.write_bytes(mutated(whole, rng))
        try:
            call(path)
        except FusedLLMError as error:
            refused.append(str(error))
    assert 0 < len(refused) < MUTATIONS
    assert not any("\n" in sentence for sentence in refused)


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.large_list(pa.float32()), pa.list_(pa.float32(), 3)])
def test_a_null_is_found_behind_those_of_rows_that_were_sliced_away(kind):
    rows = pa.array([[1.0, None, 2.0], [3.0, None, 5.0], [None, 6.0, 7.0], [8.0, 9.0, 10.0]], kind)
    table = pa.table({"layer_name": list("abcd"), "weights": rows})
    with pytest.raises(QuantizationError, match="layer 'b' has a null at place 1"):
        fusedllm.quantize(table.slice(1, 2), "int8")
    # Nulls of others are nobody's concern.
    assert fusedllm.quantize(table.slice(3), "int8")["layer_name"].to_pylist() == ["d"]


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ({"a": np.float32(3)}, "layer 'a' is no array with an axis"),
        ({1: ROWS}, "must be a text that is not empty, got 1"),
        ({"": ROWS}, "must be a text that is not empty, got ''"),
        ({"a": np.ma.masked_array(ROWS, mask=ROWS > 0)}, "layer 'a' has masked weights"),
        ({"a": np.array([[1.0, 1e300]])}, "layer 'a' has inf at place 1"),
        ({}, "the table is empty"),
    ],
)
def test_a_mapping_that_holds_no_layers_is_refused(weights, sentence):
    with pytest.raises(QuantizationError, match=sentence):
        fusedllm.quantize(weights, "int8")
    if weights:
        with pytest.raises(QuantizationError, match=sentence):
            fusedllm.quantize_arrays(weights, "int8")


def test_an_empty_table_is_refused_where_it_goes_into_a_file_too(tmp_path):
    with pytest.raises(QuantizationError, match="the table is empty"):
        quantize_file(LISTS.slice(0, 0), tmp_path / "q.arrow")
    assert list(tmp_path.iterdir()) == []


def test_scales_that_a_library_has_widened_lose_nothing():
    # The scale of weights up to 1e7 is beyond float16.
    table = fusedllm.quantize({"a": ROWS * np.float32(1e7)}, "int8", scale_dtype="float32")
    wide = pa.large_list(pa.float64())
    for name in ("scales", "zero_points"):
        table = table.set_column(table.schema.get_field_index(name), name, table[name].cast(wide))
    decoded = np.array(fusedllm.dequantize(table)["weights"][0].as_py(), np.float32).reshape(ROWS.shape)
    # Half a step of 127 to a side, of values up to four.
    assert np.abs(decoded / 1e7 - ROWS).max() < np.abs(ROWS).max() / 127


def test_a_null_among_the_scales_is_refused():
    scales = pa.array([[1.0, None], [1.0, 1.0]], pa.large_list(pa.float16()))
    table = QUANTIZED.set_column(QUANTIZED.schema.get_field_index("scales"), "scales", scales)
    with pytest.raises(QuantizationError, match="a null in its column 'scales'"):
        fusedllm.dequantize(table)


def test_groups_that_the_native_quantizer_does_not_take_are_decoded_all_the_same():
    """`int8-g32768` is a name that the layout allows."""
    weights = np.random.default_rng(0).standard_normal((1, 40000)).astype(np.float32)
    scheme = GroupedScheme("int8-g32768", 8, 32768)
    array = fusedllm.quantize_array(weights, scheme)
    table = pa.table(
        {
            "layer_name": ["a"],
            "quantized_data": pa.array([np.asarray(array.values).tobytes()], pa.large_binary()),
            "scales": pa.array([np.asarray(array.scales)[0].tolist()], pa.large_list(pa.float16())),
            "zero_points": pa.array([[]], pa.large_list(pa.float16())),
            "shape": [[1, 40000]],
            "bit_width": pa.array([8], pa.int32()),
            "group_size": pa.array([32768], pa.int32()),
            "method": ["rtn"],
            "scheme": [scheme.name],
        }
    )
    decoded = np.array(fusedllm.dequantize(table)["weights"][0].as_py(), np.float32)
    np.testing.assert_array_equal(decoded, np.asarray(array.dequantize())[0])


@pytest.mark.parametrize("scheme", ["int4-g32", "int8", "fp8"])
@pytest.mark.parametrize("method", ["rtn", "clip"])
@pytest.mark.parametrize("magnitude", [1e-25, 1e25])
def test_the_reported_error_is_that_of_weights_whose_squares_are_no_float32(scheme, method, magnitude):
    weights = ROWS * np.float32(magnitude)
    table = fusedllm.quantize({"a": weights}, scheme, method=method, scale_dtype="float32")
    decoded = np.array(fusedllm.dequantize(table)["weights"][0].as_py()).reshape(weights.shape)
    error = np.linalg.norm(decoded / magnitude - weights / magnitude) / np.linalg.norm(weights / magnitude)
    assert fusedllm.quantize_report(table)["a"].relative_error == pytest.approx(error, rel=1e-3)


def test_streams_and_files_that_name_their_model_are_tables_too(tmp_path):
    expected = fusedllm.quantize(LISTS, "int4-g32")
    with pa.ipc.new_stream(tmp_path / "stream.arrow", LISTS.schema) as writer:
        writer.write_table(LISTS)
    named = LISTS.replace_schema_metadata({b"fusedllm.config": b"{}"})
    written(named, tmp_path / "named.arrow")
    pq.write_table(named, tmp_path / "named.parquet")
    for name in ("stream.arrow", "named.arrow", "named.parquet"):
        made = fusedllm.quantize(tmp_path / name, "int4-g32")
        assert made["quantized_data"].equals(expected["quantized_data"])
    with pytest.raises(QuantizationError, match="neither an Arrow nor a Parquet file"):
        fusedllm.dequantize(Path(__file__))
