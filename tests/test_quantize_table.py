"""`fusedllm.quantize`: tables of any origin in, quantized tables out, nothing copied that need not be, nothing lost."""

from __future__ import annotations

import math
from pathlib import Path

import duckdb
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fusedllm
from fusedllm.errors import QuantizationError
from fusedllm.kernels import native
from fusedllm.kernels.quantize import quantize as quantize_kernel
from fusedllm.quant.layers import MOST_ELEMENTS, Layers
from fusedllm.quant.report import QuantizeReport
from fusedllm.quant.schemes import SCHEMES
from fusedllm.quant.table import COLUMNS, rows

needs_native = pytest.mark.skipif(not native.available(), reason="the native kernels are not built")
RNG = np.random.default_rng(7)
WEIGHTS = {
    "q_proj": RNG.standard_normal((24, 64), dtype=np.float32),
    "embed": RNG.standard_normal((40, 96), dtype=np.float32) * 3,
    "odd": RNG.standard_normal((5, 50), dtype=np.float32) / 100,
}


def table_of(weights: dict[str, np.ndarray], *, shapes: bool = True, large: bool = True) -> pa.Table:
    kind = pa.large_list if large else pa.list_
    columns = {
        "layer_name": pa.array(list(weights)),
        "weights": pa.array([list(w.reshape(-1)) for w in weights.values()], kind(pa.float32())),
    }
    if shapes:
        columns["shape"] = pa.array([list(w.shape) for w in weights.values()], pa.list_(pa.int64()))
    return pa.table(columns)


def read(table: pa.Table) -> dict[str, np.ndarray]:
    decoded = fusedllm.dequantize(table)
    return {
        row["layer_name"]: np.array(row["weights"], np.float32).reshape(row["shape"]) for row in decoded.to_pylist()
    }


def buffers_of(table: pa.Table) -> list[tuple[object, ...]]:
    """What a table holds, layer by layer, bit by bit."""
    return [
        (
            row.name,
            row.shape,
            row.scheme,
            row.method,
            *(b"" if part is None else part.tobytes() for part in (row.values, row.scales, row.zeros)),
        )
        for batch in table.to_batches()
        for row in rows(batch)
    ]


def test_a_table_in_and_a_table_out_with_every_layer_in_order():
    table = fusedllm.quantize(table_of(WEIGHTS), "int4-g64")
    assert table.column_names == list(COLUMNS)
    assert table["layer_name"].to_pylist() == list(WEIGHTS)
    assert table["shape"].to_pylist() == [list(w.shape) for w in WEIGHTS.values()]
    assert table["bit_width"].to_pylist() == [4, 4, 4]
    assert table["group_size"].to_pylist() == [64, 64, 64]
    assert table["method"].to_pylist() == ["rtn"] * 3
    # Two codes a byte: a row of 50 weights is padded to 64.
    assert [len(data) for data in table["quantized_data"].to_pylist()] == [24 * 32, 40 * 64, 5 * 32]
    decoded = read(table)
    for name, weights in WEIGHTS.items():
        assert decoded[name].shape == weights.shape
        step = np.ptp(weights, axis=-1, keepdims=True) / 15
        assert (np.abs(decoded[name] - weights) <= step * 0.51).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_three_faces_give_the_same_bits(scheme):
    table = fusedllm.quantize(table_of(WEIGHTS), scheme)
    many = fusedllm.quantize_arrays(WEIGHTS, scheme)
    for (name, weights), row in zip(WEIGHTS.items(), rows(table.to_batches()[0]), strict=True):
        expected = quantize_kernel(jnp.asarray(weights), SCHEMES[scheme], implementation="xla")
        for array in (many[name], fusedllm.quantize_array(weights, scheme), row):
            np.testing.assert_array_equal(array.values, expected.values)
            np.testing.assert_array_equal(array.scales, expected.scales)
            assert (array.zeros is None) == (expected.zeros is None)
            if expected.zeros is not None:
                np.testing.assert_array_equal(array.zeros, expected.zeros)
    for name, array in many.items():
        np.testing.assert_array_equal(read(table)[name], array.dequantize())


def same_table(kind: str) -> pa.Table:
    """The same weights, held otherwise."""
    names, shapes = list(WEIGHTS), [list(w.shape) for w in WEIGHTS.values()]
    flat = [w.reshape(-1) for w in WEIGHTS.values()]
    if kind in ("list", "large_list"):
        return table_of(WEIGHTS, large=kind == "large_list")
    if kind == "binary":
        return pa.table(
            {
                "layer_name": names,
                "weights": pa.array([w.tobytes() for w in flat], pa.binary()),
                "dtype": ["float32"] * 3,
                "shape": shapes,
            }
        )
    if kind == "float64":
        lists = pa.array([list(w.astype(np.float64)) for w in flat], pa.list_(pa.float64()))
        return pa.table({"layer_name": names, "weights": lists, "shape": shapes})
    if kind == "sliced":
        more = {"before": np.ones((1, 3), np.float32), **WEIGHTS, "after": np.ones((2, 2), np.float32)}
        return table_of(more).slice(1, 3)
    if kind == "chunked":
        return pa.concat_tables([table_of(WEIGHTS).slice(i, 1) for i in range(3)])
    assert kind == "dictionary"
    table = table_of(WEIGHTS)
    return table.set_column(0, "layer_name", table["layer_name"].dictionary_encode())


@pytest.mark.parametrize("kind", ["list", "large_list", "binary", "float64", "sliced", "chunked", "dictionary"])
def test_weights_may_lie_in_any_kind_of_column(kind):
    expected = fusedllm.quantize(table_of(WEIGHTS), "int4-g32")
    assert buffers_of(fusedllm.quantize(same_table(kind), "int4-g32")) == buffers_of(expected)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrow_floats_are_read_as_they_are(dtype):
    weights = RNG.standard_normal((6, 64)).astype(dtype)
    if dtype == np.float16:
        lists = pa.array([list(weights.reshape(-1))], pa.list_(pa.float16()))
        table = pa.table({"layer_name": ["a"], "weights": lists, "shape": [[6, 64]]})
    else:
        lists = pa.array([weights.view(np.uint16).reshape(-1).tolist()], pa.list_(pa.uint16()))
        field = pa.field("weights", lists.type, metadata={"dtype": "bfloat16"})
        columns = [pa.array(["a"]), lists, pa.array([[6, 64]])]
        table = pa.table(columns, pa.schema([("layer_name", pa.string()), field, ("shape", pa.list_(pa.int64()))]))
    found = fusedllm.quantize(table, "int8-g32")
    expected = fusedllm.quantize(table_of({"a": weights.astype(np.float32)}), "int8-g32")
    assert buffers_of(found) == buffers_of(expected)
    assert fusedllm.quantize_report(found)["a"].bytes_in == weights.nbytes


def test_tensors_of_fixed_shape_say_their_shape_themselves():
    stack = RNG.standard_normal((3, 4, 32)).astype(np.float32)
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(stack)
    table = pa.table({"layer_name": ["a", "b", "c"], "weights": tensors})
    for part, expected in ((table, stack), (table.slice(1), stack[1:])):
        decoded = read(fusedllm.quantize(part, "int8-g32"))
        assert [w.shape for w in decoded.values()] == [(4, 32)] * len(expected)
        np.testing.assert_allclose(np.stack(list(decoded.values())), expected, atol=0.02)
    lists = table.set_column(1, "weights", pa.chunked_array([tensors.storage]))
    assert read(fusedllm.quantize(lists, "int8-g32"))["b"].shape == (128,)


def test_a_list_without_a_shape_is_one_row():
    vector = RNG.standard_normal(1000).astype(np.float32)
    table = fusedllm.quantize(table_of({"flat": vector}, shapes=False), "int4-g64")
    assert table["shape"].to_pylist() == [[1000]]
    assert len(table["scales"][0]) == 16
    assert read(table)["flat"].shape == (1000,)


def test_vectors_that_are_said_to_be_such_stay_as_they_are_unless_a_rule_names_them():
    weights = {"norm": np.linspace(0.5, 2, 64, dtype=np.float32), "matrix": WEIGHTS["q_proj"]}
    table = fusedllm.quantize(table_of(weights))
    assert table["scheme"].to_pylist() == ["float32", "int4-g64"]
    assert table["method"].to_pylist() == ["none", "rtn"]
    np.testing.assert_array_equal(read(table)["norm"], weights["norm"])
    named = fusedllm.quantize(table_of(weights), rules={"^norm$": "int8"})
    assert named["scheme"].to_pylist() == ["int8", "int4-g64"]


def test_more_than_two_axes_are_rows():
    weights = RNG.standard_normal((3, 5, 64)).astype(np.float32)
    decoded = read(fusedllm.quantize(table_of({"experts": weights}), "int8-g32"))["experts"]
    np.testing.assert_allclose(decoded, weights, atol=0.02)
    array = fusedllm.quantize_array(weights, "int8-g32")
    np.testing.assert_array_equal(array.dequantize(), decoded)


def test_the_first_rule_decides():
    rules = {r"embed|odd": "int8", r"odd": "int3-g32", "q_": "keep"}
    table = fusedllm.quantize(table_of(WEIGHTS), "int4-g64", rules=rules)
    assert table["scheme"].to_pylist() == ["float32", "int8", "int8"]
    assert table["bit_width"].to_pylist() == [32, 8, 8]


@pytest.mark.parametrize("scale_dtype", ["float16", "float32"])
def test_arrow_file_and_parquet_and_back_are_bit_equal(tmp_path: Path, scale_dtype: str):
    table = fusedllm.quantize(table_of(WEIGHTS), "int4-g32", rules={"embed": "int8"}, scale_dtype=scale_dtype)
    path = tmp_path / "quantized.arrow"
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)
    again = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    pq.write_table(again, tmp_path / "quantized.parquet")
    last = pq.read_table(tmp_path / "quantized.parquet")
    assert buffers_of(last) == buffers_of(again) == buffers_of(table)
    assert last.schema.metadata == table.schema.metadata
    for source in (last, tmp_path / "quantized.parquet", path):
        assert fusedllm.dequantize(source).equals(fusedllm.dequantize(table))


def test_polars_duckdb_and_pandas_tables_are_taken():
    table = table_of(WEIGHTS, large=False)
    expected = buffers_of(fusedllm.quantize(table, "int4-g32"))
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    assert buffers_of(fusedllm.quantize(frame, "int4-g32")) == expected
    relation = duckdb.sql("select * from frame")
    assert buffers_of(fusedllm.quantize(relation, "int4-g32")) == expected
    rows_of = {"layer_name": list(WEIGHTS), "weights": [w.reshape(-1) for w in WEIGHTS.values()]}
    data = pd.DataFrame({**rows_of, "shape": [list(w.shape) for w in WEIGHTS.values()]})
    assert buffers_of(fusedllm.quantize(data, "int4-g32")) == expected


def test_polars_reads_what_we_make_and_we_read_it_back():
    # polars has float16 from some version on, and float32 always.
    table = fusedllm.quantize(table_of(WEIGHTS), "int4-g32", scale_dtype="float32")
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    assert frame["layer_name"].to_list() == list(WEIGHTS)
    assert fusedllm.dequantize(frame).equals(fusedllm.dequantize(table))


def test_a_stream_is_quantized_batch_by_batch():
    asked = []

    def batches():
        for name, weights in WEIGHTS.items():
            asked.append(name)
            yield from table_of({name: weights}).to_batches()

    schema = table_of(WEIGHTS).schema
    report = QuantizeReport()
    stream = fusedllm.quantize(pa.RecordBatchReader.from_batches(schema, batches()), "int8", report=report)
    assert isinstance(stream, pa.RecordBatchReader)
    assert asked == []
    first = stream.read_next_batch()
    assert asked == ["q_proj"]
    assert len(report) == 1
    table = pa.Table.from_batches([first, *stream], stream.schema)
    assert buffers_of(table) == buffers_of(fusedllm.quantize(table_of(WEIGHTS), "int8"))
    assert len(report) == 3


@needs_native
def test_aligned_input_is_not_copied_and_the_result_is_arrows_own_memory():
    before = pa.total_allocated_bytes()
    table = table_of(WEIGHTS)
    at_input = pa.total_allocated_bytes()
    made = fusedllm.quantize(table, "int4-g64")
    report = fusedllm.quantize_report(made)
    assert report.bytes_copied == 0
    assert at_input > before
    # Arrow rounds each of its allocations up to 64 bytes.
    assert pa.total_allocated_bytes() - at_input >= report.bytes_out
    assert report.bytes_out == sum(
        made.column(name).combine_chunks().flatten().nbytes
        if name != "quantized_data"
        else sum(map(len, made[name].to_pylist()))
        for name in ("quantized_data", "scales", "zero_points")
    )


def test_copies_are_counted_with_their_reason():
    report = fusedllm.quantize_report(fusedllm.quantize(same_table("float64"), "int8"))
    assert report["embed"].bytes_copied == WEIGHTS["embed"].nbytes
    assert report["embed"].reason == "float64 becomes float32"
    kept = fusedllm.quantize_report(fusedllm.quantize(table_of(WEIGHTS), "int8", rules={".": "keep"}))
    assert kept["odd"].bytes_copied == WEIGHTS["odd"].nbytes
    assert kept["odd"].reason == "left as it is"


def test_the_report_tells_the_error_that_decoding_shows():
    table = fusedllm.quantize(table_of(WEIGHTS), "int3-g32")
    report = fusedllm.quantize_report(table)
    decoded = read(table)
    for name, weights in WEIGHTS.items():
        layer = report[name]
        error = np.linalg.norm(decoded[name] - weights) / np.linalg.norm(weights)
        assert layer.relative_error == pytest.approx(error, rel=1e-3)
        assert layer.snr == pytest.approx(-20 * math.log10(error), abs=0.01)
        assert layer.bytes_in == weights.nbytes
        assert 0 <= layer.conversion_seconds <= layer.seconds
    assert report.bits_per_weight == pytest.approx(8 * report.bytes_out / sum(w.size for w in WEIGHTS.values()))
    text = str(report)
    assert all(name in text for name in WEIGHTS)
    assert "3 layers" in text
    assert "<td>embed</td>" in report._repr_html_()
    assert QuantizeReport.from_json(report.to_json()) == report


def test_a_report_of_many_layers_prints_both_ends():
    many = {f"layer {i}": np.ones((1, 32), np.float32) for i in range(40)}
    text = str(fusedllm.quantize_report(fusedllm.quantize(table_of(many), "int8")))
    assert "layer 0 " in text
    assert "... 20 more" in text
    assert "layer 39" in text
    assert "layer 20 " not in text


@settings(max_examples=20, deadline=None)
@given(
    data=st.lists(
        st.tuples(st.integers(1, 5), st.integers(1, 80), st.sampled_from(list(SCHEMES))), min_size=1, max_size=6
    ),
    seed=st.integers(0, 1000),
)
def test_any_mixture_of_shapes_and_schemes_decodes_to_what_its_parts_decode_to(data, seed):
    rng = np.random.default_rng(seed)
    weights = {f"w{i}": rng.standard_normal((a, b)).astype(np.float32) for i, (a, b, _) in enumerate(data)}
    rules = {f"^w{i}$": scheme for i, (_, _, scheme) in enumerate(data)}
    decoded = read(fusedllm.quantize(table_of(weights), rules=rules))
    for (name, array), (_, _, scheme) in zip(weights.items(), data, strict=True):
        np.testing.assert_array_equal(decoded[name], fusedllm.quantize_array(array, scheme).dequantize())


def with_value(value: float) -> pa.Table:
    weights = {name: array.copy() for name, array in WEIGHTS.items()}
    weights["embed"][3, 5] = value
    return table_of(weights)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scheme", ["int4-g64", "int8", "fp8"])
def test_what_is_no_finite_number_is_refused_by_its_layer(value, scheme):
    with pytest.raises(QuantizationError, match=f"layer 'embed' has {value} at place 293 of its weights"):
        fusedllm.quantize(with_value(value), scheme)
    with pytest.raises(QuantizationError, match="layer 'embed' has"):
        fusedllm.quantize(with_value(value), scheme, rules={"embed": "keep"})


def test_squares_that_overflow_are_no_reason_to_refuse():
    weights = np.full((2, 64), 3e38, np.float32)
    table = fusedllm.quantize(table_of({"huge": weights}), "int8", scale_dtype="float32")
    np.testing.assert_allclose(read(table)["huge"], weights, rtol=1e-6)
    assert fusedllm.quantize_report(table)["huge"].relative_error < 1e-6


@pytest.mark.parametrize("size", [1e-9, 1e-20, 1e-27])
def test_float32_scales_keep_weights_that_are_tiny(size):
    weights = WEIGHTS["q_proj"] * np.float32(size)
    table = fusedllm.quantize(table_of({"tiny": weights}), "int8-g32", scale_dtype="float32")
    np.testing.assert_allclose(read(table)["tiny"], weights, atol=4.5 * size / 254)
    # Half a step is up to 4 / 254 of the deviation.
    assert 0 < fusedllm.quantize_report(table)["tiny"].relative_error < 0.016


def test_weights_that_no_scale_holds_are_reported_as_lost():
    table = fusedllm.quantize(table_of({"lost": WEIGHTS["q_proj"] * np.float32(1e-33)}), "int8-g32")
    assert (read(table)["lost"] == 0).all()
    assert fusedllm.quantize_report(table)["lost"].relative_error == 1


def test_a_scale_beyond_float16_is_refused_with_the_way_out():
    with pytest.raises(QuantizationError, match=r"layer 'a' .* ask for scale_dtype='float32'"):
        fusedllm.quantize(table_of({"a": np.full((2, 64), 1e7, np.float32)}), "int4-g64")


def bad_tables() -> dict[str, tuple[object, str]]:
    table = table_of(WEIGHTS)
    lists = table["weights"].to_pylist()
    some_null = pa.array([lists[0], [1.0, None], lists[2]], pa.list_(pa.float32()))
    integers = pa.array([[1, 2], [3], [4]], pa.list_(pa.int32()))
    plain = pa.table({"layer_name": list(WEIGHTS), "weights": table["weights"]})
    text = pa.table({"layer_name": ["a"], "weights": ["abc"]})
    nothing = pa.table({"layer_name": ["a"], "weights": pa.array([None], pa.list_(pa.float32()))})
    odd_bytes = {"layer_name": ["a"], "weights": pa.array([b"abc"], pa.binary())}
    return {
        "null in a layer": (plain.set_column(1, "weights", some_null), "layer 'embed' has a null at place 1"),
        "null layer": (nothing, "layer 'a' has no weights"),
        "null name": (plain.set_column(0, "layer_name", pa.array(["a", None, "c"])), "row 1 of the table has no"),
        "integers": (plain.set_column(1, "weights", integers), "layer 'q_proj' is a list of int32"),
        "uint16": (
            plain.set_column(1, "weights", integers.cast(pa.list_(pa.uint16()))),
            "bfloat16 is said by",
        ),
        "text": (text, "the column 'weights' is string"),
        "no weights": (pa.table({"layer_name": ["a"]}), "needs one column weights"),
        "no names": (pa.table({"weights": [[1.0]]}), "needs one column layer_name"),
        "names that are numbers": (pa.table({"layer_name": [[1]], "weights": [[1.0]]}), "it must hold strings"),
        "empty table": (table.slice(0, 0), "the table is empty"),
        "empty layer": (table_of({"void": np.zeros(0, np.float32)}, shapes=False), "layer 'void' is empty"),
        "shape": (
            table.set_column(2, "shape", pa.array([[24, 64], [7, 7], [5, 50]])),
            r"layer 'embed' holds 3,840 weights, and its shape \[7, 7\] takes 49",
        ),
        "negative shape": (table.set_column(2, "shape", pa.array([[24, 64], [-40, -96], [5, 50]])), "layer 'embed'"),
        "twice": (pa.concat_tables([table, table]), "layer 'q_proj' occurs twice"),
        "no dtype": (pa.table(odd_bytes), "needs one column dtype"),
        "unknown dtype": (pa.table({**odd_bytes, "dtype": ["int8"]}), "layer 'a' is of int8"),
        "odd bytes": (pa.table({**odd_bytes, "dtype": ["float16"]}), "layer 'a' has 3 bytes"),
        "quantized already": (fusedllm.quantize(table), "quantized already"),
        "no table": (17, "an Arrow table .* got int"),
    }


@pytest.mark.parametrize("case", bad_tables())
def test_a_bad_table_is_refused_with_one_sentence(case):
    table, sentence = bad_tables()[case]
    with pytest.raises(QuantizationError, match=sentence) as caught:
        fusedllm.quantize(table)
    assert str(caught.value).count("\n") == 0


def test_unknown_words_are_refused_with_the_known_ones():
    table = table_of(WEIGHTS)
    with pytest.raises(QuantizationError, match="no scheme 'int5'; known are: int8, int8-g32"):
        fusedllm.quantize(table, "int5")
    with pytest.raises(QuantizationError, match=r"the rule '\(' is no regular expression"):
        fusedllm.quantize(table, rules={"(": "int8"})
    with pytest.raises(QuantizationError, match="no scheme 'tiny'"):
        fusedllm.quantize(table, rules={"a": "tiny"})
    with pytest.raises(QuantizationError, match="scale_dtype must be float16 or float32"):
        fusedllm.quantize(table, scale_dtype="bfloat16")
    with pytest.raises(QuantizationError, match="layer 'x' is of int64"):
        fusedllm.quantize_array(np.arange(8).reshape(2, 4), "int8", name="x")
    with pytest.raises(QuantizationError, match="carries no report"):
        fusedllm.quantize_report(table)


@pytest.mark.parametrize(
    ("argument", "value", "sentence"),
    [
        ("method", 5, "a method is a name such as 'clip.gptq', got 5"),
        ("method", None, "got None"),
        ("rules", ["embed=int8"], r"rules are a mapping .* got \['embed=int8'\]"),
        ("rules", {3: "int8"}, "rules are a mapping from regular expressions"),
        ("rules", {"a": 8}, "there is no scheme 8"),
        ("scheme", ["int8"], r"there is no scheme \['int8'\]"),
        ("scale_dtype", [16], r"scale_dtype must be float16 or float32, got \[16\]"),
    ],
)
def test_arguments_of_another_kind_are_refused_in_a_sentence(argument, value, sentence):
    with pytest.raises(QuantizationError, match=sentence):
        fusedllm.quantize(table_of(WEIGHTS), **{argument: value})


def test_a_layer_of_too_many_weights_is_refused_before_it_is_touched():
    # The offsets of a list say how long it is; nothing of it is there.
    count = MOST_ELEMENTS + 1
    offsets = pa.py_buffer(np.array([0, count], np.int64))
    one = np.zeros(1, np.float32)
    values = pa.Array.from_buffers(pa.float32(), count, [None, pa.foreign_buffer(one.ctypes.data, 4 * count, one)])
    lists = pa.Array.from_buffers(pa.large_list(pa.float32()), 1, [None, offsets], children=[values])
    with pytest.raises(QuantizationError, match=r"layer 'big' has 2,147,483,648 weights; .* split it by rows"):
        Layers().add_batch(pa.record_batch({"layer_name": pa.array(["big"]), "weights": lists}))


def test_a_cut_off_file_is_refused(tmp_path: Path):
    table = table_of(WEIGHTS)
    whole = tmp_path / "weights.arrow"
    with pa.ipc.new_file(whole, table.schema) as writer:
        writer.write_table(table)
    parquet = tmp_path / "weights.parquet"
    pq.write_table(table, parquet)
    assert buffers_of(fusedllm.quantize(whole)) == buffers_of(fusedllm.quantize(parquet))
    for path in (whole, parquet):
        path.write_bytes(path.read_bytes()[:-40])
        with pytest.raises(QuantizationError, match="can't be read"):
            fusedllm.quantize(path)


def test_a_name_that_occurs_twice_in_a_quantized_table_is_refused():
    table = fusedllm.quantize(table_of(WEIGHTS))
    with pytest.raises(QuantizationError, match="layer 'q_proj' occurs twice"):
        fusedllm.dequantize(pa.concat_tables([table, table.slice(0, 1)]))


def damaged() -> dict[str, tuple[pa.Table, str]]:
    table = fusedllm.quantize(table_of(WEIGHTS))

    def replaced(name: str, values: pa.Array) -> pa.Table:
        return table.set_column(table.schema.get_field_index(name), name, values)

    data = table["quantized_data"].to_pylist()
    return {
        "codes": (
            replaced("quantized_data", pa.array([data[0][:-1], *data[1:]], pa.large_binary())),
            "'q_proj' .* 768",
        ),
        "scales": (replaced("scales", table["zero_points"].slice(0, 1).take([0, 0, 0])), "layer 'embed'"),
        "scheme": (replaced("scheme", pa.array(["int4-g64", "int9", "int4-g64"])), "the scheme 'int9'"),
        "shape": (replaced("shape", pa.array([[24, 64], [0], [5, 50]])), "layer 'embed' has the shape"),
        "null": (replaced("method", pa.array(["rtn", None, "rtn"])), "a null in its column 'method'"),
        "type": (replaced("bit_width", pa.array([["a"]] * 3)), "the column 'bit_width' .* must be int32"),
        "column": (table.drop_columns(["shape"]), "no column 'shape'"),
        "version": (table.replace_schema_metadata({"fusedllm.quantized_version": "2"}), "of version '2'"),
    }


@pytest.mark.parametrize("case", damaged())
def test_a_damaged_quantized_table_is_refused_by_its_layer(case):
    table, sentence = damaged()[case]
    with pytest.raises(QuantizationError, match=sentence):
        fusedllm.dequantize(table)


def test_the_example_of_the_documentation_decodes_a_layer():
    document = Path(__file__).parent.parent / "docs" / "arrow-format.md"
    code = document.read_text(encoding="utf-8").rsplit("```python", 1)[1].split("```")[0]
    table = fusedllm.quantize(table_of(WEIGHTS), "int4-g64")
    names = {"table": table}
    exec(code, names)
    np.testing.assert_array_equal(names["weights"], read(table)["q_proj"])


def test_an_error_in_a_stream_is_the_same_sentence():
    stream = fusedllm.quantize(with_value(math.nan).to_reader())
    with pytest.raises(QuantizationError, match="layer 'embed' has nan"):
        stream.read_all()
