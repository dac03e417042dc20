"""Tiny checkpoints, one per family feature: HF configurations as data, weights from a NumPy seed. No torch here.

The tests and the script that asks transformers for logits both take their checkpoints from `write`, so that the two
sides read the very same bytes.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

PROMPT_TOKENS = 64
"""Random ids at the start of a sequence: more than any case's window (24) and original rope length (32)."""

GREEDY_TOKENS = 32
"""What the reference appends by itself, so that the same stored logits also tell what greedy decoding must say."""

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "float32",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "vocab_size": 80,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_MISTRAL = {**_LLAMA, "architectures": ["MistralForCausalLM"], "model_type": "mistral"}
_QWEN2 = {**_LLAMA, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rms_norm_eps": 1e-6}
_QWEN3 = {**_QWEN2, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}

CASES: dict[str, dict[str, Any]] = {
    # As old checkpoints are: no key/value heads of their own, no rope base.
    "llama2": {**_LLAMA, "num_key_value_heads": 4, "pretraining_tp": 1, "rope_scaling": None},
    # A base of 10,000 puts the 8 frequencies of a head on both sides of, and between, the two scaling thresholds.
    "llama3": {
        **_LLAMA,
        "rope_theta": 10_000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    # `type` is the older spelling of `rope_type`.
    "llama_linear_rope": {**_LLAMA, "rope_theta": 10_000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama_yarn": {
        **_LLAMA,
        "rope_theta": 10_000.0,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    },
    # Biases everywhere, one key/value head, heads wider than hidden / heads.
    "llama_biases": {
        **_LLAMA,
        "num_key_value_heads": 1,
        "head_dim": 24,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0},
    },
    # 9 heads over 3; the two last attributes stand in the published configuration and change nothing.
    "smollm2": {
        **_LLAMA,
        "hidden_size": 72,
        "num_hidden_layers": 4,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
        "rope_theta": 100_000,
        "rope_scaling": None,
        "is_llama_config": True,
        "rope_interleaved": False,
    },
    "mistral": {**_MISTRAL, "num_hidden_layers": 3, "head_dim": 24, "rope_theta": 10_000.0, "sliding_window": 24},
    # A window that is written down and switched off, as Qwen publishes it.
    "qwen2": {
        **_QWEN2,
        "tie_word_embeddings": True,
        "rope_theta": 1_000_000.0,
        "use_sliding_window": False,
        "sliding_window": 8,
        "max_window_layers": 1,
    },
    "qwen2_max_window_layers": {
        **_QWEN2,
        "num_hidden_layers": 3,
        "rope_theta": 10_000.0,
        "use_sliding_window": True,
        "sliding_window": 24,
        "max_window_layers": 1,
    },
    "qwen2_layer_types": {
        **_QWEN2,
        "num_hidden_layers": 3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "use_sliding_window": True,
        "sliding_window": 24,
        "max_window_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "qwen3": {
        **_QWEN3,
        "hidden_size": 48,
        "head_dim": 32,
        "attention_bias": False,
        "rope_theta": 1_000_000.0,
        "rope_scaling": None,
    },
    # Every YaRN number away from its default, and a bias in front of the q/k norm.
    "qwen3_yarn": {
        **_QWEN3,
        "head_dim": 32,
        "attention_bias": True,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "attention_factor": 1.25,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "truncate": False,
        },
    },
}

WITHOUT: dict[str, dict[str, Any]] = {
    "llama3": {"rope_scaling": None},
    "llama_linear_rope": {"rope_scaling": None},
    "llama_yarn": {"rope_scaling": None},
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": True},
    "qwen2_max_window_layers": {"max_window_layers": 0},
    "qwen2_layer_types": {"layer_types": ["full_attention"] * 3},
    "qwen3_yarn": {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
}
"""The same case with its feature misread, to show that the stored logits would notice."""


# Other prompts for the cases whose first one led greedy decoding into a near tie.
_PROMPT_SEED = {"qwen2_max_window_layers": 2}


def weights(name: str) -> dict[str, np.ndarray]:
    """The float32 tensors of a case, by HF's names.

    `RandomState`, because NumPy promises that its streams never change; those of `default_rng` may.
    """
    config = CASES[name]
    random = np.random.RandomState(_seed(name))

    def matrix(rows: int, columns: int, gain: float = 1.0) -> np.ndarray:
        return (random.standard_normal((rows, columns)) * gain / np.sqrt(columns)).astype(np.float32)

    def vector(size: int, center: float, spread: float) -> np.ndarray:
        return (center + spread * random.standard_normal(size)).astype(np.float32)

    family, hidden, ffn = config["model_type"], config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    qkv_bias = family == "qwen2" or config.get("attention_bias", False)
    output_bias = family != "qwen2" and config.get("attention_bias", False)
    mlp_bias = config.get("mlp_bias", False)

    # Gains: attention scores with a standard deviation near 2, so that attention is neither uniform nor a single
    # position; logits near 2, so that greedy choices are clear.
    tensors = {"model.embed_tokens.weight": matrix(config["vocab_size"], hidden, gain=2.0)}
    for index in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{index}."
        linear = (
            ("self_attn.q_proj", heads * head_dim, hidden, 1.4, qkv_bias),
            ("self_attn.k_proj", kv_heads * head_dim, hidden, 1.4, qkv_bias),
            ("self_attn.v_proj", kv_heads * head_dim, hidden, 1.0, qkv_bias),
            ("self_attn.o_proj", hidden, heads * head_dim, 1.0, output_bias),
            ("mlp.gate_proj", ffn, hidden, 1.0, mlp_bias),
            ("mlp.up_proj", ffn, hidden, 1.0, mlp_bias),
            ("mlp.down_proj", hidden, ffn, 1.5, mlp_bias),
        )
        for part, rows, columns, gain, bias in linear:
            tensors[f"{prefix}{part}.weight"] = matrix(rows, columns, gain)
            if bias:
                tensors[f"{prefix}{part}.bias"] = vector(rows, 0.0, 0.5)
        tensors[f"{prefix}input_layernorm.weight"] = vector(hidden, 1.0, 0.2)
        tensors[f"{prefix}post_attention_layernorm.weight"] = vector(hidden, 1.0, 0.2)
        if family == "qwen3":
            tensors[f"{prefix}self_attn.q_norm.weight"] = vector(head_dim, 1.2, 0.3)
            tensors[f"{prefix}self_attn.k_norm.weight"] = vector(head_dim, 1.2, 0.3)
    tensors["model.norm.weight"] = vector(hidden, 1.0, 0.2)
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = matrix(config["vocab_size"], hidden, gain=2.0)
    return tensors


def prompt(name: str) -> np.ndarray:
    """The first `PROMPT_TOKENS` ids of a case's sequence."""
    random = np.random.RandomState(_seed(name) ^ _PROMPT_SEED.get(name, 1))
    return random.randint(0, CASES[name]["vocab_size"], PROMPT_TOKENS)


def digest(name: str) -> str:
    """SHA-256 over a case's configuration and weights: stored logits are for these and no others."""
    total = hashlib.sha256(json.dumps(CASES[name], sort_keys=True).encode())
    for tensor_name, tensor in sorted(weights(name).items()):
        total.update(tensor_name.encode())
        total.update(tensor.tobytes())
    return total.hexdigest()


def write(name: str, directory: Path, **changes: Any) -> Path:
    """`directory`, with a case's config.json (with `changes` in it) and model.safetensors written into it."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**CASES[name], **changes}, indent=2))
    # The metadata is what transformers writes, and wants to see when it reads.
    save_file(weights(name), directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def _seed(name: str) -> int:
    return zlib.crc32(name.encode())
