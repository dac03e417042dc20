"""Writes GGUF files that llama.cpp runs, one tensor in memory at a time.

The header is written by the `gguf` library. The data are written here, because that library reports a full disk
without saying so.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from fusedllm.errors import CheckpointError, QuantizationError
from fusedllm.quant.blocks import SCHEMES
from fusedllm.weights.checkpoint import Checkpoint, LazyTensor
from fusedllm.weights.gguf_config import ARCHITECTURES
from fusedllm.weights.gguf_grouped import as_blocks, warn_of_floats
from fusedllm.weights.gguf_header import read_header
from fusedllm.weights.gguf_metadata import architecture_of, metadata_of, rope_factors
from fusedllm.weights.gguf_names import ROPE_FREQS, gguf_name, permute, permuted_heads

FLOATS: Mapping[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_FLOAT_NAMES = {dtype: name for name, dtype in FLOATS.items()}
_ALIGNMENT = 32
# A mixture is called by its most frequent type; llama.cpp's own mixtures of these are called "medium".
_MEDIUM = ("Q3_K", "Q4_K", "Q5_K")
_CHUNK_BYTES = 1 << 24

TypeOf = Callable[[str, tuple[int, ...]], str]


@dataclass(frozen=True, slots=True)
class _Plan:
    """One tensor of the file: where it comes from, its name there, its type, and whose heads' rows are permuted."""

    tensor: LazyTensor
    name: str
    type_name: str
    heads: int | None

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        count = math.prod(self.tensor.shape)
        if self.type_name in FLOATS:
            return count * FLOATS[self.type_name].itemsize
        scheme = SCHEMES[self.type_name]
        return count // scheme.block_size * scheme.block_bytes


def write(
    checkpoint: Checkpoint,
    path: Path,
    type_of: TypeOf | None = None,
    importance: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Writes `checkpoint` to the GGUF file `path`; not atomic: `convert` is.

    Args:
      checkpoint: tensors whose blocks are already of the type that is asked for are written as they are.
      path: the file.
      type_of: from a matrix's name (HF's) and shape to its type: F32, F16, BF16, or a scheme of `quant/encode.py`. By
        default each keeps its own. Vectors are always F32, as llama.cpp wants them.
      importance: by a matrix's name, how much an error in each of its columns costs; see `encode`.

    Codes that are no blocks of GGUF are written as floats, of which a `DequantizedWarning` says how many.

    Raises:
      CheckpointError: the tensors are not those of the configuration, or one does not read as it was announced.
      ConfigError, TokenizerError: the configuration or the tokenizer can't be expressed as GGUF.
      QuantizationError: a tensor can't be written in the type that was asked for; it is named.
      OSError: the file can't be written.
    """
    from fusedllm.model.params import specs
    from fusedllm.weights.load import check_tensors

    config = checkpoint.config
    architecture = architecture_of(config)
    wanted = specs(config)
    check_tensors(checkpoint, wanted)
    permuted = ARCHITECTURES[architecture].permuted
    plans = []
    for name in wanted:
        tensor, theirs = as_blocks(checkpoint.tensors[name]), gguf_name(name)
        heads = permuted_heads(theirs, config) if permuted else None
        plans.append(_Plan(tensor, theirs, _type_name(tensor, type_of), heads))
    if type_of is None:
        coded = [plan for plan in plans if plan.tensor.quantization is not None]
        warn_of_floats([plan.tensor for plan in coded if plan.type_name in FLOATS], len(coded))
    metadata = metadata_of(config, checkpoint.tokenizer, {plan.name: plan.tensor.shape for plan in plans})
    metadata |= _general(checkpoint, plans)
    factors = rope_factors(config)
    _write_header(path, metadata, plans, factors)
    with path.open("r+b") as file:
        file.seek(0, 2)
        _pad(file)
        if factors is not None:
            _write_array(file, factors)
        for plan in plans:
            _write_tensor(file, plan, None if importance is None else importance.get(plan.tensor.name))
            checkpoint.release()
    # Reading the header checks that every tensor lies where the header says.
    read_header(path)


def _type_name(tensor: LazyTensor, type_of: TypeOf | None) -> str:
    if len(tensor.shape) < 2:
        return "F32"
    if type_of is not None:
        name = type_of(tensor.name, tensor.shape)
    elif tensor.quantization in SCHEMES and tensor.read_quantized is not None:
        name = str(tensor.quantization)
    else:
        name = _FLOAT_NAMES.get(tensor.dtype, "F32")
    if name not in FLOATS and name not in SCHEMES:
        known = ", ".join((*FLOATS, *SCHEMES))
        raise QuantizationError(f"{tensor.name}: there is no type {name!r} in a GGUF; known are: {known}.")
    if name in SCHEMES and tensor.shape[-1] % SCHEMES[name].block_size:
        from fusedllm.quant.encode import fallback

        raise QuantizationError(
            f"{tensor.name} has rows of {tensor.shape[-1]} weights, and {name} needs whole blocks of "
            f"{SCHEMES[name].block_size}; {fallback(name, tensor.shape[-1])} fits."
        )
    return name


def _general(checkpoint: Checkpoint, plans: list[_Plan]) -> dict[str, Any]:
    """What the file says of itself; nothing in it changes what a model says."""
    import gguf

    count: collections.Counter[str] = collections.Counter()
    for plan in plans:
        if len(plan.tensor.shape) > 1:
            count[plan.type_name] += math.prod(plan.tensor.shape)
    most = count.most_common(1)[0][0]
    kind = "ALL_F32" if most == "F32" else f"MOSTLY_{most}_M" if most in _MEDIUM else f"MOSTLY_{most}"
    path = checkpoint.path
    # A snapshot in the Hub's cache is called by its hash, two directories above it is the repository's name.
    name = path.parent.parent.name.split("--")[-1] if path.parent.name == "snapshots" else path.stem
    general = {"general.name": name, "general.file_type": int(gguf.LlamaFileType[kind])}
    return general | {"general.quantization_version": int(gguf.GGML_QUANT_VERSION)}


def _write_header(path: Path, metadata: Mapping[str, Any], plans: list[_Plan], factors: np.ndarray | None) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    add: Mapping[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in metadata.items():
        if key != "general.architecture":  # which the library adds by itself
            add[type(value)](key, value)
    if factors is not None:
        writer.add_tensor_info(ROPE_FREQS, factors.shape, factors.dtype, factors.nbytes)
    for plan in plans:
        kind = gguf.GGMLQuantizationType[plan.type_name]
        writer.add_tensor_info(plan.name, plan.tensor.shape, np.dtype(np.float32), plan.nbytes, kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


def _write_tensor(file: IO[bytes], plan: _Plan, importance: np.ndarray | None) -> None:
    # In a function of its own, so that nothing of one tensor is left when the next is read.
    data = _data(plan, importance)
    if data.nbytes != plan.nbytes:
        raise CheckpointError(f"{plan.tensor.name} was read as {data.nbytes} bytes and not as {plan.nbytes}.")
    _write_array(file, data)


def _data(plan: _Plan, importance: np.ndarray | None) -> np.ndarray:
    """The tensor as it lies in the file."""
    tensor = plan.tensor
    if plan.type_name == tensor.quantization and tensor.read_quantized is not None:
        blocks = np.asarray(tensor.read_quantized().values)
        return blocks if plan.heads is None else permute(blocks, plan.heads)
    values = tensor.read()
    if values.shape != tensor.shape:
        raise CheckpointError(f"{tensor.name} was announced as {tensor.shape} and read as {values.shape}.")
    if plan.heads is not None:
        values = permute(values, plan.heads)
    if plan.type_name in FLOATS:
        return _cast(values, plan)
    from fusedllm.quant.encode import encode

    try:
        return encode(plan.type_name, values, importance)
    except QuantizationError as error:
        raise QuantizationError(f"{tensor.name}: {error}") from error


def _cast(values: np.ndarray, plan: _Plan) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = values.astype(FLOATS[plan.type_name], copy=False)
    if plan.type_name == "F16" and values.dtype != cast.dtype and np.isinf(cast).any() and np.isfinite(values).all():
        peak = float(np.abs(values).max())
        raise QuantizationError(
            f"{plan.tensor.name}: weights up to {peak:.3g} are beyond F16 (at most 65504): write it as BF16 or F32."
        )
    return cast


def _write_array(file: IO[bytes], values: np.ndarray) -> None:
    raw = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    for start in range(0, len(raw), _CHUNK_BYTES):
        file.write(raw[start : start + _CHUNK_BYTES].data)
    _pad(file)


def _pad(file: IO[bytes]) -> None:
    file.write(bytes(-file.tell() % _ALIGNMENT))
