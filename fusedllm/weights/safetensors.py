"""HF directories: `config.json` with safetensors files, one or several; read as views of the memory map, and written.

The header is parsed here, not by the `safetensors` library: its NumPy face copies every tensor and has no bfloat16.
Format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from fusedllm.config import ModelConfig
from fusedllm.errors import CheckpointError
from fusedllm.model.attributes import shortened
from fusedllm.model.families import config_from_hf, config_to_hf
from fusedllm.weights import compressed_tensors, gptq
from fusedllm.weights.checkpoint import Checkpoint, LazyTensor
from fusedllm.weights.compressed_tensors_config import METHOD
from fusedllm.weights.compressed_tensors_write import compress
from fusedllm.weights.files import disk_errors
from fusedllm.weights.grouped_codes import SCALES
from fusedllm.weights.mapped import MAX_JSON_BYTES, array_at, map_file, parse_json_object, read_json_object

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"

_DTYPES: Mapping[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "U8": np.dtype(np.uint8),
    "U16": np.dtype(np.uint16),
    "U32": np.dtype(np.uint32),
    "U64": np.dtype(np.uint64),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LENGTH_BYTES = 8
_ALIGNMENT = 64
_MAX_RANK = 8

# By the `quant_method` of a quantization_config; others are refused with the rest of the configuration.
_QUANTIZED: Mapping[str, Callable[[Mapping[str, Any], Mapping[str, LazyTensor]], dict[str, LazyTensor]]] = {
    METHOD: compressed_tensors.read,
    "gptq": gptq.read_gptq,
    "awq": gptq.read_awq,
}
# Where AutoGPTQ put its quantization_config before transformers knew of it.
_GPTQ_CONFIG = "quantize_config.json"

# Buffers that old checkpoints carry although they follow from the configuration.
_DERIVED = ".rotary_emb.inv_freq"


def read(path: Path) -> Checkpoint:
    """The checkpoint in a HF directory, or of one `.safetensors` file with `config.json` beside it.

    Tensors are views of the memory map: nothing is copied until somebody computes with them. Matrices quantized by
    compressed-tensors, GPTQ or AWQ are grouped codes. A `lm_head.weight` that equals the embedding of a tied model is
    left out; where it differs the model is not tied, as in transformers.

    Raises:
      CheckpointError: a missing, truncated or malformed file, an index that does not fit its shards, a quantized matrix
        whose parts do not fit one another.
      ConfigError: a configuration that is invalid or not implemented.
      TokenizerError: tokenizer files that can't be read.
    """
    from fusedllm.text.tokenizer import from_hf_directory

    path = Path(path)
    directory = path if path.is_dir() else path.parent
    if not path.exists():
        raise CheckpointError(f"{path} does not exist.")
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory} holds no config.json, so the model's shape is unknown.")
    generation = directory / "generation_config.json"
    described = read_json_object(directory / "config.json")
    quantization = described.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    dequantizer = _QUANTIZED.get(method) if isinstance(method, str) else None
    if dequantizer is not None:
        del described["quantization_config"]
    config = config_from_hf(described, read_json_object(generation) if generation.is_file() else None)
    tensors = _read_directory(path) if path.is_dir() else _read_file(path)
    if quantization is None and (directory / _GPTQ_CONFIG).is_file() and any(n.endswith(".qweight") for n in tensors):
        quantization, dequantizer = read_json_object(directory / _GPTQ_CONFIG), gptq.read_gptq
    if dequantizer is not None and quantization is not None:
        tensors = dequantizer(quantization, tensors)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(_DERIVED)}
    config = _resolve_tying(config, tensors)
    return Checkpoint(config, tensors, from_hf_directory(directory), "safetensors", path)


def write(checkpoint: Checkpoint, path: Path) -> None:
    """Write `checkpoint` as a HF directory: `config.json`, `model.safetensors`, and the tokenizer's files.

    Matrices of grouped codes are written as compressed-tensors; those in GGUF's blocks are dequantized. One tensor is
    in memory at a time. Files are flushed to the disk; making the directory appear in one piece is the caller's, who
    gives a temporary path.

    Raises:
      CheckpointError: a file can't be written, a tensor is not what the checkpoint says, or compressed-tensors has no
        place for how it is quantized.
      ConfigError: the configuration can't be expressed as a HF `config.json`.
    """
    from fusedllm.text.tokenizer import write_hf_directory

    path = Path(path)
    config = config_to_hf(checkpoint.config)
    tensors, quantization = compress(checkpoint)
    if quantization is not None:
        config["quantization_config"] = quantization
    # Of a quantized matrix it is the dtype of its scales.
    stored = [tensor.dtype for tensor in tensors.values() if tensor.dtype in SCALES]
    if stored:
        config["torch_dtype"] = max(stored, key=stored.count).name
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        with (path / "config.json").open("wb") as file:
            file.write(json.dumps(config, indent=2).encode() + b"\n")
            _flush(file)
        with (path / _SINGLE).open("wb") as file:
            _write_tensors(tensors, file)
            _flush(file)
        if checkpoint.tokenizer is not None:
            write_hf_directory(checkpoint.tokenizer, path)


def _read_directory(directory: Path) -> dict[str, LazyTensor]:
    if (directory / _SINGLE).is_file():
        return _read_file(directory / _SINGLE)
    if not (directory / _INDEX).is_file():
        raise CheckpointError(f"{directory} holds neither {_SINGLE} nor {_INDEX}.")
    index = read_json_object(directory / _INDEX)
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()) or not shards:
        raise CheckpointError(f"{directory / _INDEX} has no 'weight_map' from tensor names to file names.")
    tensors: dict[str, LazyTensor] = {}
    for shard in sorted(set(shards.values())):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{_INDEX} names {shortened(shard)}, which is not a .safetensors file beside it.")
        if not (directory / shard).is_file():
            raise CheckpointError(f"{_INDEX} names the shard {shard}, which is not in {directory}.")
        found = _read_file(directory / shard)
        for name in found.keys() & tensors.keys():
            raise CheckpointError(f"the tensor {shortened(name)} is in two shards of {directory}.")
        for name, where in shards.items():
            if where == shard and name not in found:
                raise CheckpointError(f"{_INDEX} says that {shortened(name)} is in {shard}, where it is not.")
        tensors.update(found)
    return tensors


def _read_file(path: Path) -> dict[str, LazyTensor]:
    """The tensors of one file, each checked to lie where its header says, side by side and nowhere else."""
    data = map_file(path, _LENGTH_BYTES, "safetensors")
    length = int.from_bytes(data[:_LENGTH_BYTES].tobytes(), "little")
    if length > MAX_JSON_BYTES or data[_LENGTH_BYTES : _LENGTH_BYTES + 1].tobytes() != b"{":
        raise CheckpointError(f"{path} is not a safetensors file: it does not begin with a header.")
    start = _LENGTH_BYTES + length
    if start > len(data):
        raise CheckpointError(f"{path} is truncated: its header has {length} bytes, the file {len(data)}.")
    header = parse_json_object(data[_LENGTH_BYTES:start].tobytes(), f"the header of {path}")
    if not isinstance(header.pop("__metadata__", {}), dict):
        raise CheckpointError(f"'__metadata__' in the header of {path} is not an object.")
    end = 0
    tensors = {}
    for begin, stop, name, dtype, shape in sorted(
        (_entry(name, entry, path) for name, entry in header.items()), key=lambda entry: entry[:2]
    ):
        if begin != end:
            raise CheckpointError(
                f"the data of {shortened(name)} in {path} begins at byte {begin}, where {end} was expected: tensors "
                "overlap or leave a gap."
            )
        end = stop
        read_it = partial(array_at, data, start + begin, dtype, shape)
        tensors[name] = LazyTensor(name, shape, dtype, stop - begin, read_it)
    if start + end != len(data):
        state = "truncated" if start + end > len(data) else "not what its header describes"
        raise CheckpointError(f"{path} is {state}: its header accounts for {start + end} bytes, it has {len(data)}.")
    return tensors


def _entry(name: str, entry: Any, path: Path) -> tuple[int, int, str, np.dtype, tuple[int, ...]]:
    """One header entry as (first byte, end byte, name, dtype, shape)."""

    def natural(values: object, count: int | None = None) -> bool:
        return (
            isinstance(values, list)
            and (len(values) <= _MAX_RANK if count is None else len(values) == count)
            and all(isinstance(one, int) and not isinstance(one, bool) and 0 <= one < 2**63 for one in values)
        )

    where = f"the tensor {shortened(name)} in {path}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} is not described by dtype, shape and data_offsets.")
    dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        known = ", ".join(_DTYPES)
        raise CheckpointError(
            f"{where} has the dtype {shortened(entry['dtype'])}, which can't be read; known: {known}."
        )
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not natural(shape) or 0 in shape:
        raise CheckpointError(f"{where} has the shape {shortened(shape)}, which is not a list of positive sizes.")
    if not natural(offsets, 2):
        raise CheckpointError(f"{where} has the data_offsets {shortened(offsets)}, which are not two byte positions.")
    begin, stop = offsets
    nbytes = math.prod(shape) * dtype.itemsize
    if stop - begin != nbytes:
        raise CheckpointError(f"{where} takes {stop - begin} bytes, its shape {shape} in {entry['dtype']} {nbytes}.")
    return begin, stop, name, dtype, tuple(shape)


def _resolve_tying(config: ModelConfig, tensors: dict[str, LazyTensor]) -> ModelConfig:
    """Drop a head that repeats the embedding; a head that differs means that the model is not tied."""
    head, embedding = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    if not config.tie_embeddings or head is None or embedding is None:
        return config
    if head.shape == embedding.shape and head.dtype == embedding.dtype:
        pairs = zip(_raw_chunks(head.read()), _raw_chunks(embedding.read()), strict=True)
        if all(np.array_equal(one, other) for one, other in pairs):
            del tensors["lm_head.weight"]
            return config
    return dataclasses.replace(config, tie_embeddings=False)


def _raw_chunks(array: np.ndarray, size: int = 1 << 24) -> Iterator[np.ndarray]:
    """The bytes of a contiguous array, some at a time."""
    raw = array.reshape(-1).view(np.uint8)
    return (raw[start : start + size] for start in range(0, len(raw), size))


def _write_tensors(tensors: Mapping[str, LazyTensor], file: IO[bytes]) -> None:
    # Wide elements first, so that every tensor begins at a multiple of its element size.
    ordered = sorted(tensors.values(), key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))
    # transformers refuses a file that does not say which framework's layout it has.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in ordered:
        if tensor.dtype not in _NAMES:
            raise CheckpointError(f"{tensor.name} is {tensor.dtype}, which safetensors files made here don't hold.")
        begin, end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
        header[tensor.name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    # The data begin on a boundary that lets JAX's CPU client use them where they lie, if their sizes keep to it.
    text += b" " * (-(len(text) + _LENGTH_BYTES) % _ALIGNMENT)
    file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
    for tensor in ordered:
        values = np.asarray(tensor.read(), order="C")
        if values.shape != tensor.shape or values.dtype != tensor.dtype:
            raise CheckpointError(
                f"{tensor.name} was announced as {tensor.dtype} {tensor.shape} and read as {values.dtype} "
                f"{values.shape}."
            )
        for chunk in _raw_chunks(values):
            file.write(chunk.data)


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
