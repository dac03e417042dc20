"""GGUF's names of a LLaMA's tensors and Hugging Face's, and the order in which each keeps the rows of q and k."""

from __future__ import annotations

import re

import numpy as np

from fusedllm.config import ModelConfig

# What is in neither table keeps its own name when it is read, and the loader refuses it by that.
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
_HF_TOP, _HF_LAYER = ({theirs: name for name, theirs in table.items()} for table in (_TOP, _LAYER))

# Tensors that follow from the configuration: Llama 3.1's rope scaling (read into it), and old files' frequencies.
ROPE_FREQS = "rope_freqs.weight"
_DERIVED = re.compile(r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd\.weight")
_LAYER_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_TOP_NAME = re.compile(r"(\w+)\.(weight|bias)")
_HF_LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.([\w.]+)\.(weight|bias)")
_HF_TOP_NAME = re.compile(r"([\w.]+)\.(weight|bias)")


def hf_name(name: str) -> str:
    """HF's name of the GGUF tensor `name`, or `name` where it has none."""
    layer, top = _LAYER_NAME.fullmatch(name), _TOP_NAME.fullmatch(name)
    if layer and layer[2] in _LAYER:
        # int() folds "01" into "1"; the caller notices the name that this doubles.
        return f"model.layers.{int(layer[1][:9])}.{_LAYER[layer[2]]}.{layer[3]}"
    if top and top[1] in _TOP:
        return f"{_TOP[top[1]]}.{top[2]}"
    return name


def gguf_name(name: str) -> str:
    """GGUF's name of the tensor that HF calls `name`; a `KeyError` for what no LLaMA has."""
    layer, top = _HF_LAYER_NAME.fullmatch(name), _HF_TOP_NAME.fullmatch(name)
    if layer:
        return f"blk.{layer[1]}.{_HF_LAYER[layer[2]]}.{layer[3]}"
    if top:
        return f"{_HF_TOP[top[1]]}.{top[2]}"
    raise KeyError(name)


def is_derived(name: str) -> bool:
    """Whether the GGUF tensor `name` follows from the configuration and is no parameter."""
    return bool(_DERIVED.fullmatch(name))


def permuted_heads(name: str, config: ModelConfig) -> int | None:
    """How many heads the rows of the GGUF tensor `name` belong to where llama.cpp permutes q and k; else `None`."""
    layer = _LAYER_NAME.fullmatch(name)
    part = layer[2] if layer else None
    return {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}.get(part) if part else None


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k in HF's order.

    llama.cpp rotates neighbouring rows of a head as a pair, HF rows that lie half a head apart; its converter
    interleaves the two halves, and this takes them apart again.
    """
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, half, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k in llama.cpp's order: the inverse of `unpermute`."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, 2, half, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
