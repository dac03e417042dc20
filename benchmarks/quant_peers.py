"""llama.cpp's quantizer, through the declarations of `llama-cpp-python` (`pip install llama-cpp-python`)."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

# `enum llama_ftype`.
FILE_TYPES = {"Q8_0": 7, "Q6_K": 18, "Q5_K_M": 17, "Q4_K_M": 15, "Q4_0": 2}

_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """What llama.cpp calls the matrix that HF calls `name`."""
    if name == "lm_head.weight":
        return "output.weight"
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    _, _, layer, part = name.split(".", 3)
    return f"blk.{layer}.{_LAYER[part.removesuffix('.weight')]}.weight"


def quantize(source: Path, target: Path, kind: str, importance: Mapping[str, np.ndarray] | None, threads: int) -> None:
    """Quantizes the GGUF file `source` into `target`; `importance` is `E[x^2]` of each matrix's input, by HF's names.

    An error of llama.cpp ends this program.
    """
    import llama_cpp

    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.nthread = threads
    parameters.ftype = FILE_TYPES[kind]
    parameters.allow_requantize = False
    arrays = {gguf_name(name): np.ascontiguousarray(values, np.float32) for name, values in (importance or {}).items()}
    if arrays:
        entries = (llama_cpp.llama_model_imatrix_data * (len(arrays) + 1))()
        for entry, (name, values) in zip(entries, arrays.items(), strict=False):
            entry.name = name.encode()
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            entry.size = values.size
        parameters.imatrix = entries
    code = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(parameters))
    if code:
        raise SystemExit(f"llama.cpp could not quantize {source} to {kind} (code {code}).")
