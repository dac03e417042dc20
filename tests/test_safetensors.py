"""A HF directory is read without copying a tensor, written back bit for bit, and refused in one sentence."""

import dataclasses
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from fusedllm.errors import CheckpointError, ConfigError
from fusedllm.model.families import config_from_hf
from fusedllm.model.params import specs
from fusedllm.weights import safetensors

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def random_tensors(config: dict) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {name: spec.shape for name, spec in specs(config_from_hf(config)).items()}
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def make_directory(path: Path, config: dict = CONFIG, tensors: dict | None = None) -> dict[str, np.ndarray]:
    path.mkdir(exist_ok=True)
    tensors = random_tensors(config) if tensors is None else tensors
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return tensors


def make_shards(path: Path) -> dict[str, np.ndarray]:
    """The same tensors in two files with an index."""
    tensors = make_directory(path)
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, path / file)
        weight_map |= dict.fromkeys(part, file)
    write_index(path, weight_map)
    return tensors


def write_index(path: Path, weight_map: object) -> None:
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def read_index(path: Path) -> dict[str, str]:
    return json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]


def assert_same_tensors(checkpoint, tensors: dict[str, np.ndarray]) -> None:
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, lazy in checkpoint.tensors.items():
        values = lazy.read()
        assert (lazy.name, lazy.shape, lazy.dtype) == (name, tensors[name].shape, tensors[name].dtype)
        assert (values.shape, values.dtype) == (lazy.shape, lazy.dtype)
        assert lazy.nbytes == tensors[name].nbytes
        assert values.tobytes() == tensors[name].tobytes()


def test_a_directory_with_one_file_is_read(tmp_path):
    tensors = make_directory(tmp_path)
    checkpoint = safetensors.read(tmp_path)
    assert_same_tensors(checkpoint, tensors)
    assert checkpoint.config == config_from_hf(CONFIG)
    assert (checkpoint.format, checkpoint.path, checkpoint.tokenizer) == ("safetensors", tmp_path, None)


def test_a_single_file_is_read_with_the_config_beside_it(tmp_path):
    tensors = make_directory(tmp_path)
    assert_same_tensors(safetensors.read(tmp_path / "model.safetensors"), tensors)


def test_shards_are_read_through_the_index(tmp_path):
    tensors = make_shards(tmp_path)
    assert_same_tensors(safetensors.read(tmp_path), tensors)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_tensors_are_views_of_the_memory_map(tmp_path, dtype):
    make_directory(tmp_path)
    original = safetensors.read(tmp_path)
    cast = {
        name: dataclasses.replace(lazy, dtype=np.dtype(dtype), read=lambda lazy=lazy: lazy.read().astype(dtype))
        for name, lazy in original.tensors.items()
    }
    safetensors.write(dataclasses.replace(original, tensors=cast), tmp_path / "cast")
    first, again = (safetensors.read(tmp_path / "cast").tensors["model.norm.weight"] for _ in range(2))
    assert first.read().dtype == np.dtype(dtype)
    assert not first.read().flags.writeable
    assert np.shares_memory(first.read(), first.read())
    assert np.array_equal(first.read(), again.read())
    assert not first.read().flags.owndata


def test_generation_config_gives_the_end_tokens(tmp_path):
    make_directory(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert safetensors.read(tmp_path).config.eos_token_ids == (5, 6)


def test_what_is_written_reads_back_bit_for_bit(tmp_path):
    mixed = random_tensors(CONFIG)
    mixed = {
        name: value.astype([np.float32, np.float16, ml_dtypes.bfloat16][index % 3])
        for index, (name, value) in enumerate(mixed.items())
    }
    make_directory(tmp_path)
    original = safetensors.read(tmp_path)
    lazy = {
        name: dataclasses.replace(original.tensors[name], dtype=value.dtype, nbytes=value.nbytes, read=value.view)
        for name, value in mixed.items()
    }
    safetensors.write(dataclasses.replace(original, tensors=lazy), tmp_path / "written")
    written = safetensors.read(tmp_path / "written")
    assert_same_tensors(written, mixed)
    assert written.config == original.config
    assert all(tensor.read().flags.aligned for tensor in written.tensors.values())
    first = min(tensor.read().ctypes.data for tensor in written.tensors.values())
    assert first % 64 == 0


def test_the_safetensors_library_reads_what_is_written(tmp_path):
    from safetensors.numpy import load_file

    tensors = make_directory(tmp_path)
    safetensors.write(safetensors.read(tmp_path), tmp_path / "written")
    loaded = load_file(tmp_path / "written" / "model.safetensors")
    assert {name: value.tobytes() for name, value in loaded.items()} == {
        name: value.tobytes() for name, value in tensors.items()
    }


def test_the_head_of_a_tied_model_is_dropped_if_it_repeats_the_embedding(tmp_path):
    tensors = random_tensors(CONFIG)
    tied = {**CONFIG, "tie_word_embeddings": True}
    same = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].copy()}
    make_directory(tmp_path, tied, same)
    checkpoint = safetensors.read(tmp_path)
    assert checkpoint.config.tie_embeddings
    assert "lm_head.weight" not in checkpoint.tensors


def test_a_head_that_differs_from_the_embedding_unties_the_model_as_in_transformers(tmp_path):
    make_directory(tmp_path, {**CONFIG, "tie_word_embeddings": True}, random_tensors(CONFIG))
    checkpoint = safetensors.read(tmp_path)
    assert not checkpoint.config.tie_embeddings
    assert "lm_head.weight" in checkpoint.tensors


def test_rotary_buffers_of_old_checkpoints_are_left_out(tmp_path):
    tensors = random_tensors(CONFIG)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    make_directory(tmp_path, CONFIG, {**tensors, **extra})
    assert safetensors.read(tmp_path).tensors.keys() == tensors.keys()


def refuse(path: Path, *said: str, error: type[Exception] = CheckpointError) -> None:
    with pytest.raises(error) as caught:
        safetensors.read(path)
    message = str(caught.value)
    assert "\n" not in message
    for words in said:
        assert words in message


def test_a_missing_directory_is_one_sentence(tmp_path):
    refuse(tmp_path / "nowhere", "nowhere does not exist")


def test_a_directory_without_config_or_weights_is_one_sentence(tmp_path):
    refuse(tmp_path, "holds no config.json")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    refuse(tmp_path, "holds neither model.safetensors nor model.safetensors.index.json")


def test_a_config_that_is_not_json_is_one_sentence(tmp_path):
    make_directory(tmp_path)
    for text in ("{", "[]", '{"a": 1, "a": 2}', "[" * 100_000, '{"vocab_size": ' + "9" * 5000 + "}"):
        (tmp_path / "config.json").write_text(text)
        refuse(tmp_path, "config.json")


def test_an_unknown_architecture_is_one_sentence(tmp_path):
    make_directory(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    refuse(tmp_path, "'gpt2' is not implemented", "known are: llama", error=ConfigError)


def test_a_truncated_file_is_named_with_both_sizes(tmp_path):
    make_directory(tmp_path)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-10])
    refuse(tmp_path, "model.safetensors is truncated", str(len(content)), str(len(content) - 10))
    file.write_bytes(content[:100])
    refuse(tmp_path, "truncated")
    file.write_bytes(content[:4])
    refuse(tmp_path, "has 4 bytes")
    file.write_bytes(content + b"more")
    refuse(tmp_path, "not what its header describes")


def test_something_else_than_safetensors_is_one_sentence(tmp_path):
    make_directory(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"<html>404 not found</html>" * 10)
    refuse(tmp_path, "is not a safetensors file")


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"dtype": "F8_E5M2", "shape": [4], "data_offsets": [0, 4]}, "F8_E5M2"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "takes 4 bytes"),
        ({"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 4]}, "takes 4 bytes"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}, "gap"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}, "takes -4 bytes"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [0]}, "two byte positions"),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}, "positive sizes"),
        ({"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}, "positive sizes"),
        ({"dtype": "F32", "shape": [1] * 70, "data_offsets": [0, 4]}, "positive sizes"),
        ({"dtype": "F32", "shape": "1", "data_offsets": [0, 4]}, "positive sizes"),
        ({"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}, "dtype"),
        ({"dtype": "F32", "shape": [1]}, "not described"),
        ([], "not described"),
    ],
)
def test_a_header_entry_that_lies_is_refused_before_it_is_used(tmp_path, entry, said):
    make_directory(tmp_path)
    header = json.dumps({"x": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    refuse(tmp_path, "'x'", said)


def test_overlapping_tensors_are_refused(tmp_path):
    make_directory(tmp_path)
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header = json.dumps({"x": entry, "y": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    refuse(tmp_path, "overlap")


def test_a_missing_shard_is_named(tmp_path):
    make_shards(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    refuse(tmp_path, "the shard model-00002-of-00002.safetensors")


def test_an_index_that_points_to_the_wrong_shard_is_one_sentence(tmp_path):
    make_shards(tmp_path)
    index = read_index(tmp_path)
    index["model.norm.weight"], index["lm_head.weight"] = index["lm_head.weight"], index["model.norm.weight"]
    if index == read_index(tmp_path):
        index["model.norm.weight"] = next(file for file in index.values() if file != index["model.norm.weight"])
    write_index(tmp_path, index)
    refuse(tmp_path, "where it is not")


def test_an_index_may_not_name_files_elsewhere(tmp_path):
    make_shards(tmp_path)
    write_index(tmp_path, {"x": "../secret.safetensors"})
    refuse(tmp_path, "'../secret.safetensors'", "not a .safetensors file beside it")


def test_an_index_without_a_weight_map_is_one_sentence(tmp_path):
    make_shards(tmp_path)
    for weight_map in (None, [], {}, {"x": 1}):
        write_index(tmp_path, weight_map)
        refuse(tmp_path, "has no 'weight_map'")


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    tensors = make_shards(tmp_path)
    save_file(tensors, tmp_path / "model-00002-of-00002.safetensors")
    refuse(tmp_path, "is in two shards")


def test_a_directory_that_can_not_be_written_is_one_sentence(tmp_path):
    make_directory(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="can't be written"):
        safetensors.write(safetensors.read(tmp_path), tmp_path / "file")


def test_a_tensor_that_is_not_what_it_claimed_is_not_written(tmp_path):
    make_directory(tmp_path)
    checkpoint = safetensors.read(tmp_path)
    lying = {name: dataclasses.replace(lazy, read=lambda: np.zeros(3)) for name, lazy in checkpoint.tensors.items()}
    with pytest.raises(CheckpointError, match="was announced as float32"):
        safetensors.write(dataclasses.replace(checkpoint, tensors=lying), tmp_path / "written")
