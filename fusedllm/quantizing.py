"""`quantize` and `dequantize`: from whatever holds weights to a quantized Arrow table, and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from fusedllm.errors import QuantizationError
from fusedllm.kernels.grouped import GroupedScheme
from fusedllm.qarray import QuantArray
from fusedllm.quant.encoder import ROUND, Plan, plan_rules
from fusedllm.quant.faces import (
    dequantize_table,
    quantize_batches,
    scale_dtype_named,
    table_metadata,
    with_report,
)
from fusedllm.quant.layers import Layers
from fusedllm.quant.methods import method_named, quantize_matrix
from fusedllm.quant.report import QuantizeReport
from fusedllm.quant.schemes import scheme_named
from fusedllm.quant.table import is_quantized, table_schema
from fusedllm.weights import registry
from fusedllm.weights.checkpoint import Checkpoint
from fusedllm.weights.files import write_atomically
from fusedllm.weights.load import wanted_tensors
from fusedllm.weights.open import open_checkpoint
from fusedllm.weights.quantized import description

DEFAULT_SCHEME = "int4-g64"
_PARQUET, _ARROW_FILE = b"PAR1", b"ARROW1"


def quantize(
    source: Any,
    scheme: str = DEFAULT_SCHEME,
    *,
    method: str = ROUND,
    rules: Mapping[str, str] | None = None,
    model: str | Path | None = None,
    scale_dtype: str = "float16",
    report: QuantizeReport | None = None,
    streaming: bool | None = None,
    progress: bool = False,
) -> Any:
    """Weights as a quantized Arrow table (`docs/arrow-format.md`), in one pass and without copies of aligned input.

    Args:
      source: a table of weights: one row a layer with `layer_name`, `weights` (lists of float32, float16, float64 or,
        so named by the metadata, bfloat16; tensors of fixed shape; or bytes beside a column `dtype`) and, where it
        can't be derived, `shape`. A `pyarrow` table or batch, or whatever speaks the Arrow PyCapsule protocol (polars,
        DuckDB, pandas). A `RecordBatchReader` is read batch by batch as the result is. A mapping from names to arrays.
        A path: of an Arrow or Parquet file with such a table, or of a checkpoint, or a model's name.
      scheme: of all matrices that no rule names; docs/quantization.md lists them.
      method: how codes are chosen.
      rules: regular expressions of names, and the scheme, or `keep`, of the layers that they find; the first decides.
      model: whose weights they are: a name or path that says the configuration and the tokenizer, so that
        `fusedllm.load` can run the result. A checkpoint says it itself.
      scale_dtype: `float16` or `float32`, of scales and zero points.
      report: is filled in as layers are done; tables carry theirs (`fusedllm.quantize_report`).
      streaming: return a `RecordBatchReader`, whose batches are made as they are asked for, with one layer of a
        checkpoint in memory at a time; by default where `source` is one.
      progress: show a progress bar on standard error.

    Returns:
      A `pyarrow.Table`, or a `RecordBatchReader`.

    Raises:
      QuantizationError: an unknown scheme or method, or a layer that can't be quantized, by its name.
      SourceError, CheckpointError: a path or name that can't be opened.
    """
    plan = _plan(scheme, method, rules, scale_dtype)
    report = QuantizeReport() if report is None else report
    opened = _open(source, progress)
    carried = dict(opened.metadata)
    if model is not None:
        carried |= description(open_checkpoint(registry.resolve(model, progress=progress)))
    metadata = table_metadata(plan, scheme, carried)
    schema = table_schema(plan.scale_dtype, metadata)
    shown = tqdm(opened.batches, total=opened.count, desc="quantizing", unit="batch", disable=not progress, leave=False)
    batches = quantize_batches(shown, plan, metadata, report)
    if opened.streams if streaming is None else streaming:
        return pa.RecordBatchReader.from_batches(schema, batches)
    table = pa.Table.from_batches(list(batches), schema)
    if table.num_rows == 0:
        raise QuantizationError("the table is empty: there is no layer to quantize.")
    return with_report(table, report)


def quantize_file(
    source: Any,
    destination: str | Path,
    scheme: str = DEFAULT_SCHEME,
    *,
    force: bool = False,
    report: QuantizeReport | None = None,
    **options: Any,
) -> Path:
    """As `quantize`, into an Arrow (`.arrow`) or Parquet (`.parquet`) file, with one layer of a checkpoint in memory.

    The file is whole or not there. `options` are those of `quantize`.

    Raises:
      CheckpointError: the file exists and `force` is off, or can't be written; and what `quantize` raises.
    """
    path = Path(destination).expanduser()
    report = QuantizeReport() if report is None else report
    with write_atomically(path, force=force) as temporary:
        if not isinstance(source, (Checkpoint, str, Path)):
            source = _reader(source)
        made = quantize(source, scheme, report=report, streaming=True, **options)
        if path.suffix == ".parquet":
            with pq.ParquetWriter(temporary, made.schema) as writer:
                for batch in made:
                    writer.write_batch(batch)
        else:
            with pa.ipc.new_file(str(temporary), made.schema) as writer:
                for batch in made:
                    writer.write_batch(batch)
    return path


def dequantize(source: Any) -> pa.Table:
    """The float32 weights of a quantized table: `layer_name`, `weights: large_list<float32>`, `shape`.

    `source` is a table, a reader, whatever speaks the Arrow PyCapsule stream protocol, or the path of an Arrow or
    Parquet file.

    Raises:
      QuantizationError: it is no quantized table, or contradicts itself; the message names the layer.
    """
    if isinstance(source, (str, Path)):
        source = _table_at(Path(source))
    return dequantize_table(_reader(source))


def _plan(scheme: str, method: str, rules: Mapping[str, str] | None, scale_dtype: str) -> Plan:
    numbers = scale_dtype_named(scale_dtype)
    how = method_named(method)
    if how.needs_calibration:
        raise QuantizationError(f"the method {how} needs a model and calibration text.")

    def choose(name: str, weights: jax.Array, scheme: GroupedScheme) -> QuantArray:
        return quantize_matrix(weights, scheme, how, scale_dtype=numbers)

    is_rounding = str(how) == ROUND
    return Plan(scheme_named(scheme), plan_rules(rules), str(how), None if is_rounding else choose, numbers)


class _Opened:
    """Layers by batches, how many of those there are, what the source says of itself, and whether it is a stream."""

    def __init__(
        self, batches: Iterable[Layers], count: int | None, metadata: Mapping[bytes, bytes], streams: bool = False
    ) -> None:
        self.batches = batches
        self.count = count
        self.metadata = metadata
        self.streams = streams


def _open(source: Any, progress: bool) -> _Opened:
    if isinstance(source, Checkpoint):
        return _of_checkpoint(source)
    if isinstance(source, (str, Path)):
        path = Path(source).expanduser()
        table = _table_at(path) if path.is_file() else None
        if table is None or b"fusedllm.config" in (table.schema.metadata or {}):
            return _of_checkpoint(open_checkpoint(registry.resolve(source, progress=progress)))
        source = table
    if isinstance(source, Mapping):
        layers = Layers()
        for name, weights in source.items():
            layers.add_array(name, weights)
        return _Opened([layers], 1, {})
    reader = _reader(source)
    if is_quantized(reader.schema):
        raise QuantizationError("the table is quantized already; fusedllm.dequantize gives its weights back.")
    metadata = reader.schema.metadata or {}
    if isinstance(source, pa.RecordBatchReader):
        return _Opened(_each(reader), None, metadata, streams=True)
    layers = Layers()
    for batch in reader:
        layers.add_batch(batch)
    return _Opened([layers] if len(layers) else [], 1, metadata)


def _each(reader: Iterable[pa.RecordBatch]) -> Iterator[Layers]:
    for batch in reader:
        layers = Layers()
        layers.add_batch(batch)
        if len(layers):
            yield layers


def _of_checkpoint(checkpoint: Checkpoint) -> _Opened:
    names = wanted_tensors(checkpoint)

    def batches() -> Iterator[Layers]:
        for name in names:
            layers = Layers()
            layers.add_array(name, checkpoint.tensors[name].read())
            yield layers
            # The pages of what has been read are not read again.
            checkpoint.release()

    return _Opened(batches(), len(names), description(checkpoint))


def _reader(source: Any) -> pa.RecordBatchReader:
    if isinstance(source, pa.RecordBatchReader):
        return source
    if isinstance(source, pa.RecordBatch):
        return pa.RecordBatchReader.from_batches(source.schema, [source])
    if isinstance(source, pa.Table):
        return source.to_reader()
    if hasattr(source, "__arrow_c_stream__"):
        return pa.RecordBatchReader.from_stream(source)
    raise QuantizationError(
        f"weights come as an Arrow table (or what speaks its stream protocol), a mapping from names to arrays, or a "
        f"path, got {type(source).__name__}."
    )


def _table_at(path: Path) -> pa.Table | None:
    """The table in an Arrow or Parquet file, mapped; `None` for any other file."""
    try:
        with path.open("rb") as file:
            head = file.read(8)
        if head.startswith(_PARQUET):
            return pq.read_table(path)
        if head.startswith(_ARROW_FILE):
            return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        return None
    except (pa.ArrowException, OSError) as error:
        raise QuantizationError(f"{path} can't be read: {' '.join(str(error).split())[:200].rstrip('.')}.") from error
