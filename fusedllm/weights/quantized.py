"""Quantized tables as checkpoints: what `fusedllm.quantize` made, in memory or in a file."""

from __future__ import annotations

import dataclasses
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

# What `Checkpoint.format` says of all of them, whatever file they are in.
FORMAT = "quantized"
# The path of what has none, as messages say it.
IN_MEMORY = Path("the table")
CONFIG_KEY, TOKENIZER_KEY = b"fusedllm.config", b"fusedllm.tokenizer"


def description(checkpoint: Checkpoint) -> dict[bytes, bytes]:
    """What a table's metadata says of a model: its configuration, and its tokenizer where it has one."""
    found = {CONFIG_KEY: json.dumps(checkpoint.config.to_dict()).encode()}
    if checkpoint.tokenizer is not None:
        found[TOKENIZER_KEY] = checkpoint.tokenizer.to_json().encode()
    return found


def model_in(metadata: Mapping[bytes, bytes], path: Path) -> Checkpoint | None:
    """The model that the metadata of the table at `path` describe, without tensors; `None` where they do not.

    Raises:
      CheckpointError, ConfigError, TokenizerError: what they say can't be understood.
    """
    if CONFIG_KEY not in metadata:
        return None
    tokenizer = metadata.get(TOKENIZER_KEY)
    try:
        config, text = json.loads(metadata[CONFIG_KEY]), None if tokenizer is None else tokenizer.decode()
    except ValueError as error:
        raise CheckpointError(f"the metadata of {path} hold no text that describes a model: {error}.") from error
    return Checkpoint(
        config=ModelConfig.from_dict(config),
        tensors={},
        tokenizer=None if text is None else TokenizerData.from_json(text),
        format=FORMAT,
        path=path,
    )


def check_schema(schema: pa.Schema, path: Path) -> None:
    """Refuses the schema of a table that is no checkpoint.

    Raises:
      CheckpointError: the table is not quantized, or says nothing of its model.
    """
    if not is_quantized(schema):
        raise CheckpointError(
            f"{path} is not quantized and can't be run; fusedllm.quantize makes a table that can (with `model=`)."
        )
    if CONFIG_KEY not in (schema.metadata or {}):
        raise CheckpointError(
            f"{path} does not say which model it is of; quantize the weights with `model=`, or from a checkpoint."
        )


def of_table(table: pa.Table, path: Path = IN_MEMORY) -> Checkpoint:
    """A quantized table as a checkpoint; its tensors are views of the table's memory.

    Raises:
      CheckpointError: the table is not quantized, or says nothing of its model.
      QuantizationError: a row contradicts itself.
    """
    return _checkpoint(table.schema, table.to_batches(), path)


def of_batches(reader: pa.RecordBatchFileReader, path: Path) -> Checkpoint:
    """The quantized table in an Arrow file as a checkpoint; raises as `of_table`."""
    batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
    return _checkpoint(reader.schema, batches, path)


def _checkpoint(schema: pa.Schema, batches: Iterable[pa.RecordBatch], path: Path) -> Checkpoint:
    check_schema(schema, path)
    model = model_in(schema.metadata, path)
    assert model is not None
    tensors: dict[str, LazyTensor] = {}
    for batch in batches:
        for row in rows(batch):
            if row.name in tensors:
                raise CheckpointError(f"{path} holds {row.name!r} twice.")
            tensors[row.name] = _tensor(row)
    return dataclasses.replace(model, tensors=tensors)


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
