"""What holds weights, opened: a table, a stream, a mapping, a file or a checkpoint as batches of `Layers`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fusedllm.errors import QuantizationError
from fusedllm.quant.layers import Layers, check_names
from fusedllm.quant.table import is_quantized
from fusedllm.weights import registry
from fusedllm.weights.checkpoint import Checkpoint, LazyTensor
from fusedllm.weights.load import wanted_tensors
from fusedllm.weights.open import open_checkpoint
from fusedllm.weights.quantized import CONFIG_KEY, FORMAT, IN_MEMORY, description, model_in

_QUANTIZED_ALREADY = "the table is quantized already: quantize the weights that fusedllm.dequantize gives back."

# How files begin: a stream with the mark of a message, which the file format has later.
_PARQUET, _ARROW_FILE, _ARROW_STREAM = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"


@dataclass(frozen=True, slots=True)
class Opened:
    """What was opened.

    Attributes:
      batches: layers, read as they are asked for.
      count: how many batches there are, or `None` where nobody knows.
      metadata: what the source says of itself.
      streams: it is a stream, and the result should be one.
      checkpoint: the source itself, where it is one.
    """

    batches: Iterable[Layers]
    count: int | None
    metadata: Mapping[bytes, bytes]
    streams: bool = False
    checkpoint: Checkpoint | None = None


def open_layers(source: Any, progress: bool) -> Opened:
    """Opens a table, a stream, a mapping from names to arrays, or what lies at a path or has a name.

    Raises:
      QuantizationError: it holds no weights that could be quantized.
      SourceError, CheckpointError: a path or name that can't be opened.
    """
    if isinstance(source, Checkpoint):
        return _of_checkpoint(source)
    if isinstance(source, (str, Path)):
        path = Path(source).expanduser()
        table = table_at(path) if path.is_file() else None
        if table is None or _is_checkpoint(table, path):
            return _of_checkpoint(open_checkpoint(registry.resolve(source, progress=progress)))
        source = table
    if isinstance(source, Mapping):
        layers = Layers()
        for name, weights in source.items():
            layers.add_array(name, weights)
        return Opened([layers], 1, {})
    reader = reader_of(source)
    if is_quantized(reader.schema):
        raise QuantizationError(_QUANTIZED_ALREADY)
    metadata = reader.schema.metadata or {}
    if isinstance(source, pa.RecordBatchReader):
        return Opened(_each(reader), None, metadata, streams=True)
    layers = Layers()
    for batch in reader:
        layers.add_batch(batch)
    return Opened([layers] if len(layers) else [], 1, metadata)


def _each(reader: Iterable[pa.RecordBatch]) -> Iterator[Layers]:
    for batch in reader:
        layers = Layers()
        layers.add_batch(batch)
        if len(layers):
            yield layers


def _of_checkpoint(checkpoint: Checkpoint) -> Opened:
    if checkpoint.format == FORMAT:
        raise QuantizationError(_QUANTIZED_ALREADY)
    names = wanted_tensors(checkpoint)

    def batches() -> Iterator[Layers]:
        for name in names:
            layers = Layers()
            layers.add_array(name, checkpoint.tensors[name].read())
            yield layers
            # The pages of what has been read are not read again.
            checkpoint.release()

    return Opened(batches(), len(names), description(checkpoint), checkpoint=checkpoint)


def with_layers(whose: Checkpoint | None, opened: Opened) -> Checkpoint:
    """The model `whose`, or else the one that a table describes itself, with the weights of the table, by their names.

    Raises:
      QuantizationError: nobody said whose weights they are.
      CheckpointError: the model needs other tensors.
      ConfigError, TokenizerError: what the table says of its model can't be understood.
    """
    whose = model_in(opened.metadata, IN_MEMORY) if whose is None else whose
    if whose is None:
        raise QuantizationError("a calibration runs the model: say whose weights these are (`model=`).")
    tensors: dict[str, LazyTensor] = {}
    seen: set[str] = set()
    for layers in opened.batches:
        check_names(layers.names, seen)
        for index, name in enumerate(layers.names):
            view = layers.view(index)
            tensors[name] = LazyTensor(name, view.shape, view.dtype, view.nbytes, functools.partial(np.asarray, view))
    checkpoint = dataclasses.replace(whose, tensors=tensors)
    wanted_tensors(checkpoint)
    return checkpoint


def reader_of(source: Any) -> pa.RecordBatchReader:
    """A stream of batches of whatever speaks Arrow.

    Raises:
      QuantizationError: it does not.
    """
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


def says_model(source: str | Path) -> bool:
    """Whether what has a name or lies at a path says which model it is of; no weights are read."""
    path = Path(source).expanduser()
    table = table_at(path, with_rows=False) if path.is_file() else None
    return table is None or CONFIG_KEY in (table.schema.metadata or {})


def table_at(path: Path, with_rows: bool = True) -> pa.Table | None:
    """The table in an Arrow file (mapped), an Arrow stream or a Parquet file; `None` for any other file.

    Without its rows only the schema is read.

    Raises:
      QuantizationError: the file can't be read.
    """
    try:
        with path.open("rb") as beginning:
            head = beginning.read(8)
        if head.startswith(_PARQUET):
            # As one file: its directory's name is no column.
            with pq.ParquetFile(path) as file:
                return _named(file.read() if with_rows else file.schema_arrow.empty_table())
        opened = {_ARROW_FILE: pa.ipc.open_file, _ARROW_STREAM: pa.ipc.open_stream}
        for start, open_reader in opened.items():
            if head.startswith(start):
                reader = open_reader(pa.memory_map(str(path)))
                return _named(reader.read_all() if with_rows else reader.schema.empty_table())
        return None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise QuantizationError(f"{path} can't be read: {' '.join(str(error).split())[:200].rstrip('.')}.") from error


def _is_checkpoint(table: pa.Table, path: Path) -> bool:
    """Whether the table of a file is one of our checkpoints, and not just any that says which model it is of."""
    with path.open("rb") as beginning:
        if CONFIG_KEY not in (table.schema.metadata or {}) or beginning.read(8)[:6] != _ARROW_FILE:
            return False
    return is_quantized(table.schema) or {"weights", "dtype", "shape"} <= set(table.schema.names)


def _named(table: pa.Table) -> pa.Table:
    # Names of columns in a damaged file may be no UTF-8, which shows when they are looked at.
    table.schema.names  # noqa: B018
    return table
