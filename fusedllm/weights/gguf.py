"""GGUF files: configuration, tokenizer and tensors, dequantized or as the blocks that they are."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np

from fusedllm.errors import CheckpointError
from fusedllm.qarray import QuantArray
from fusedllm.quant.blocks import SCHEMES
from fusedllm.weights.checkpoint import Checkpoint, LazyTensor
from fusedllm.weights.gguf_config import ARCHITECTURES, config_from_gguf
from fusedllm.weights.gguf_header import Header, TensorEntry, read_header
from fusedllm.weights.gguf_names import ROPE_FREQS, hf_name, is_derived, permuted_heads, unpermute
from fusedllm.weights.mapped import array_at, release_pages

_PLAIN = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


def read(path: Path) -> Checkpoint:
    """The checkpoint in a GGUF file. Quantized tensors read as float32; `read_quantized` gives their blocks unchanged.

    F32, F16 and BF16 tensors are views of the memory map, except q and k of LLaMA, whose rows are put in HF's order.

    Raises:
      CheckpointError: a missing, truncated or damaged file, or a tensor of a type that can't be read.
      ConfigError: an unknown architecture, or mathematics that is not implemented.
      TokenizerError: a tokenizer that can't be rebuilt.
    """
    from fusedllm.text.gguf_vocab import tokenizer_from_gguf

    path = Path(path)
    header = read_header(path)
    config = config_from_gguf(header.metadata, header.tensors, _rope_freqs(header))
    permuted = ARCHITECTURES[header.metadata["general.architecture"]].permuted
    tensors: dict[str, LazyTensor] = {}
    for entry in header.tensors.values():
        if is_derived(entry.name):
            continue
        heads = permuted_heads(entry.name, config) if permuted else None
        tensor = _tensor(header.data, entry, heads, config.head_dim, path)
        if tensor.name in tensors:
            raise CheckpointError(f"{path} has two tensors for {tensor.name}.")
        tensors[tensor.name] = tensor
    tokenizer = tokenizer_from_gguf(header.metadata)
    return Checkpoint(config, tensors, tokenizer, "gguf", path, partial(release_pages, header.data))


def _rope_freqs(header: Header) -> np.ndarray | None:
    entry = header.tensors.get(ROPE_FREQS)
    if entry is None:
        return None
    if entry.type_name != "F32":
        raise CheckpointError(f"{ROPE_FREQS!r} has the type {entry.type_name}, F32 was expected.")
    return array_at(header.data, entry.start, _PLAIN["F32"], entry.shape)


def _tensor(data: np.ndarray, entry: TensorEntry, heads: int | None, head_dim: int, path: Path) -> LazyTensor:
    name = hf_name(entry.name)
    if heads is not None and entry.shape[0] != heads * head_dim:
        raise CheckpointError(
            f"{name} in {path} has the shape {entry.shape}; {heads} heads of {head_dim} need {heads * head_dim} rows."
        )
    if entry.type_name in _PLAIN:
        dtype = _PLAIN[entry.type_name]
        view = partial(array_at, data, entry.start, dtype, entry.shape)
        read_it = view if heads is None else (lambda: unpermute(view(), heads))
        return LazyTensor(name, entry.shape, dtype, entry.nbytes, read_it)
    scheme = SCHEMES[entry.type_name]
    row_bytes = entry.shape[-1] // scheme.block_size * scheme.block_bytes
    row_shape = (*entry.shape[:-1], row_bytes)

    def blocks() -> np.ndarray:
        # A block lies within a row, so rows of blocks move as rows of weights do.
        raw = array_at(data, entry.start, np.dtype(np.uint8), row_shape)
        return raw if heads is None else unpermute(raw, heads)

    def read_quantized() -> QuantArray:
        # NumPy's array where a program will see jax's: who loads it decides where it is put.
        return QuantArray(cast("Any", blocks()), None, None, scheme, entry.shape)

    return LazyTensor(
        name,
        entry.shape,
        np.dtype(np.float32),
        entry.nbytes,
        lambda: scheme.decode_numpy(blocks(), entry.shape),
        scheme.name,
        read_quantized,
    )
