"""A GGUF file becomes a checkpoint in HF's names and layout, and what can't be read is refused in one sentence."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from fusedllm.config import RopeConfig
from fusedllm.errors import CheckpointError, ConfigError
from fusedllm.model.params import specs
from fusedllm.model.rope import inverse_frequencies
from fusedllm.quant.blocks import SCHEMES
from fusedllm.weights import gguf as gguf_file
from fusedllm.weights.gguf_header import read_header

gguf = pytest.importorskip("gguf")

LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, FFN, VOCAB = 2, 4, 2, 64, 256, 512, 32
KEYS = {
    "block_count": LAYERS,
    "context_length": 128,
    "embedding_length": HIDDEN,
    "feed_forward_length": FFN,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 100000.0,
    "rope.dimension_count": HEAD_DIM,
}
HF_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def model_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """A small tied LLaMA under GGUF's names, q and k in HF's order."""
    rng = np.random.default_rng(seed)
    shapes = {
        "attn_norm": (HIDDEN,),
        "attn_q": (HEADS * HEAD_DIM, HIDDEN),
        "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
        "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
        "attn_output": (HIDDEN, HEADS * HEAD_DIM),
        "ffn_norm": (HIDDEN,),
        "ffn_gate": (FFN, HIDDEN),
        "ffn_up": (FFN, HIDDEN),
        "ffn_down": (HIDDEN, FFN),
    }
    named = {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,)}
    named |= {f"blk.{layer}.{part}.weight": shape for layer in range(LAYERS) for part, shape in shapes.items()}
    return {name: rng.standard_normal(shape, np.float32) for name, shape in named.items()}


def llama_cpp_order(rows: np.ndarray, heads: int) -> np.ndarray:
    """The permutation of llama.cpp's converter: the two halves of each head interleaved."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(rows.shape)


def as_llama_cpp_writes(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    heads = {"attn_q": HEADS, "attn_k": KV_HEADS}
    return {
        name: llama_cpp_order(value, heads[part]) if (part := name.split(".")[-2]) in heads else value
        for name, value in tensors.items()
    }


def write_gguf(path: Path, tensors: dict[str, np.ndarray], keys: dict | None = None, arch: str = "llama") -> Path:
    """Write with the `gguf` library; a key without a prefix belongs to the architecture."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in (KEYS if keys is None else keys).items():
        full = key if key.startswith(("general.", "tokenizer.", "split.")) else f"{arch}.{key}"
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(full, value)
    for name, value in tensors.items():
        raw = None
        if isinstance(value, tuple):
            value, raw = value
        if value.dtype == ml_dtypes.bfloat16:
            value, raw = value.view(np.uint8), gguf.GGMLQuantizationType.BF16
        writer.add_tensor(name, value, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def hf_name(name: str) -> str:
    top = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if name in top:
        return top[name]
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{HF_PARTS[part]}.{kind}"


@pytest.fixture
def small(tmp_path) -> Path:
    return write_gguf(tmp_path / "small.gguf", as_llama_cpp_writes(model_tensors()))


def config_of(tmp_path: Path, arch: str = "llama", tensors: dict | None = None, **changes: object):
    keys = {key: value for key, value in {**KEYS, **changes}.items() if value is not None}
    values = {} if tensors is None else tensors
    return gguf_file.read(write_gguf(tmp_path / "config.gguf", {**model_tensors(), **values}, keys, arch)).config


def test_configuration_and_names_are_those_of_the_hf_model(small):
    checkpoint = gguf_file.read(small)
    config = checkpoint.config
    assert (config.family, config.num_layers, config.hidden_size, config.intermediate_size) == ("llama", 2, 256, 512)
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.vocab_size) == (4, 2, 64, 32)
    assert (config.rms_norm_eps, config.rope, config.tie_embeddings) == (1e-5, RopeConfig(100000.0), True)
    assert {name: tensor.shape for name, tensor in checkpoint.tensors.items()} == {
        name: spec.shape for name, spec in specs(config).items()
    }
    assert (checkpoint.format, checkpoint.path, checkpoint.tokenizer) == ("gguf", small, None)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_plain_tensors_come_back_bit_for_bit_with_q_and_k_in_hf_order(tmp_path, dtype):
    tensors = {name: value.astype(dtype) for name, value in model_tensors().items()}
    checkpoint = gguf_file.read(write_gguf(tmp_path / "plain.gguf", as_llama_cpp_writes(tensors)))
    for name, value in tensors.items():
        lazy = checkpoint.tensors[hf_name(name)]
        assert (lazy.dtype, lazy.nbytes, lazy.quantization) == (np.dtype(dtype), value.nbytes, None)
        assert lazy.read_quantized is None
        assert lazy.read().tobytes() == value.tobytes(), name


def test_tensors_that_need_no_reordering_are_views_of_the_memory_map(small):
    norm = gguf_file.read(small).tensors["model.norm.weight"].read()
    assert not norm.flags.owndata
    assert not norm.flags.writeable


def test_biases_are_permuted_with_their_rows(tmp_path):
    bias = np.arange(HEADS * HEAD_DIM, dtype=np.float32)
    tensors = as_llama_cpp_writes({**model_tensors(), "blk.0.attn_q.bias": bias})
    checkpoint = gguf_file.read(write_gguf(tmp_path / "bias.gguf", tensors))
    assert checkpoint.config.attention_bias
    np.testing.assert_array_equal(checkpoint.tensors["model.layers.0.self_attn.q_proj.bias"].read(), bias)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda scheme: scheme.name)
def test_quantized_tensors_read_as_the_gguf_library_dequantizes_them(tmp_path, scheme):
    kind = gguf.GGMLQuantizationType[scheme.name]
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 120, (HEADS * HEAD_DIM, HIDDEN // scheme.block_size * scheme.block_bytes), dtype=np.uint8)
    tensors = {**model_tensors(), "blk.1.attn_q.weight": (llama_cpp_order(blocks, HEADS), kind)}
    tensors["blk.1.attn_output.weight"] = (blocks, kind)
    checkpoint = gguf_file.read(write_gguf(tmp_path / "quantized.gguf", tensors))
    for part in ("q_proj", "o_proj"):
        lazy = checkpoint.tensors[f"model.layers.1.self_attn.{part}.weight"]
        assert (lazy.shape, lazy.dtype, lazy.quantization) == ((256, 256), np.float32, scheme.name)
        assert lazy.nbytes == blocks.nbytes
        wanted = gguf.quants.dequantize(blocks, kind)
        assert lazy.read().tobytes() == wanted.tobytes()
        array = lazy.read_quantized()
        assert (array.shape, array.scheme, array.scales, array.zeros) == ((256, 256), scheme, None, None)
        np.testing.assert_array_equal(np.asarray(array.values), blocks)


def test_qwen_is_not_permuted(tmp_path):
    tensors = model_tensors()
    checkpoint = gguf_file.read(write_gguf(tmp_path / "qwen.gguf", tensors, arch="qwen2"))
    assert (checkpoint.config.family, checkpoint.config.attention_bias) == ("qwen2", True)
    q = checkpoint.tensors["model.layers.0.self_attn.q_proj.weight"].read()
    np.testing.assert_array_equal(q, tensors["blk.0.attn_q.weight"])


def test_qwen3_has_q_and_k_norms_and_its_own_head_size(tmp_path):
    sizes = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    config = config_of(tmp_path, "qwen3", **dict.fromkeys(sizes, 32))
    assert (config.family, config.qk_norm, config.head_dim, config.attention_bias) == ("qwen3", True, 32, False)


def test_an_output_matrix_unties_the_model(tmp_path):
    checkpoint = gguf_file.read(
        write_gguf(tmp_path / "untied.gguf", {**model_tensors(), "output.weight": np.ones((VOCAB, HIDDEN), np.float32)})
    )
    assert not checkpoint.config.tie_embeddings
    assert "lm_head.weight" in checkpoint.tensors


def test_a_window_makes_a_llama_file_a_mistral(tmp_path):
    config = config_of(tmp_path, **{"attention.sliding_window": 17})
    assert (config.family, config.sliding_windows) == ("mistral", (17, 17))


def test_linear_and_yarn_scaling_are_read(tmp_path):
    linear = config_of(tmp_path, **{"rope.scaling.type": "linear", "rope.scaling.factor": 4.0})
    assert linear.rope == RopeConfig(100000.0, "linear", 4.0)
    assert config_of(tmp_path, **{"rope.scale_linear": 4.0}).rope == linear.rope
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32}
    assert config_of(tmp_path, **yarn).rope == RopeConfig(100000.0, "yarn", 4.0, 32)
    assert config_of(tmp_path, **{"rope.scaling.type": "none"}).rope == RopeConfig(100000.0)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recovered_from_its_tensor(tmp_path, factor):
    rope = RopeConfig(500000.0, "llama3", factor, 8192, 1.0, 4.0)
    divisors = inverse_frequencies(RopeConfig(500000.0), HEAD_DIM) / inverse_frequencies(rope, HEAD_DIM)
    tensors = {**model_tensors(), "rope_freqs.weight": divisors.astype(np.float32)}
    keys = {**KEYS, "rope.freq_base": 500000.0}
    checkpoint = gguf_file.read(write_gguf(tmp_path / "llama3.gguf", tensors, keys))
    assert checkpoint.config.rope == rope
    assert "rope_freqs.weight" not in checkpoint.tensors


def test_end_of_turn_ends_a_generation_too(tmp_path):
    ids = {"bos": 1, "eos": 2, "eot": 7, "eom": 2}
    config = config_of(tmp_path, **{f"tokenizer.ggml.{name}_token_id": token for name, token in ids.items()})
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2, 7))


def test_metadata_values_are_those_of_the_gguf_library(small):
    reader = gguf.GGUFReader(small)
    header = read_header(small)
    theirs = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert header.metadata.keys() == theirs.keys()
    for key, value in theirs.items():
        # A float32 is held as its shortest text: the same float32, another float64.
        assert np.float32(header.metadata[key]) == value if isinstance(value, float) else header.metadata[key] == value
    for tensor in reader.tensors:
        entry = header.tensors[tensor.name]
        assert (entry.start, entry.nbytes) == (tensor.data_offset, tensor.n_bytes)


def test_arrays_of_every_kind_are_read(tmp_path):
    arrays = {"tokenizer.x": ["é", "", "漢字"], "tokenizer.y": [1, -2], "tokenizer.z": [0.5, 1.5], "tokenizer.t": True}
    metadata = read_header(write_gguf(tmp_path / "arrays.gguf", {}, arrays)).metadata
    assert {key: metadata[key] for key in arrays} == arrays


def refuse(path: Path, *said: str, error: type[Exception] = CheckpointError) -> None:
    with pytest.raises(error) as caught:
        gguf_file.read(path)
    message = str(caught.value)
    assert "\n" not in message
    for words in said:
        assert words in message


def test_a_missing_file_and_a_directory_are_one_sentence(tmp_path):
    refuse(tmp_path / "nowhere.gguf", "nowhere.gguf can't be read: No such file")
    refuse(tmp_path, "is a directory")


def test_wrong_magic_and_wrong_version_are_one_sentence(small):
    content = small.read_bytes()
    small.write_bytes(b"GGML" + content[4:])
    refuse(small, "is not a GGUF file", "b'GGML'")
    small.write_bytes(content[:4] + (1).to_bytes(4, "little") + content[8:])
    refuse(small, "version 1", "versions 2 and 3")
    small.write_bytes(content[:4] + (3).to_bytes(4, "big") + content[8:])
    refuse(small, "big-endian")


def test_a_truncated_file_is_named_with_both_sizes(small):
    content = small.read_bytes()
    for length in (0, 10, 30, 300, len(content) // 2):
        small.write_bytes(content[:length])
        refuse(small, "truncated", str(length))
    end = max(entry.start + entry.nbytes for entry in _entries(small, content))
    small.write_bytes(content[: end - 1])
    refuse(small, "is truncated", str(end), str(end - 1))


def _entries(path: Path, content: bytes):
    path.write_bytes(content)
    return read_header(path).tensors.values()


def test_an_unknown_architecture_is_one_sentence(tmp_path):
    path = write_gguf(tmp_path / "gpt2.gguf", {}, {}, "gpt2")
    refuse(path, "'gpt2' is not implemented", "llama, qwen2, qwen3", error=ConfigError)


@pytest.mark.parametrize("name", ["IQ4_XS", "TQ1_0", "MXFP4"])
def test_an_unknown_quantization_type_is_refused_by_name(tmp_path, name):
    kind = gguf.GGMLQuantizationType[name]
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.zeros((4, 256 // block_size * block_bytes), np.uint8)
    path = write_gguf(tmp_path / "unknown.gguf", {**model_tensors(), "output.weight": (blocks, kind)})
    refuse(path, "'output.weight'", name, "known are: F32")


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"expert_count": 8}, "expert_count"),
        ({"logit_scale": 0.25}, "logit_scale"),
        ({"attention.clamp_kqv": 8.0}, "attention.clamp_kqv"),
        ({"attention.causal": False}, "attention.causal"),
        ({"rope.dimension_count": 32}, "rope.dimension_count"),
        ({"attention.value_length": 32}, "attention.value_length"),
        ({"rope.scaling.type": "longrope"}, "longrope"),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0, "rope.scaling.yarn_log_multiplier": 0.1},
            "yarn_log",
        ),
        ({"something.new": 1}, "something.new"),
        ({"split.count": 3}, "split.count"),
        ({"general.type": "adapter"}, "adapter"),
        ({"attention.head_count": [4, 4]}, "attention.head_count"),
        ({"rope.freq_base": "fast"}, "rope.freq_base"),
        ({"block_count": 10**9}, "block_count"),
        ({"attention.head_count": 3}, "heads"),
    ],
)
def test_metadata_that_changes_the_mathematics_or_makes_no_sense_is_refused_by_name(tmp_path, keys, named):
    with pytest.raises(ConfigError, match=named):
        config_of(tmp_path, **keys)


@pytest.mark.parametrize("key", ["block_count", "embedding_length", "attention.layer_norm_rms_epsilon"])
def test_a_key_that_every_model_has_may_not_be_missing(tmp_path, key):
    with pytest.raises(CheckpointError, match=f"has no 'llama.{key}'"):
        config_of(tmp_path, **{key: None})


def test_a_window_of_qwen_is_refused_because_the_file_does_not_say_which_layers(tmp_path):
    with pytest.raises(ConfigError, match=r"attention\.sliding_window"):
        config_of(tmp_path, "qwen2", **{"attention.sliding_window": 8})


def test_unknown_rope_frequencies_are_refused_by_name(tmp_path):
    for divisors in (np.linspace(1, 8, 32, dtype=np.float32), np.full(7, 2, np.float32)):
        with pytest.raises(ConfigError, match=r"rope_freqs\.weight"):
            config_of(tmp_path, tensors={"rope_freqs.weight": divisors})
    assert config_of(tmp_path, tensors={"rope_freqs.weight": np.ones(32, np.float32)}).rope.kind == "default"


def test_permuted_rows_that_do_not_fit_the_heads_are_named_with_the_shape(tmp_path):
    tensors = {**model_tensors(), "blk.0.attn_q.weight": np.zeros((100, HIDDEN), np.float32)}
    path = write_gguf(tmp_path / "misshapen.gguf", tensors)
    refuse(path, "model.layers.0.self_attn.q_proj.weight", "(100, 256)", "256 rows")


def test_tensors_that_no_table_knows_keep_their_name_for_the_loader_to_refuse(tmp_path):
    tensors = {**model_tensors(), "blk.0.attn_sinks.weight": np.zeros(4, np.float32)}
    path = write_gguf(tmp_path / "extra.gguf", tensors)
    assert "blk.0.attn_sinks.weight" in gguf_file.read(path).tensors


def test_a_gguf_can_be_written_as_a_hf_directory(small, tmp_path):
    from fusedllm.weights import safetensors

    checkpoint = gguf_file.read(small)
    safetensors.write(checkpoint, tmp_path / "hf")
    written = safetensors.read(tmp_path / "hf")
    assert written.config == checkpoint.config
    for name, tensor in checkpoint.tensors.items():
        assert written.tensors[name].read().tobytes() == tensor.read().tobytes()
