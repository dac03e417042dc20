"""Quantized tables as checkpoints: what `fusedllm.quantize` made, in memory or in an Arrow file."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from fusedllm.config import ModelConfig
from fusedllm.errors import CheckpointError
from fusedllm.qarray import QuantArray
from fusedllm.quant.faces import decode_row
from fusedllm.quant.table import Row, is_quantized, rows
from fusedllm.text.data import TokenizerData
from fusedllm.weights.checkpoint import Checkpoint, LazyTensor

CONFIG_KEY, TOKENIZER_KEY = b"fusedllm.config", b"fusedllm.tokenizer"


def description(checkpoint: Checkpoint) -> dict[bytes, bytes]:
    """What a table's metadata says of a model: its configuration, and its tokenizer where it has one."""
    found = {CONFIG_KEY: json.dumps(checkpoint.config.to_dict()).encode()}
    if checkpoint.tokenizer is not None:
        found[TOKENIZER_KEY] = checkpoint.tokenizer.to_json().encode()
    return found


def of_table(table: pa.Table) -> Checkpoint:
    """A quantized table as a checkpoint; its tensors are views of the table's memory.

    Raises:
      CheckpointError: the table is not quantized, or says nothing of its model.
      QuantizationError: a row contradicts itself.
    """
    if not is_quantized(table.schema):
        raise CheckpointError(
            "this table is not quantized and can't be run; fusedllm.quantize makes one that can (with `model=`)."
        )
    return _checkpoint(table.schema.metadata or {}, table.to_batches(), Path("table"))


def of_batches(reader: pa.RecordBatchFileReader, path: Path) -> Checkpoint:
    """The quantized table in an Arrow file as a checkpoint; raises as `of_table`."""
    batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
    return _checkpoint(reader.schema.metadata or {}, batches, path)


def _checkpoint(metadata: Mapping[bytes, bytes], batches: Iterable[pa.RecordBatch], path: Path) -> Checkpoint:
    if CONFIG_KEY not in metadata:
        raise CheckpointError(
            f"the quantized {path} does not say which model it is of; quantize it with `model=`, or from a checkpoint."
        )
    tensors: dict[str, LazyTensor] = {}
    for batch in batches:
        for row in rows(batch):
            if row.name in tensors:
                raise CheckpointError(f"the quantized {path} holds {row.name!r} twice.")
            tensors[row.name] = _tensor(row)
    tokenizer = metadata.get(TOKENIZER_KEY)
    return Checkpoint(
        config=ModelConfig.from_dict(json.loads(metadata[CONFIG_KEY])),
        tensors=tensors,
        tokenizer=None if tokenizer is None else TokenizerData.from_json(tokenizer.decode()),
        format="quantized",
        path=path,
    )


def _tensor(row: Row) -> LazyTensor:
    parts = [part for part in (row.values, row.scales, row.zeros) if part is not None]
    nbytes = sum(part.nbytes for part in parts)
    if row.scheme is None:
        return LazyTensor(row.name, row.shape, row.values.dtype, nbytes, lambda: row.values)
    return LazyTensor(
        name=row.name,
        shape=row.shape,
        dtype=np.dtype(np.float32),
        nbytes=nbytes,
        read=functools.partial(_decoded, row),
        quantization=row.scheme.name,
        read_quantized=functools.partial(_blocks, row),
    )


def _decoded(row: Row) -> np.ndarray:
    values = np.empty(row.shape, np.float32)
    decode_row(row, values.reshape(-1))
    return values


def _blocks(row: Row) -> QuantArray:
    """The buffers as they lie: who loads them puts them where they are to stay."""
    assert row.scheme is not None
    lead = row.shape[:-1]
    values, scales, zeros = (
        None if part is None else part.reshape(*lead, part.shape[-1]) for part in (row.values, row.scales, row.zeros)
    )
    return QuantArray(values, scales, zeros, row.scheme, row.shape)  # type: ignore[arg-type]
