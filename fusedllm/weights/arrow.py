"""Checkpoints as an Arrow IPC file: any Arrow library reads it, and on the CPU its tensors are used where they lie.

Layout (https://arrow.apache.org/docs/format/Columnar.html): the columns of `SCHEMA`, one record batch of one row per
tensor. Arrow libraries put a buffer anywhere modulo 8, so each batch's metadata is padded until the bytes of its
tensor begin on a multiple of `ALIGNMENT` in the file, which is what XLA asks of memory that it uses without a copy.
The schema's metadata carries the format version, the configuration, the tokenizer and a digest of all of that and of
every tensor's name, dtype and shape; each batch's metadata says at which byte of the file its tensor begins.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pyarrow as pa

from fusedllm.config import ModelConfig
from fusedllm.errors import CheckpointError, FusedLLMError
from fusedllm.quant.table import is_quantized
from fusedllm.text.data import TokenizerData
from fusedllm.weights import quantized
from fusedllm.weights.checkpoint import Checkpoint, LazyTensor
from fusedllm.weights.mapped import map_file, release_pages

FORMAT_VERSION = 1
ALIGNMENT = 64
MAGIC = b"ARROW1"
# Bytes: magic at both ends, and what lies between.
SHORTEST = 32

# `weights` comes first: with it the body of a batch begins with its two offsets and then the tensor itself.
SCHEMA = pa.schema(
    [
        ("weights", pa.large_binary()),
        ("layer_name", pa.string()),
        ("dtype", pa.string()),
        ("shape", pa.list_(pa.int64())),
    ]
)
DTYPES = {
    str(np.dtype(kind)): np.dtype(kind)
    for kind in (np.float32, np.float16, ml_dtypes.bfloat16, np.int8, np.uint8, np.int16, np.int32, np.int64)
}

_VERSION, _CONFIG, _TOKENIZER, _DIGEST, _OFFSET, _PADDING = (
    f"fusedllm.{key}".encode() for key in ("format_version", "config", "tokenizer", "digest", "offset", "padding")
)
_OFFSETS_BYTES = 2 * 8


def write(checkpoint: Checkpoint, path: Path) -> None:
    """Writes `checkpoint` to `path`, one tensor in memory at a time. Not atomic: `convert` is.

    Raises:
      CheckpointError: a tensor whose dtype has no name here, or that does not read as it was announced.
      OSError: the file can't be written.
    """
    for tensor in checkpoint.tensors.values():
        if str(tensor.dtype) not in DTYPES:
            raise CheckpointError(f"{tensor.name} is {tensor.dtype}, which an Arrow checkpoint can't hold.")
    claims = [(tensor.name, str(tensor.dtype), tensor.shape) for tensor in checkpoint.tensors.values()]
    config = json.dumps(checkpoint.config.to_dict())
    tokenizer = checkpoint.tokenizer.to_json() if checkpoint.tokenizer else None
    metadata: dict[bytes, str | bytes] = {_VERSION: str(FORMAT_VERSION), _CONFIG: config}
    if tokenizer is not None:
        metadata[_TOKENIZER] = tokenizer
    metadata[_DIGEST] = _digest(config, tokenizer, claims)
    schema = SCHEMA.with_metadata(metadata)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        # The writer emits the magic (padded to 8 bytes) and the schema with the first batch, not before.
        position = len(MAGIC) + 2 + schema.serialize().size
        lengths = _message_lengths()
        for tensor in checkpoint.tensors.values():
            values = np.ascontiguousarray(tensor.read())
            if values.shape != tensor.shape or values.dtype != tensor.dtype:
                raise CheckpointError(
                    f"{tensor.name} was announced as {tensor.dtype}{list(tensor.shape)} "
                    f"and read as {values.dtype}{list(values.shape)}."
                )
            padding = next(p for p, n in lengths.items() if (position + n + _OFFSETS_BYTES) % ALIGNMENT == 0)
            offset = position + lengths[padding] + _OFFSETS_BYTES
            writer.write_batch(_batch(tensor.name, values), custom_metadata=_batch_metadata(offset, padding))
            position = sink.tell()
    # Opening it checks every offset that was just computed, and reads no tensor.
    read(path)


def read(path: Path) -> Checkpoint:
    """The checkpoint in the Arrow file at `path`, memory-mapped; each `read()` is a read-only view of the map.

    Tables with these columns that another program wrote are read too, whatever their alignment, as long as their
    schema's metadata carries the configuration.

    Raises:
      CheckpointError: not an Arrow file, truncated, of a newer format version, or anything in it that contradicts
        itself: an unknown dtype, a shape that its bytes don't fit, a name that is missing or occurs twice.
    """
    try:
        return _read(path)
    except CheckpointError:
        raise
    except FusedLLMError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist.") from error
    except (pa.ArrowException, OSError, ValueError, MemoryError, OverflowError) as error:
        raise CheckpointError(f"{path} is not a whole Arrow IPC file: {_one_line(error)}.") from error


def _read(path: Path) -> Checkpoint:
    if path.stat().st_size < SHORTEST:
        raise CheckpointError(f"{path} is not an Arrow IPC file: it has {path.stat().st_size} bytes.")
    data = map_file(path, SHORTEST, "Arrow IPC")
    _check_frame(path, data)
    memory = pa.py_buffer(data)
    reader = pa.ipc.open_file(memory)
    if is_quantized(reader.schema):
        return quantized.of_batches(reader, path)
    metadata: Mapping[bytes, bytes] = reader.schema.metadata or {}
    _check_version(path, metadata)
    columns = _columns(path, reader.schema)
    if _CONFIG not in metadata:
        raise CheckpointError(f"{path} is an Arrow table without {_CONFIG.decode()!r} in its schema's metadata.")
    tensors: dict[str, LazyTensor] = {}
    for index in range(reader.num_record_batches):
        batch, batch_metadata = reader.get_batch_with_custom_metadata(index)
        batch.validate(full=True)
        for row in range(batch.num_rows):
            weights = _cell(batch.column(columns[0]), row)
            texts = [batch.column(column)[row].as_py() for column in columns[1:]]
            tensor, address = _tensor(path, [weights, *texts], memory)
            _check_offset(path, tensor.name, address - memory.address, batch_metadata)
            if tensors.setdefault(tensor.name, tensor) is not tensor:
                raise CheckpointError(f"{path} holds {tensor.name!r} twice.")
    config, tokenizer = metadata[_CONFIG].decode(), metadata.get(_TOKENIZER)
    text = None if tokenizer is None else tokenizer.decode()
    claims = [(tensor.name, str(tensor.dtype), tensor.shape) for tensor in tensors.values()]
    if _DIGEST in metadata and metadata[_DIGEST].decode() != _digest(config, text, claims):
        raise CheckpointError(
            f"{path} is damaged: its configuration, tokenizer or list of tensors is not the one that was written."
        )
    return Checkpoint(
        config=ModelConfig.from_dict(json.loads(config)),
        tensors=tensors,
        tokenizer=None if text is None else TokenizerData.from_json(text),
        format="arrow",
        path=path,
        release=functools.partial(release_pages, data),
    )


def _tensor(path: Path, row: list[Any], memory: pa.Buffer) -> tuple[LazyTensor, int]:
    for value, field in zip(row, SCHEMA.names, strict=True):
        if value is None:
            raise CheckpointError(f"{path} has a row without {field!r}.")
    weights, name, dtype_name, shape_list = row
    if dtype_name not in DTYPES:
        raise CheckpointError(f"{path}: {name!r} has the unknown dtype {dtype_name!r}; known are: {', '.join(DTYPES)}.")
    dtype, shape = DTYPES[dtype_name], tuple(shape_list)
    if any(size is None or size < 1 for size in shape):
        raise CheckpointError(f"{path}: {name!r} has the shape {list(shape)}, whose sizes must be positive.")
    if math.prod(shape) * dtype.itemsize != weights.size:
        raise CheckpointError(
            f"{path}: {name!r} is {dtype}{list(shape)}, which takes {math.prod(shape) * dtype.itemsize} bytes, "
            f"and holds {weights.size}."
        )
    if not memory.address <= weights.address <= weights.address + weights.size <= memory.address + memory.size:
        raise CheckpointError(f"{path} is compressed; write it without compression, so that it can be mapped.")
    view = functools.partial(_view, weights, dtype, shape)
    return LazyTensor(name=name, shape=shape, dtype=dtype, nbytes=weights.size, read=view), weights.address


def _cell(column: pa.Array, row: int) -> pa.Buffer | None:
    # A binary scalar owns a copy of its bytes, even one asked for as a buffer; a slice of the column's buffer doesn't.
    if column.slice(row, 1).null_count:
        return None
    _, offsets, data = column.buffers()
    width = np.int64 if pa.types.is_large_binary(column.type) else np.int32
    begin, end = np.frombuffer(offsets, width)[column.offset + row :][:2].tolist()
    return pa.py_buffer(b"") if data is None else data.slice(begin, end - begin)


def _view(buffer: pa.Buffer, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    array = np.frombuffer(buffer, dtype=np.uint8)
    if buffer.address % dtype.itemsize:
        array = array.copy()
        array.flags.writeable = False
    return array.view(dtype).reshape(shape)


def _check_offset(path: Path, name: str, found: int, metadata: Mapping[bytes, bytes] | None) -> None:
    # Only our own writer leaves this key, and a library that rewrites the table drops it: the one reliable mark.
    written = (metadata or {}).get(_OFFSET)
    if written is None:
        return
    if found % ALIGNMENT or written != b"%020d" % found:
        raise CheckpointError(
            f"{path} is damaged: {name!r} was written at byte {written.decode(errors='replace')} of the file, "
            f"and is said to be at byte {found}."
        )


def _check_frame(path: Path, data: np.ndarray) -> None:
    if data[: len(MAGIC)].tobytes() != MAGIC:
        raise CheckpointError(f"{path} is not an Arrow IPC file: it does not begin with {MAGIC.decode()}.")
    if data[-len(MAGIC) :].tobytes() != MAGIC:
        raise CheckpointError(f"{path} is truncated: an Arrow IPC file ends with {MAGIC.decode()}.")


def _check_version(path: Path, metadata: Mapping[bytes, bytes]) -> None:
    text = metadata.get(_VERSION, b"1").decode(errors="replace")
    if not text.isdecimal():
        raise CheckpointError(f"{path} has the format version {text!r}, which is not a number.")
    if int(text) > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {int(text)}; this fusedllm reads up to {FORMAT_VERSION}: install a newer one."
        )


def _columns(path: Path, schema: pa.Schema) -> list[int]:
    kinds = {
        "weights": (pa.types.is_large_binary, pa.types.is_binary),
        "layer_name": (pa.types.is_string, pa.types.is_large_string),
        "dtype": (pa.types.is_string, pa.types.is_large_string),
        "shape": (lambda kind: pa.types.is_list(kind) and pa.types.is_int64(kind.value_type),),
    }
    found = []
    for name, accepted in kinds.items():
        index = schema.get_field_index(name)
        if index < 0 or not any(is_kind(schema.field(index).type) for is_kind in accepted):
            raise CheckpointError(
                f"{path} is an Arrow table, and not of weights: it needs one column {name!r} of type "
                f"{SCHEMA.field(name).type}; it has {', '.join(f'{f.name}: {f.type}' for f in schema)}."
            )
        found.append(index)
    return found


def _batch(name: str, values: np.ndarray) -> pa.RecordBatch:
    data = pa.py_buffer(values.reshape(-1).view(np.uint8))
    offsets = pa.py_buffer(np.array([0, data.size], np.int64))
    weights = pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, data])
    shape = pa.array([list(values.shape)], pa.list_(pa.int64()))
    return pa.record_batch([weights, [name], [str(values.dtype)], shape], names=SCHEMA.names)


def _batch_metadata(offset: int, padding: int) -> dict[bytes, bytes]:
    return {_OFFSET: b"%020d" % offset, _PADDING: b" " * padding}


@functools.cache
def _message_lengths() -> dict[int, int]:
    """Bytes of a batch's message, without its body, by the length of its padding; data and names don't matter."""
    batch = _batch("", np.zeros(1, np.float32))
    lengths = {}
    for padding in range(0, ALIGNMENT + 8, 8):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch, custom_metadata=_batch_metadata(0, padding))
        message = memoryview(sink.getvalue())[batch.schema.serialize().size :]
        # An encapsulated message: a continuation mark, the length of its metadata as int32, the metadata, the body.
        lengths[padding] = 8 + struct.unpack_from("<i", message, 4)[0]
    return lengths


def _digest(config: str, tokenizer: str | None, claims: Iterable[tuple[str, str, tuple[int, ...]]]) -> str:
    text = json.dumps([config, tokenizer, sorted((name, dtype, list(shape)) for name, dtype, shape in claims)])
    return hashlib.sha256(text.encode()).hexdigest()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200].rstrip(".")
