"""Damaged headers and configurations end in our exception, or in a checkpoint that keeps what it claims."""

import json
import random
import struct
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from fusedllm.config import ModelConfig
from fusedllm.errors import FusedLLMError
from fusedllm.model.families import config_from_hf, config_to_hf
from fusedllm.model.params import specs
from fusedllm.weights import gguf as gguf_file
from fusedllm.weights import safetensors
from fusedllm.weights.checkpoint import Checkpoint
from fusedllm.weights.gguf_header import read_header
from fusedllm.weights.load import check_tensors

CASES = 400
# The files have a few kilobytes: what takes a second or tens of megabytes was led astray by a length in them.
MAX_SECONDS = 2.0
MAX_BYTES = 64 << 20

LENGTHS = [0, 1, 2, 7, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**60, 2**63 - 1, 2**63, 2**64 - 1]
JUNK = [None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**40, 0.5, -2.5, 1e400, float("nan"), "", "silu", "x" * 300]
JUNK += [[], {}, [1], ["a"], [[[]]], {"a": {}}, {"rope_type": "yarn"}, "qwen3", "llama", "dynamic", [None] * 50]

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "torch_dtype": "float32",
}
QWEN = {key: value for key, value in LLAMA.items() if key not in ("architectures", "mlp_bias", "attention_bias")}
QWEN |= {
    "model_type": "qwen2",
    "use_sliding_window": True,
    "sliding_window": 8,
    "max_window_layers": 0,
    "layer_types": ["sliding_attention"],
    "rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "truncate": True},
}


@pytest.fixture(autouse=True)
def measured_memory() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def holds_what_it_claims(checkpoint: Checkpoint) -> None:
    assert isinstance(checkpoint.config, ModelConfig)
    for name, lazy in checkpoint.tensors.items():
        values = lazy.read()
        assert (lazy.name, lazy.shape, lazy.dtype) == (name, values.shape, values.dtype)
        if lazy.read_quantized is not None:
            assert lazy.read_quantized().values.nbytes == lazy.nbytes


def survive(path: Path, read: Callable[[Path], Checkpoint], case: object) -> bool:
    """Whether the damaged checkpoint still loads; anything but that or our exception fails the test.

    The loader's own check is part of it: a tensor under a damaged name, or with two sizes exchanged, stops there.
    """
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    start = time.perf_counter()
    try:
        checkpoint = read(path)
        check_tensors(checkpoint, specs(checkpoint.config))
        holds_what_it_claims(checkpoint)
        loaded = True
    except FusedLLMError:
        loaded = False
    except Exception as error:
        raise AssertionError(f"case {case}: {type(error).__name__}: {error}") from error
    assert time.perf_counter() - start < MAX_SECONDS, case
    assert tracemalloc.get_traced_memory()[1] - before < MAX_BYTES, case
    return loaded


def damage(content: bytes, header_end: int, rng: random.Random) -> bytes:
    """`content` with one or a few accidents in its first `header_end` bytes."""
    data = bytearray(content)
    kind = rng.choice(["flip", "flip", "length", "length", "short", "truncate", "delete", "insert", "copy"])
    where = rng.randrange(header_end)
    if kind == "flip":
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(header_end)] ^= 1 << rng.randrange(8)
    elif kind == "length":
        data[where : where + 8] = struct.pack("<Q", rng.choice(LENGTHS))
    elif kind == "short":
        data[where : where + 4] = struct.pack("<I", rng.choice(LENGTHS) & 0xFFFFFFFF)
    elif kind == "truncate":
        del data[rng.randrange(len(data)) :]
    elif kind == "delete":
        del data[where : where + rng.randint(1, 16)]
    elif kind == "insert":
        data[where:where] = rng.randbytes(rng.randint(1, 16))
    else:
        source = rng.randrange(header_end)
        data[where : where + 16] = data[source : source + 16]
    return bytes(data)


def lengths_everywhere(content: bytes, header_end: int, rng: random.Random) -> Iterator[bytes]:
    """Each stretch of a header that looks like a small 64-bit length, made enormous."""
    for where in range(header_end - 8):
        if 0 < int.from_bytes(content[where : where + 8], "little") < 1 << 16:
            yield content[:where] + struct.pack("<Q", rng.choice(LENGTHS[4:])) + content[where + 8 :]


def make_gguf(path: Path) -> int:
    """A model of one layer with a tokenizer; returns where its header ends."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(32)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([chr(ord("A") + index) for index in range(30)] + ["AB", "<|end|>"])
    writer.add_token_types([1] * 31 + [3])
    writer.add_token_merges(["A B"])
    writer.add_eos_token_id(31)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    rng = np.random.default_rng(0)
    q8 = gguf.GGMLQuantizationType.Q8_0
    shapes = {"attn_q": 32, "attn_k": 16, "attn_v": 16, "attn_output": 32, "ffn_gate": 64, "ffn_up": 64}
    for name, rows in shapes.items():
        writer.add_tensor(f"blk.0.{name}.weight", rng.integers(0, 100, (rows, 34), dtype=np.uint8), raw_dtype=q8)
    writer.add_tensor("blk.0.ffn_down.weight", rng.standard_normal((32, 64)).astype(np.float16))
    writer.add_tensor("token_embd.weight", rng.standard_normal((32, 32), np.float32))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return min(entry.start for entry in read_header(path).tensors.values())


def make_safetensors(path: Path, config: dict = LLAMA) -> int:
    rng = np.random.default_rng(0)
    shapes = {name: spec.shape for name, spec in specs(config_from_hf(config)).items()}
    save_file({name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}, path)
    path.with_name("config.json").write_text(json.dumps(config))
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def test_a_damaged_gguf_header_is_refused_or_means_what_it_says(tmp_path):
    path = tmp_path / "model.gguf"
    header_end = make_gguf(path)
    content = path.read_bytes()
    assert survive(path, gguf_file.read, "undamaged")
    outcomes = []
    for seed in range(CASES):
        path.write_bytes(damage(content, header_end, random.Random(seed)))
        outcomes.append(survive(path, gguf_file.read, seed))
    # Most of the header is lengths and names, so most accidents must be noticed.
    assert outcomes.count(False) > CASES // 2


def test_every_length_of_a_gguf_header_may_lie(tmp_path):
    path = tmp_path / "model.gguf"
    header_end = make_gguf(path)
    content = path.read_bytes()
    for case, damaged in enumerate(lengths_everywhere(content, header_end, random.Random(0))):
        if case % 4 == 0:
            path.write_bytes(damaged)
            survive(path, gguf_file.read, case)


def test_a_damaged_safetensors_header_is_refused_or_means_what_it_says(tmp_path):
    path = tmp_path / "model.safetensors"
    header_end = make_safetensors(path)
    content = path.read_bytes()
    assert survive(path, safetensors.read, "undamaged")
    outcomes = []
    for seed in range(CASES):
        path.write_bytes(damage(content, header_end, random.Random(seed)))
        outcomes.append(survive(path, safetensors.read, seed))
    assert outcomes.count(False) > CASES // 2


def test_an_edited_safetensors_header_is_refused_or_means_what_it_says(tmp_path):
    path = tmp_path / "model.safetensors"
    header_end = make_safetensors(path)
    content = path.read_bytes()
    for seed in range(CASES):
        rng = random.Random(seed)
        edited = edit(json.loads(content[8:header_end]), rng)
        text = json.dumps(edited).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[header_end:])
        survive(path, safetensors.read, seed)


def edit(value: object, rng: random.Random) -> object:
    """`value` with one entry somewhere inside it removed, replaced by junk, doubled under another name, or added."""
    value = json.loads(json.dumps(value))
    place = value
    while isinstance(place, (dict, list)) and place:
        key = rng.choice(sorted(place)) if isinstance(place, dict) else rng.randrange(len(place))
        inner = place[key]
        if isinstance(inner, (dict, list)) and inner and rng.random() < 0.7:
            place = inner
            continue
        kind = rng.choice(["remove", "junk", "junk", "junk", "nudge", "add"])
        if kind == "remove":
            del place[key]
        elif kind == "nudge" and isinstance(inner, (int, float)):
            place[key] = inner * rng.choice([-1, 2, 3, 10**6, 0.5, 2**64])
        elif kind == "add" and isinstance(place, dict):
            place[f"{key}_{rng.randrange(10)}"] = inner
        else:
            place[key] = rng.choice(JUNK)
        break
    return value


@pytest.mark.parametrize("config", [LLAMA, QWEN], ids=["llama", "qwen2"])
def test_an_edited_config_is_refused_or_describes_a_model(tmp_path, config):
    make_safetensors(tmp_path / "model.safetensors", config)
    for seed in range(CASES):
        rng = random.Random(seed)
        edited = config
        for _ in range(rng.randint(1, 3)):
            edited = edit(edited, rng)
        (tmp_path / "config.json").write_text(json.dumps(edited))
        if survive(tmp_path, safetensors.read, (seed, edited)):
            read = safetensors.read(tmp_path).config
            assert config_from_hf(config_to_hf(read)) == read


def test_a_damaged_config_text_is_refused_or_describes_a_model(tmp_path):
    make_safetensors(tmp_path / "model.safetensors")
    text = (tmp_path / "config.json").read_bytes()
    for seed in range(CASES):
        (tmp_path / "config.json").write_bytes(damage(text, len(text), random.Random(seed)))
        survive(tmp_path, safetensors.read, seed)
