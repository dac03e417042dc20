"""GGUF files: configuration, tokenizer and tensors, dequantized or as the blocks that they are."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np

from fusedllm.config import ModelConfig
from fusedllm.errors import CheckpointError
from fusedllm.qarray import QuantArray
from fusedllm.quant.blocks import SCHEMES
from fusedllm.weights.checkpoint import Checkpoint, LazyTensor
from fusedllm.weights.gguf_config import ARCHITECTURES, config_from_gguf
from fusedllm.weights.gguf_header import Header, TensorEntry, read_header
from fusedllm.weights.mapped import array_at, release_pages

# GGUF's names and HF's; what is in neither table keeps its own name, and the loader refuses it by that.
_TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Tensors that follow from the configuration: Llama 3.1's rope scaling (read into it), and old files' frequencies.
_ROPE_FREQS = "rope_freqs.weight"
_DERIVED = re.compile(r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd\.weight")
_LAYER_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_TOP_NAME = re.compile(r"(\w+)\.(weight|bias)")

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
        if _DERIVED.fullmatch(entry.name):
            continue
        tensor = _tensor(header.data, entry, _heads(entry, config) if permuted else None, config.head_dim, path)
        if tensor.name in tensors:
            raise CheckpointError(f"{path} has two tensors for {tensor.name}.")
        tensors[tensor.name] = tensor
    tokenizer = tokenizer_from_gguf(header.metadata)
    return Checkpoint(config, tensors, tokenizer, "gguf", path, partial(release_pages, header.data))


def _rope_freqs(header: Header) -> np.ndarray | None:
    entry = header.tensors.get(_ROPE_FREQS)
    if entry is None:
        return None
    if entry.type_name != "F32":
        raise CheckpointError(f"{_ROPE_FREQS!r} has the type {entry.type_name}, F32 was expected.")
    return array_at(header.data, entry.start, _PLAIN["F32"], entry.shape)


def _hf_name(name: str) -> str:
    layer, top = _LAYER_NAME.fullmatch(name), _TOP_NAME.fullmatch(name)
    if layer and layer[2] in _LAYER:
        # int() folds "01" into "1"; the caller notices the name that this doubles.
        return f"model.layers.{int(layer[1][:9])}.{_LAYER[layer[2]]}.{layer[3]}"
    if top and top[1] in _TOP:
        return f"{_TOP[top[1]]}.{top[2]}"
    return name


def _heads(entry: TensorEntry, config: ModelConfig) -> int | None:
    """How many heads the rows of a permuted tensor belong to; `None` for all other tensors."""
    layer = _LAYER_NAME.fullmatch(entry.name)
    part = layer[2] if layer else None
    return {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}.get(part) if part else None


def _tensor(data: np.ndarray, entry: TensorEntry, heads: int | None, head_dim: int, path: Path) -> LazyTensor:
    name = _hf_name(entry.name)
    if heads is not None and entry.shape[0] != heads * head_dim:
        raise CheckpointError(
            f"{name} in {path} has the shape {entry.shape}; {heads} heads of {head_dim} need {heads * head_dim} rows."
        )
    if entry.type_name in _PLAIN:
        dtype = _PLAIN[entry.type_name]
        view = partial(array_at, data, entry.start, dtype, entry.shape)
        read_it = view if heads is None else (lambda: _unpermute(view(), heads))
        return LazyTensor(name, entry.shape, dtype, entry.nbytes, read_it)
    scheme = SCHEMES[entry.type_name]
    row_bytes = entry.shape[-1] // scheme.block_size * scheme.block_bytes
    row_shape = (*entry.shape[:-1], row_bytes)

    def blocks() -> np.ndarray:
        # A block lies within a row, so rows of blocks move as rows of weights do.
        raw = array_at(data, entry.start, np.dtype(np.uint8), row_shape)
        return raw if heads is None else _unpermute(raw, heads)

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


def _unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k in HF's order.

    llama.cpp rotates neighbouring rows of a head as a pair, HF rows that lie half a head apart; its converter
    interleaves the two halves, and this takes them apart again.
    """
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, half, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
