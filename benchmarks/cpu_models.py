"""GGUF files for the CPU's benchmarks: SmolLM2 from the package index, and LLaMA-3.2-1B's shape with random weights.

    python benchmarks/cpu_models.py 1b-q8 1b-q4

The weights of the second are not to be had without an account, and no time depends on what they are. What is written
is an ordinary file of llama.cpp's `llama` architecture without a vocabulary, so that every side reads the very same
bytes: matrices in one block format, the tied embedding included, drawn as codes and scales and never quantized.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from tqdm import tqdm

from fusedllm.config import ModelConfig, RopeConfig
from fusedllm.model.rope import inverse_frequencies
from fusedllm.weights import registry
from fusedllm.weights.download import cache_directory
from fusedllm.weights.gguf_header import read_header

# Part of the file's name: another seed, or another way to draw, is another file.
SEED = 1
# A usual standard deviation of trained weights; activations then keep a size that quantization treats as usual.
WEIGHT_STD = 0.02


@dataclass(frozen=True)
class Model:
    """A model of the benchmark: its name in `fusedllm models`, and the block format of random weights or `None`."""

    title: str
    registry_name: str
    random_blocks: str | None = None


MODELS = {
    "smollm2": Model("SmolLM2-135M Q4_1", "smollm2-135m"),
    "1b-q8": Model("LLaMA-3.2-1B's shape, Q8_0", "llama-1b", "Q8_0"),
    "1b-q4": Model("LLaMA-3.2-1B's shape, Q4_0", "llama-1b", "Q4_0"),
}


def path_of(name: str) -> Path:
    """The model's file, fetched or written on first use."""
    model = MODELS[name]
    if model.random_blocks is None:
        return registry.resolve(model.registry_name, progress=True)
    path = cache_directory() / "benchmarks" / f"{model.registry_name}-random-{model.random_blocks}-{SEED}.gguf"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.part")
        try:
            write_random(unfinished, registry.architecture(model.registry_name), model.random_blocks)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    return path


def weight_bytes(path: Path) -> int:
    """Bytes of weights that a decode step reads: all of the file's tensors, an untied embedding excepted."""
    tensors = read_header(path).tensors
    untied = tensors["token_embd.weight"].nbytes if "output.weight" in tensors else 0
    return sum(tensor.nbytes for tensor in tensors.values()) - untied


def write_random(path: Path, config: ModelConfig, blocks: str) -> None:
    """Writes a model of this shape with seeded random weights, matrices in the block format named `blocks`."""
    draw = DRAW[blocks]
    kind = gguf.GGMLQuantizationType[blocks]
    writer = gguf.GGUFWriter(path, "llama")
    _add_metadata(writer, config)
    tensors = list(_tensors(config))
    for name, shape in tensors:
        nbytes = _row_bytes(shape, kind)
        if len(shape) == 2:
            writer.add_tensor_info(name, (shape[0], nbytes), np.dtype(np.uint8), shape[0] * nbytes, kind)
        else:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * shape[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for index, (name, shape) in enumerate(tqdm(tensors, desc=f"writing {path.name}", unit="tensor", disable=None)):
        random = np.random.Generator(np.random.PCG64([SEED, index]))
        if name == "rope_freqs.weight":
            writer.write_tensor_data(_rope_divisors(config))
        elif len(shape) == 1:
            writer.write_tensor_data(random.uniform(0.8, 1.2, shape).astype(np.float32))
        else:
            writer.write_tensor_data(draw(random, shape[0] * shape[1] // 32).reshape(shape[0], -1))
    writer.close()


def _row_bytes(shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> int:
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    return shape[-1] // block * nbytes


def _add_metadata(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _tensors(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes `[out, in]`, in the order of the file."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    yield "rope_freqs.weight", (config.head_dim // 2,)
    yield "token_embd.weight", (config.vocab_size, hidden)
    for layer in range(config.num_layers):
        for name, shape in {
            "attn_norm": (hidden,),
            "attn_q": (query, hidden),
            "attn_k": (key, hidden),
            "attn_v": (key, hidden),
            "attn_output": (hidden, query),
            "ffn_norm": (hidden,),
            "ffn_gate": (inner, hidden),
            "ffn_up": (inner, hidden),
            "ffn_down": (hidden, inner),
        }.items():
            yield f"blk.{layer}.{name}.weight", shape
    yield "output_norm.weight", (hidden,)


def _rope_divisors(config: ModelConfig) -> np.ndarray:
    """What llama.cpp's converter stores of Llama 3's rope scaling: by how much each frequency is divided."""
    plain = inverse_frequencies(RopeConfig(config.rope.theta), config.head_dim)
    return np.asarray(plain / inverse_frequencies(config.rope, config.head_dim), np.float32)


def _q8_0(random: np.random.Generator, blocks: int) -> np.ndarray:
    """A float16 scale and 32 signed bytes a block; a quantizer never makes -128."""
    codes = np.maximum(np.frombuffer(random.bytes(32 * blocks), np.int8), -127).reshape(blocks, 32)
    return np.concatenate([_scales(random, blocks, np.sqrt((256**2 - 1) / 12)), codes.view(np.uint8)], axis=1)


def _q4_0(random: np.random.Generator, blocks: int) -> np.ndarray:
    """A float16 scale and 32 nibbles a block. Codes run from -8 to 7, and the scale's sign evens that out."""
    codes = np.frombuffer(random.bytes(16 * blocks), np.uint8).reshape(blocks, 16)
    signs = random.integers(0, 2, (blocks, 1), dtype=np.uint8)
    scales = _scales(random, blocks, np.sqrt((16**2 - 1) / 12))
    scales[:, 1:] |= signs << 7
    return np.concatenate([scales, codes], axis=1)


DRAW = {"Q8_0": _q8_0, "Q4_0": _q4_0}


def _scales(random: np.random.Generator, blocks: int, code_std: float) -> np.ndarray:
    """Bytes of float16 scales, `[blocks, 2]`, that vary and give codes of this deviation the weights' own."""
    scales = random.uniform(0.75, 1.25, (blocks, 1)).astype(np.float32) * (WEIGHT_STD / code_std)
    return scales.astype(np.float16).view(np.uint8)


def main() -> None:
    """The command: writes or fetches the named models, and prints where they lie."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=list(MODELS))
    for name in parser.parse_args().models:
        path = path_of(name)
        print(f"{name}: {path}, {path.stat().st_size / 1e9:.3f} GB, {weight_bytes(path) / 1e9:.3f} GB of weights")


if __name__ == "__main__":
    main()
