"""The three faces of the quantizer (one array, a batch of arrays, an Arrow table) and the way back.

All three come down to the same kernels: arrays and tables give the same codes, scales and zero points.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import pyarrow as pa

from fusedllm.errors import QuantizationError
from fusedllm.kernels import native, native_grouping
from fusedllm.kernels.dequantize import dequantize
from fusedllm.kernels.grouped import GroupedScheme
from fusedllm.qarray import QuantArray
from fusedllm.quant.encoder import Plan, encode, encode_arrays
from fusedllm.quant.layers import Layers, check_names, of_arrays
from fusedllm.quant.report import QuantizeReport
from fusedllm.quant.schemes import scheme_named
from fusedllm.quant.table import (
    FORMAT_VERSION,
    METHOD_KEY,
    REPORT_KEY,
    SCALE_DTYPES,
    SCHEME_KEY,
    VERSION_KEY,
    Row,
    rows,
)


def quantize_array(
    weights: Any, scheme: str | GroupedScheme, *, scale_dtype: str = "float16", name: str = "weights"
) -> QuantArray:
    """One array `[..., in]`, rounded to the nearest codes of `scheme`, as an array that the model runs.

    Raises:
      QuantizationError: an unknown scheme, or weights that are no finite floats; `name` is what the message calls them.
    """
    return quantize_arrays({name: weights}, scheme, scale_dtype=scale_dtype)[name]


def quantize_arrays(
    weights: Mapping[str, Any], scheme: str | GroupedScheme, *, scale_dtype: str = "float16"
) -> dict[str, QuantArray]:
    """Several arrays at once; as `quantize_array`."""
    plan = Plan(scheme_named(scheme), {".*": scheme_named(scheme)}, scale_dtype=scale_dtype_named(scale_dtype))
    layers = of_arrays(weights.items())
    if not len(layers):
        return {}
    return dict(zip(layers.names, encode_arrays(layers, plan), strict=True))


def quantize_batches(
    batches: Iterable[Layers], plan: Plan, metadata: Mapping[bytes, bytes], report: QuantizeReport
) -> Iterator[pa.RecordBatch]:
    """A batch of a quantized table for each of `batches`, made when it is asked for; `report` grows meanwhile.

    Raises:
      QuantizationError: a name occurs twice, or as `encode`.
    """
    seen: set[str] = set()
    source = iter(batches)
    while True:
        started = time.perf_counter()
        layers = next(source, None)
        if layers is None:
            return
        check_names(layers.names, seen)
        batch, reports = encode(layers, plan, metadata, started)
        report.extend(reports)
        yield batch


def table_metadata(plan: Plan, scheme: str, carried: Mapping[bytes, bytes] | None) -> dict[bytes, bytes]:
    """The metadata of a quantized table: ours, and what its source brought along under our name."""
    ours = {key: value for key, value in (carried or {}).items() if key.startswith(b"fusedllm.")}
    return ours | {
        VERSION_KEY: str(FORMAT_VERSION).encode(),
        SCHEME_KEY: scheme.encode(),
        METHOD_KEY: plan.method.encode(),
    }


def with_report(table: pa.Table, report: QuantizeReport) -> pa.Table:
    """The table with the report in its metadata."""
    return table.replace_schema_metadata({**(table.schema.metadata or {}), REPORT_KEY: report.to_json().encode()})


def quantize_report(table: Any) -> QuantizeReport:
    """The report that `quantize` attached to a table (or to the schema of one).

    Raises:
      QuantizationError: there is none.
    """
    schema = table if isinstance(table, pa.Schema) else getattr(table, "schema", None)
    text = (getattr(schema, "metadata", None) or {}).get(REPORT_KEY)
    if text is None:
        raise QuantizationError("this table carries no report of its quantization.")
    return QuantizeReport.from_json(text.decode())


def dequantize_table(batches: Iterable[pa.RecordBatch]) -> pa.Table:
    """The float32 weights of a quantized table: `layer_name`, `weights: large_list<float32>` and `shape`.

    Raises:
      QuantizationError: it is no quantized table, holds a name twice, or contradicts itself.
    """
    schema = pa.schema(
        [("layer_name", pa.string()), ("weights", pa.large_list(pa.float32())), ("shape", pa.list_(pa.int64()))]
    )
    made = []
    seen: set[str] = set()
    for batch in batches:
        found = list(rows(batch))
        check_names([row.name for row in found], seen)
        ends = np.zeros(len(found) + 1, np.int64)
        np.cumsum([int(np.prod(row.shape)) for row in found], out=ends[1:])
        memory = pa.allocate_buffer(int(4 * ends[-1]))
        weights = np.frombuffer(memory, np.float32)
        for row, begin, end in zip(found, ends[:-1].tolist(), ends[1:].tolist(), strict=True):
            decode_row(row, weights[begin:end])
        values = pa.Array.from_buffers(pa.float32(), len(weights), [None, memory])
        lists = pa.Array.from_buffers(schema.types[1], len(found), [None, pa.py_buffer(ends)], children=[values])
        columns = [pa.array([row.name for row in found], pa.string()), lists]
        columns.append(pa.array([list(row.shape) for row in found], schema.types[2]))
        made.append(pa.RecordBatch.from_arrays(columns, schema=schema))
    return pa.Table.from_batches(made, schema)


def decode_row(row: Row, out: np.ndarray) -> None:
    """The weights of a row into `out`, contiguous float32 of as many elements."""
    scheme = row.scheme
    if scheme is None:
        out[...] = row.values.reshape(-1)
        return
    if not (native.available() and native_grouping.can_encode(scheme)):
        out[...] = np.asarray(dequantize(row_array(row))).reshape(-1)
        return
    assert row.scales is not None
    job = np.zeros(1, native_grouping.JOB)
    job["weights"], job["codes"], job["scales"] = out.ctypes.data, row.values.ctypes.data, row.scales.ctypes.data
    job["zeros"] = 0 if row.zeros is None else row.zeros.ctypes.data
    job["rows"], job["width"] = len(row.values), row.shape[-1]
    job["number"] = native_grouping.NUMBERS[out.dtype]
    job["wide"] = row.scales.dtype == np.float32
    native_grouping.describe(job, scheme)
    native_grouping.decode(job)


def row_array(row: Row) -> QuantArray:
    """A row as an array on the default device; on the CPU its memory is used as it lies where it is aligned.

    Raises:
      QuantizationError: the row is not quantized.
    """
    if row.scheme is None:
        raise QuantizationError(f"layer {row.name!r} is not quantized.")

    def put(part: np.ndarray) -> jax.Array:
        # `device_put` aliases memory that is aligned, and copies other.
        array: jax.Array = jax.device_put(part.reshape(*row.shape[:-1], part.shape[-1]))
        return array

    scales, zeros = (None if part is None else put(part) for part in (row.scales, row.zeros))
    return QuantArray(put(row.values), scales, zeros, row.scheme, row.shape)


def scale_dtype_named(name: str) -> np.dtype:
    """float16 or float32, by name.

    Raises:
      QuantizationError: any other.
    """
    if not isinstance(name, str) or name not in SCALE_DTYPES:
        raise QuantizationError(f"scale_dtype must be {' or '.join(SCALE_DTYPES)}, got {name!r}.")
    return SCALE_DTYPES[name]
