"""compressed-tensors: what is written reads back bit for bit, in our reader and in transformers."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from grouped_checkpoints import (
    CONFIG,
    EMBEDDING,
    HEAD,
    LINEAR,
    assert_same,
    codes_of,
    in_memory,
    lazy,
    linear_layers,
    plain,
    quantized,
    random_array,
    requantized,
)
from hypothesis import given
from hypothesis import strategies as st
from test_fuzz_gguf_safetensors_config import edit

import fusedllm
from fusedllm.errors import CheckpointError, ConfigError, FusedLLMError, QuantizationError
from fusedllm.kernels.grouped import GroupedScheme
from fusedllm.qarray import QuantArray
from fusedllm.quant.schemes import SCHEMES, scheme_of
from fusedllm.weights import compressed_tensors, safetensors
from fusedllm.weights.checkpoint import LazyTensor
from fusedllm.weights.compressed_tensors_write import compress
from fusedllm.weights.convert import convert
from fusedllm.weights.grouped_codes import decode, pack_words, unpack_words
from fusedllm.weights.open import open_checkpoint
from fusedllm.weights.registry import fetch

NAME = "model.layers.0.mlp.up_proj.weight"
MODULE = NAME.removesuffix(".weight")
# Those that the format, as it is written here, can say.
WRITTEN = [name for name, scheme in SCHEMES.items() if not scheme.turned]


def there_and_back(array: QuantArray) -> LazyTensor:
    tensors, quantization = compress(in_memory({NAME: lazy(NAME, array)}))
    assert quantization is not None
    stored = {name: tensor.read() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        assert (stored[name].dtype, stored[name].shape) == (tensor.dtype, tensor.shape)
    found = compressed_tensors.read(json.loads(json.dumps(quantization)), plain(stored))
    assert found.keys() == {NAME}
    return found[NAME]


def read_quantized(tensor: LazyTensor) -> QuantArray:
    assert tensor.read_quantized is not None
    return tensor.read_quantized()


@given(
    codes=st.integers(1, 8).flatmap(
        lambda bits: st.tuples(
            st.just(bits), st.lists(st.lists(st.integers(0, 2**bits - 1), min_size=9, max_size=9), min_size=1)
        )
    )
)
def test_a_stream_of_words_is_one_large_number_of_all_codes(codes):
    bits, rows = codes
    words = pack_words(np.array(rows, np.uint8), bits)
    for row, packed in zip(rows, words, strict=True):
        number = sum(code << (bits * index) for index, code in enumerate(row))
        assert int.from_bytes(packed.astype("<i4").tobytes(), "little") == number
    assert unpack_words(words, len(rows[0]), bits).tolist() == rows


@st.composite
def arrays(draw: st.DrawFn) -> QuantArray:
    bits, size = draw(st.integers(3, 8)), draw(st.sampled_from([0, 8, 16, 24, 32, 64, 128]))
    scheme = scheme_of(bits, size, draw(st.booleans()))
    if draw(st.integers(0, 4)) == 0:
        scheme = SCHEMES[draw(st.sampled_from(["fp8", "w8a8"]))]
    width = scheme.group_size * draw(st.integers(1, 4)) if scheme.group_size else draw(st.integers(1, 70))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return random_array(scheme, draw(st.integers(1, 40)), width, rng, draw(st.sampled_from(["float16", "float32"])))


@given(arrays())
def test_codes_scales_and_zero_points_survive_in_any_shape(array):
    found = there_and_back(array)
    assert found.quantization == array.scheme.name
    assert_same(read_quantized(found), array)


@pytest.mark.parametrize("scheme", [*SCHEMES.values(), scheme_of(5, 24, False), scheme_of(8, 0, False)])
def test_floats_are_read_with_the_bits_that_a_program_decodes(scheme):
    # Where groups are padded, too: GPTQ's last one may be short.
    array = random_array(scheme, 5, 200, np.random.default_rng(0), "float32")
    wanted = np.asarray(array.dequantize())
    found = decode(array)
    assert (found.dtype, found.shape) == (np.float32, (5, 200))
    assert np.nan_to_num(found, nan=-1).tobytes() == np.nan_to_num(wanted, nan=-1).tobytes()


@pytest.mark.parametrize("scheme", WRITTEN)
def test_every_scheme_survives_a_directory(tmp_path, scheme):
    checkpoint = quantized(linear_layers(scheme))
    found = safetensors.read(convert(checkpoint, tmp_path / "model.hf"))
    assert found.config == checkpoint.config
    assert found.tensors.keys() == checkpoint.tensors.keys()
    counted = 0
    for name, tensor in checkpoint.tensors.items():
        if tensor.read_quantized is None:
            assert found.tensors[name].read_quantized is None
            assert found.tensors[name].read().tobytes() == tensor.read().tobytes()
        else:
            counted += 1
            assert_same(read_quantized(found.tensors[name]), read_quantized(tensor))
    assert counted >= len(LINEAR) // 2


def test_packed_codes_are_views_of_the_memory_map(tmp_path):
    checkpoint = quantized(linear_layers("int4-g32"))
    found = safetensors.read(convert(checkpoint, tmp_path / "model.hf"))
    first, again = (np.asarray(read_quantized(found.tensors[NAME]).values) for _ in range(2))
    assert np.shares_memory(first, again)
    assert not first.flags.writeable


@pytest.mark.parametrize(
    ("scheme", "format", "weights", "activations"),
    [
        (
            "int4-g32",
            "pack-quantized",
            {"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": 32},
            None,
        ),
        ("int4-g64-sym", "pack-quantized", {"num_bits": 4, "symmetric": True, "group_size": 64}, None),
        ("int8", "pack-quantized", {"num_bits": 8, "strategy": "channel", "group_size": None, "type": "int"}, None),
        ("fp8", "naive-quantized", {"num_bits": 8, "strategy": "channel", "type": "float"}, None),
        ("w8a8", "int-quantized", {"num_bits": 8, "strategy": "channel"}, {"strategy": "token", "dynamic": True}),
    ],
)
def test_the_configuration_says_what_the_codes_are(scheme, format, weights, activations):
    # Rows of 192 weights are three groups of 64, and rows of 64 one: nothing but the head is left alone.
    _, quantization = compress(quantized(linear_layers(scheme)))
    assert quantization is not None
    assert (quantization["quant_method"], quantization["quantization_status"]) == ("compressed-tensors", "compressed")
    assert quantization["format"] == format
    (group,) = quantization["config_groups"].values()
    assert (group["targets"], group["format"]) == (["Linear"], format)
    assert weights.items() <= group["weights"].items()
    assert (group["input_activations"] is None) == (activations is None)
    if activations:
        assert activations.items() <= group["input_activations"].items()
    assert quantization["ignore"] == [HEAD.removesuffix(".weight")]


def test_several_schemes_name_their_modules_and_the_rest_is_left_alone():
    def scheme_for(name: str, tensor: LazyTensor) -> str | None:
        return {"q_proj": "int8", "gate_proj": "int4-g32", "up_proj": "int4-g32", "lm_head": "w8a8"}.get(
            name.split(".")[-2]
        )

    checkpoint = quantized(scheme_for)
    tensors, quantization = compress(checkpoint)
    assert quantization is not None
    assert quantization["format"] == "mixed-precision"
    targets = {tuple(group["targets"]): group["format"] for group in quantization["config_groups"].values()}
    assert targets == {
        ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"): "pack-quantized",
        tuple(f"model.layers.{n}.mlp.{part}_proj" for n in range(2) for part in ("gate", "up")): "pack-quantized",
        ("lm_head",): "int-quantized",
    }
    alone = [f"model.layers.{n}.{part}_proj" for n in range(2) for part in ("mlp.down", *_attention("kov"))]
    assert quantization["ignore"] == sorted(alone)
    found = compressed_tensors.read(quantization, tensors)
    for name, tensor in checkpoint.tensors.items():
        assert found[name].quantization == tensor.quantization


def _attention(letters: str) -> list[str]:
    return [f"self_attn.{letter}" for letter in letters]


def test_an_embedding_is_dequantized_to_the_dtype_of_its_scales(tmp_path):
    config = dataclasses.replace(CONFIG, tie_embeddings=True)
    checkpoint = quantized(lambda name, tensor: "int8", config)
    found = safetensors.read(convert(checkpoint, tmp_path / "model.hf"))
    table = found.tensors[EMBEDDING]
    assert (table.dtype, table.read_quantized) == (np.float16, None)
    np.testing.assert_array_equal(table.read(), checkpoint.tensors[EMBEDDING].read().astype(np.float16))
    described = json.loads((tmp_path / "model.hf" / "config.json").read_text())
    assert described["quantization_config"]["ignore"] == ["lm_head"]
    assert described["torch_dtype"] == "float16"


def test_an_embedding_that_float16_can_not_hold_is_refused():
    array = random_array(SCHEMES["int8"], 4, 8, np.random.default_rng(0))
    array = array.replace(scales=np.full((4, 1), 60000, np.float16))
    tensors, _ = compress(in_memory({EMBEDDING: lazy(EMBEDDING, array)}))
    with pytest.raises(CheckpointError, match=r"embed_tokens.* beyond float16.*--dtype float32"):
        tensors[EMBEDDING].read()


def test_a_dtype_dequantizes(tmp_path):
    checkpoint = quantized(linear_layers("int4-g32"))
    found = safetensors.read(convert(checkpoint, tmp_path / "model.hf", dtype="bfloat16"))
    assert "quantization_config" not in json.loads((tmp_path / "model.hf" / "config.json").read_text())
    for name, tensor in found.tensors.items():
        assert (str(tensor.dtype), tensor.read_quantized) == ("bfloat16", None)
        assert tensor.read().tobytes() == checkpoint.tensors[name].read().astype(tensor.dtype).tobytes()


def test_progress_counts_the_codes_once(tmp_path, capfd):
    convert(quantized(linear_layers("int4-g32")), tmp_path / "model.hf", progress=True)
    assert "writing model.hf: 100%" in capfd.readouterr().err


def test_zero_points_between_codes_are_refused_before_anything_is_written(tmp_path):
    array = random_array(SCHEMES["int4-g32"], 8, 64, np.random.default_rng(0))
    for wrong in (0.5, -1, 16, np.nan):
        zeros = np.array(array.zeros)
        zeros[3, 1] = wrong
        base = quantized(lambda name, tensor: None)
        tensors = {**base.tensors, NAME: lazy(NAME, array.replace(zeros=zeros))}
        with pytest.raises(CheckpointError, match=rf"{NAME} has zero points .* HQQ .* --dtype float16"):
            convert(dataclasses.replace(base, tensors=tensors), tmp_path / "model.hf")
    assert list(tmp_path.iterdir()) == []


def test_groups_that_do_not_divide_a_row_are_refused():
    array = random_array(SCHEMES["int4-g64-sym"], 8, 96, np.random.default_rng(0))
    with pytest.raises(CheckpointError, match=rf"{NAME} has rows of 96 weights in groups of 64.*another group size"):
        there_and_back(array)


def test_narrow_codes_with_rounded_activations_are_refused():
    array = random_array(GroupedScheme("w4a8", 4, 32, activation_bits=8), 8, 64, np.random.default_rng(0))
    with pytest.raises(CheckpointError, match=rf"{NAME} has codes of 4 bits for rounded activations"):
        there_and_back(array)


def test_schemes_of_any_size_are_named_like_those_of_the_table():
    for name in WRITTEN:
        scheme = SCHEMES[name]
        again = scheme_of(scheme.bits, scheme.group_size, scheme.symmetric, scheme.codes, scheme.activation_bits)
        assert (again, again.name) == (scheme, name)
    assert scheme_of(4, 16, False) == GroupedScheme("int4-g16", 4, 16, False)
    assert scheme_of(8, 0, False).name == "int8-asym"
    for bits, size, codes in ((2, 32, "integer"), (9, 32, "integer"), (4, 12, "integer"), (4, 32, "float8")):
        with pytest.raises(QuantizationError, match="there is no layout for"):
            scheme_of(bits, size, codes=codes)


# What follows is written as others write it.


def packed_parts(rows: int = 6, width: int = 64, size: int = 32, seed: int = 0) -> dict[str, np.ndarray]:
    """An asymmetric matrix of 4 bits, packed here by the definition: code i of a row is nibble i of its words."""
    rng = np.random.default_rng(seed)
    codes, zeros = rng.integers(0, 16, (rows, width)), rng.integers(0, 16, (rows, width // size))

    def words(numbers: np.ndarray) -> np.ndarray:
        padded = np.zeros((len(numbers), -(-numbers.shape[1] // 8) * 8), np.int64)
        padded[:, : numbers.shape[1]] = numbers
        return (padded.reshape(len(numbers), -1, 8) << (4 * np.arange(8))).sum(-1).astype(np.uint32).view(np.int32)

    return {
        f"{MODULE}.weight_packed": words(codes),
        f"{MODULE}.weight_shape": np.array([rows, width]),
        f"{MODULE}.weight_scale": rng.uniform(0.001, 0.1, (rows, width // size)).astype(np.float16),
        f"{MODULE}.weight_zero_point": np.ascontiguousarray(words(zeros.T).T),
        "codes": codes,
        "zeros": zeros,
    }


def configured(format: str = "pack-quantized", **weights: Any) -> dict[str, Any]:
    """As llm-compressor writes it, with all that it adds."""
    arguments = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32, **weights}
    arguments |= {"dynamic": False, "actorder": None, "block_structure": None, "observer": "minmax"}
    arguments["observer_kwargs"] = {}
    group = {"targets": ["Linear"], "weights": arguments, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "version": "0.20.0",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": 1.2,
        "sparsity_config": {},
        "transform_config": {},
    }


def test_what_others_pack_is_read():
    parts = packed_parts()
    codes, zeros = parts.pop("codes"), parts.pop("zeros")
    found = compressed_tensors.read(configured(), plain(parts))[NAME]
    array = read_quantized(found)
    assert array.scheme is SCHEMES["int4-g32"]
    np.testing.assert_array_equal(codes_of(array), codes)
    np.testing.assert_array_equal(array.zeros, zeros)
    scales = parts[f"{MODULE}.weight_scale"].astype(np.float32)
    np.testing.assert_array_equal(found.read(), scales.repeat(32, 1) * (codes - zeros.repeat(32, 1)))


@pytest.mark.parametrize(
    ("scale", "dtype"), [(2.0**-7, np.float16), (3.0 * 2.0**-12, np.float16), (2.0**-30, np.float32), (1e6, np.float32)]
)
def test_scales_of_bfloat16_stay_exact(scale, dtype):
    parts = packed_parts()
    scales = np.full((6, 2), scale, ml_dtypes.bfloat16)
    parts[f"{MODULE}.weight_scale"] = scales
    array = read_quantized(compressed_tensors.read(configured(), plain(parts))[NAME])
    assert array.scales.dtype == dtype
    np.testing.assert_array_equal(np.asarray(array.scales, np.float64), scales.astype(np.float64))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_scale_for_the_whole_matrix_becomes_one_for_each_row(shape):
    codes = np.arange(-12, 12, dtype=np.int8).reshape(4, 6)
    parts = {NAME: codes, f"{MODULE}.weight_scale": np.full(shape, 0.5, np.float32)}
    tensor = compressed_tensors.read(
        configured("int-quantized", num_bits=8, strategy="tensor", group_size=None, symmetric=True), plain(parts)
    )[NAME]
    assert read_quantized(tensor).scheme is SCHEMES["int8"]
    assert read_quantized(tensor).scales.shape == (4, 1)
    np.testing.assert_array_equal(tensor.read(), codes * np.float32(0.5))


def test_narrow_codes_may_be_elements_of_their_own():
    codes, zeros = np.random.default_rng(0).integers(-8, 8, (2, 5, 64)).astype(np.int8)
    parts = {NAME: codes, f"{MODULE}.weight_scale": np.full((5, 2), 0.5, np.float16)}
    parts[f"{MODULE}.weight_zero_point"] = zeros[:, :2]
    tensor = compressed_tensors.read(configured("int-quantized"), plain(parts))[NAME]
    assert tensor.quantization == "int4-g32"
    np.testing.assert_array_equal(tensor.read(), (codes - zeros[:, :2].repeat(32, 1).astype(np.float32)) * 0.5)


FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "group_size": None}


def test_float8_with_static_activations_is_read_without_them():
    codes = np.arange(48, dtype=np.uint8).reshape(6, 8).view(ml_dtypes.float8_e4m3fn)
    parts = {NAME: codes, f"{MODULE}.weight_scale": np.float32([0.25]), f"{MODULE}.input_scale": np.float32([2])}
    quantization = configured("float-quantized", **FLOAT8)
    quantization["config_groups"]["group_0"]["input_activations"] = FLOAT8
    found = compressed_tensors.read(quantization, plain(parts))
    assert found.keys() == {NAME}
    assert found[NAME].quantization == "fp8"
    np.testing.assert_array_equal(found[NAME].read(), codes.astype(np.float32) * 0.25)


@pytest.mark.parametrize(
    ("activations", "scheme"),
    [
        ({"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}, "w8a8"),
        ({"strategy": "token", "dynamic": True}, "w8a8"),
        ({"num_bits": 8, "symmetric": False, "strategy": "token", "dynamic": True}, "int8"),
        ({"num_bits": 8, "strategy": "tensor", "dynamic": False}, "int8"),
        (None, "int8"),
    ],
)
def test_activations_are_rounded_only_as_w8a8_does_it(activations, scheme):
    parts = {NAME: np.ones((4, 8), np.int8), f"{MODULE}.weight_scale": np.ones((4, 1), np.float32)}
    quantization = configured("int-quantized", num_bits=8, strategy="channel", group_size=None, symmetric=True)
    quantization["config_groups"]["group_0"]["input_activations"] = activations
    assert compressed_tensors.read(quantization, plain(parts))[NAME].quantization == scheme


@pytest.mark.parametrize(
    ("targets", "bits"),
    [
        ([["Linear"], ["re:.*up_proj$"]], 8),
        ([["re:.*up_proj$"], [MODULE]], 8),
        ([[MODULE], ["Linear", "re:.*up_proj"]], 4),
        ([["Linear"], ["Embedding"]], 4),
    ],
)
def test_a_name_goes_before_a_pattern_and_a_pattern_before_a_class(targets, bits):
    quantization = configured("int-quantized", strategy="channel", group_size=None, symmetric=True)
    group = quantization["config_groups"]["group_0"]
    other = {**group, "weights": {**group["weights"], "num_bits": 8}, "targets": targets[1]}
    quantization["config_groups"] = {"group_0": {**group, "targets": targets[0]}, "group_1": other}
    parts = {NAME: np.ones((4, 8), np.int8), f"{MODULE}.weight_scale": np.ones((4, 1), np.float32)}
    tensor = compressed_tensors.read(quantization, plain(parts))[NAME]
    assert read_quantized(tensor).scheme.bits == bits


def test_act_order_of_older_versions_is_dequantized_only():
    parts = packed_parts()
    codes, zeros = parts.pop("codes"), parts.pop("zeros")
    order = np.random.default_rng(1).permutation(np.arange(64) // 32).astype(np.int32)
    found = compressed_tensors.read(configured(actorder="group"), plain({**parts, f"{MODULE}.weight_g_idx": order}))[
        NAME
    ]
    assert (found.quantization, found.read_quantized) == ("int4-g32 in act-order", None)
    scales = parts[f"{MODULE}.weight_scale"].astype(np.float32)
    np.testing.assert_array_equal(found.read(), scales[:, order] * (codes - zeros[:, order]))
    follow = np.arange(64, dtype=np.int32) // 32
    found = compressed_tensors.read(configured(), plain({**parts, f"{MODULE}.weight_g_idx": follow}))[NAME]
    assert read_quantized(found).scheme is SCHEMES["int4-g32"]


def changed(part: str, value: np.ndarray | None) -> Callable[[dict[str, np.ndarray]], None]:
    def change(parts: dict[str, np.ndarray]) -> None:
        del parts[f"{MODULE}.{part}"]
        if value is not None:
            parts[f"{MODULE}.{part}"] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (changed("weight_scale", None), f"{NAME} is quantized and has no 'weight_scale'"),
        (changed("weight_zero_point", None), f"{NAME} is quantized and has no 'weight_zero_point'"),
        (changed("weight_packed", None), f"{NAME} is quantized and has no 'weight_packed'"),
        (changed("weight_shape", None), f"{NAME} is quantized and has no 'weight_shape'"),
        (changed("weight_scale", np.ones((6, 3), np.float16)), r"weight_scale is float16 \[6, 3\]"),
        (changed("weight_scale", np.ones((6, 2), np.int8)), r"weight_scale is int8 \[6, 2\]"),
        (changed("weight_zero_point", np.ones((2, 2), np.int32)), r"weight_zero_point is int32 \[2, 2\]"),
        (changed("weight_packed", np.ones((6, 8), np.int64)), r"weight_packed is int64 \[6, 8\]"),
        (changed("weight_packed", np.ones((6,), np.int32)), r"weight_packed is int32 \[6\]"),
        (changed("weight_shape", np.array([6, 72])), r"weight_packed is \[6, 8\], which does not hold \[6, 72\]"),
        (changed("weight_shape", np.array([7, 64])), r"does not hold \[7, 64\]"),
        (changed("weight_shape", np.array([6, -64])), r"does not hold \[6, -64\]"),
        (changed("weight_shape", np.array([6, 2**62])), r"does not hold \[6, \d+\]"),
        (changed("weight_shape", np.array([6, 60])), "rows of 60 weights, which groups of 32 do not divide"),
    ],
)
def test_a_damaged_matrix_is_named(change, said):
    parts = packed_parts()
    del parts["codes"], parts["zeros"]
    change(parts)
    with pytest.raises(CheckpointError, match=said) as caught:
        compressed_tensors.read(configured(), plain(parts))
    assert "\n" not in str(caught.value)


def test_floats_where_codes_should_be_are_named():
    parts = {NAME: np.ones((4, 8), np.float32), f"{MODULE}.weight_scale": np.ones((4, 1), np.float32)}
    quantization = configured("int-quantized", num_bits=8, strategy="channel", group_size=None, symmetric=True)
    with pytest.raises(CheckpointError, match=r"up_proj.weight is float32 \[4, 8\].* asks for int8"):
        compressed_tensors.read(quantization, plain(parts))


def test_codes_beyond_their_bits_are_named():
    parts = {NAME: np.full((4, 32), 9, np.int8), f"{MODULE}.weight_scale": np.ones((4, 1), np.float32)}
    found = compressed_tensors.read(configured("int-quantized", symmetric=True), plain(parts))
    with pytest.raises(CheckpointError, match=f"{NAME} has codes that are none of 4 bits"):
        found[NAME].read()


def test_three_bits_as_older_versions_packed_them_are_named():
    parts = {
        f"{MODULE}.weight_packed": np.zeros((4, 13), np.int32),
        f"{MODULE}.weight_shape": np.array([4, 128]),
        f"{MODULE}.weight_scale": np.ones((4, 4), np.float16),
    }
    with pytest.raises(CheckpointError, match=r"weight_packed is \[4, 13\].*: a compressed-tensors before 0\.18"):
        compressed_tensors.read(configured(num_bits=3, symmetric=True), plain(parts))


def with_group(**changes: Any) -> dict[str, Any]:
    quantization = configured()
    quantization["config_groups"]["group_0"] |= changes
    return quantization


@pytest.mark.parametrize(
    ("quantization", "said"),
    [
        (configured(num_bits=2), "'weights' in 'group_0' .* no layout for integers of 2 bits"),
        (configured(group_size=12), "no layout for integers of 4 bits in groups of 12"),
        (configured("marlin-24"), "the format 'marlin-24'"),
        (configured("nvfp4-pack-quantized"), "the format 'nvfp4-pack-quantized'"),
        ({**configured(), "format": None}, "the format None"),
        (configured(strategy="block"), "codes by 'block'"),
        (configured(type="uint"), "asks for 'uint' codes"),
        (configured(group_size=None), "by 'group' with group_size None"),
        (configured(type="float", num_bits=8, symmetric=True), "float codes that are packed"),
        (configured("naive-quantized", type="float", num_bits=4, symmetric=True), "no layout for floats of 4 bits"),
        (configured(secret=1), "'secret'"),
        ({**configured(), "kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ({**configured(), "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse weights"),
        ({**configured(), "transform_config": {"config_groups": {}}}, "transform_config"),
        ({**configured(), "config_groups": {}}, "has no 'config_groups'"),
        (
            {**configured(), "config_groups": {"W4A16": ["Linear"]}},
            "'W4A16' of the quantization_config must be",
        ),
        (with_group(targets="Linear"), "'targets' in 'group_0'"),
        (with_group(weights=None), "'weights' in 'group_0'"),
        (with_group(dynamic=1), "'dynamic'"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(quantization, said):
    with pytest.raises(ConfigError, match=said) as caught:
        compressed_tensors.read(quantization, {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("target", "error", "said"),
    [
        ("re:(a+)+$", ConfigError, "too intricate"),
        ("re:.*a.*a.*a.*a.*b", ConfigError, "too intricate"),
        ("re:a?a?a?a?a?aaaaa", ConfigError, "too intricate"),
        ("re:(", ConfigError, "is no pattern"),
        ("re:.*down_proj", CheckpointError, f"{NAME} is quantized, and no group"),
    ],
)
def test_targets_that_can_not_be_matched_are_refused(target, error, said):
    quantization = with_group(targets=[target])
    quantization["config_groups"]["group_1"] = {**quantization["config_groups"]["group_0"], "targets": ["Embedding"]}
    parts = packed_parts()
    with pytest.raises(error, match=said):
        compressed_tensors.read(quantization, plain(parts))


def test_an_edited_configuration_is_refused_or_describes_a_model(tmp_path):
    path = convert(quantized(linear_layers("int4-g32")), tmp_path / "model.hf")
    described = json.loads((path / "config.json").read_text())
    outcomes = []
    for seed in range(200):
        rng = random.Random(seed)
        changed = {**described, "quantization_config": edit(described["quantization_config"], rng)}
        (path / "config.json").write_text(json.dumps(changed))
        try:
            for tensor in safetensors.read(path).tensors.values():
                assert tensor.read().shape == tensor.shape
                if tensor.read_quantized is not None:
                    np.testing.assert_array_equal(decode(tensor.read_quantized()), tensor.read())
            outcomes.append(True)
        except FusedLLMError:
            outcomes.append(False)
    assert {True, False} == set(outcomes)


def test_an_edited_header_is_refused_or_means_what_it_says(tmp_path):
    path = convert(quantized(linear_layers("int4-g32")), tmp_path / "model.hf") / "model.safetensors"
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header, outcomes = json.loads(content[8:end]), []
    for seed in range(100):
        text = json.dumps(edit(header, random.Random(seed))).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])
        try:
            for tensor in safetensors.read(path.parent).tensors.values():
                values = tensor.read()
                assert (values.shape, values.dtype) == (tensor.shape, tensor.dtype)
            outcomes.append(True)
        except FusedLLMError:
            outcomes.append(False)
    assert outcomes.count(False) > len(outcomes) // 2


def test_the_model_runs_with_the_codes_that_were_written(tmp_path):
    checkpoint = quantized(linear_layers("int4-g32"))
    path = convert(checkpoint, tmp_path / "codes.hf")
    whole = convert(checkpoint, tmp_path / "floats.hf", dtype="float32")
    ids = list(range(3, 19))
    kept = fusedllm.load(path, dtype="float32", keep_quantized=True, implementation="xla", max_context=32)
    assert kept.load_report is not None
    assert kept.load_report.bytes < 0.6 * sum(tensor.nbytes for tensor in safetensors.read(whole).tensors.values())
    floats = fusedllm.load(whole, dtype="float32", implementation="xla", max_context=32)
    # The same float32 values enter the same products; only how XLA orders the sums may differ.
    np.testing.assert_allclose(kept.logits(ids), floats.logits(ids), atol=1e-4)


# What the library and transformers make of it (extra `reference`).


def transformers_model(path: Path) -> Any:
    """As a user loads it, in float32, with its weights decompressed by the first forward pass.

    compressed-tensors 0.18 to 0.20 prepares packed zero points as if they were not packed, so that transformers refuses
    every file that has some, the library's own too; with `dequantize` it does not prepare.
    """
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    options = {}
    if has_zero_points(path):
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options).eval()
    with torch.no_grad():
        model(torch.tensor([[1, 2]]))
    return model


def has_zero_points(path: Path) -> bool:
    quantization = json.loads((path / "config.json").read_text())["quantization_config"]
    return not all(group["weights"]["symmetric"] for group in quantization["config_groups"].values())


def dtype_of_scales(path: Path) -> np.dtype:
    content = (path / "model.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    (dtype,) = {entry["dtype"] for name, entry in header.items() if name.endswith(".weight_scale")}
    return np.dtype({"F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32}[dtype])


def logits(model: Any, ids: list[int]) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float().numpy()


IDS = list(range(5, 37))


# Of the logits' range. Two float32 implementations that sum in different orders; see test_parity.py.
SAME = 1e-4
# Weights rounded to float16, 2**-12 of themselves, or to bfloat16, 2**-9.
HALF, BRAIN = 1e-3, 1e-2
# Activations of eight bits: off by half of a 127th of a token's largest, and as floats by 2**-4 of themselves.
ROUNDED, FLOAT_ROUNDED = 0.05, 0.1


def assert_transformers_agrees(path: Path, tolerance: float = SAME) -> None:
    """The very weights, and logits within `tolerance` of their range."""
    model = transformers_model(path)
    found = {name: value.numpy() for name, value in model.state_dict().items()}
    for name, tensor in safetensors.read(path).tensors.items():
        values = tensor.read().astype(np.float32)
        if has_zero_points(path) and tensor.read_quantized is not None:
            # `dequantize` computes in the dtype of the scales.
            values = values.astype(dtype_of_scales(path)).astype(np.float32)
        np.testing.assert_array_equal(found[name], values, err_msg=name)
    ours = fusedllm.load(path, dtype="float32", implementation="xla", max_context=64).logits(IDS)
    assert np.abs(logits(model, IDS) - ours).max() <= tolerance * np.ptp(ours)


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scale_dtype", ["float16", "float32"])
@pytest.mark.parametrize("scheme", WRITTEN)
def test_transformers_loads_every_scheme_to_the_same_weights_and_logits(tmp_path, scheme, scale_dtype):
    path = convert(quantized(linear_layers(scheme), scale_dtype=scale_dtype), tmp_path / "model.hf")
    rounded = HALF if scale_dtype == "float16" and not SCHEMES[scheme].symmetric else SAME
    assert_transformers_agrees(path, ROUNDED if SCHEMES[scheme].activation_bits else rounded)


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_several_schemes_and_a_quantized_vocabulary(tmp_path, tied):
    def scheme_for(name: str, tensor: LazyTensor) -> str | None:
        part = name.split(".")[-2]
        return {"q_proj": "int8", "v_proj": None, "down_proj": "fp8", "lm_head": "int8-g64"}.get(part, "int4-g32-sym")

    config = dataclasses.replace(CONFIG, tie_embeddings=tied)
    path = convert(quantized(scheme_for, config), tmp_path / "model.hf")
    assert_transformers_agrees(path)


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scheme", ["int8", "int8-g32", "int4-g32", "int4-g64-sym", "int3-g64"])
def test_the_library_packs_the_same_words(scheme):
    torch, helpers = pytest.importorskip("torch"), pytest.importorskip("compressed_tensors.compressors.pack_quantized")
    array = random_array(SCHEMES[scheme], 21, 192, np.random.default_rng(0))
    tensors, _ = compress(in_memory({NAME: lazy(NAME, array)}))
    bits, half = array.scheme.bits, 0 if array.scheme.signed else 2 ** (array.scheme.bits - 1)
    codes = torch.from_numpy((codes_of(array).astype(np.int16) - half).astype(np.int8))
    assert tensors[f"{MODULE}.weight_packed"].read().tolist() == helpers.pack_to_int32(codes, bits).tolist()
    if array.zeros is not None:
        zeros = torch.from_numpy((np.asarray(array.zeros) - half).astype(np.int8))
        words = helpers.pack_to_int32(zeros, bits, packed_dim=0)
        assert tensors[f"{MODULE}.weight_zero_point"].read().tolist() == words.tolist()


PRESETS = {
    "W4A16": SAME,
    "W4A16_ASYM": BRAIN,
    "W8A16": SAME,
    "W3A16": SAME,
    "W8A8": ROUNDED,
    "FP8_DYNAMIC": FLOAT_ROUNDED,
}


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_the_library_writes_is_read_to_its_own_weights(tmp_path, preset, dtype):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    library = pytest.importorskip("compressed_tensors")
    from compressed_tensors import quantization as q
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=100,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=2,
        initializer_range=0.1,
        dtype=dtype,
    )
    model = transformers.LlamaForCausalLM(config).to(getattr(torch, dtype))
    scheme = q.preset_name_to_scheme(preset, ["Linear"])
    q.apply_quantization_config(model, q.QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"]))
    for module in model.modules():
        args = getattr(getattr(module, "quantization_scheme", None), "weights", None)
        if args is not None:
            weight = module.weight.detach()
            parts = weight.unflatten(-1, (-1, args.group_size)) if args.group_size else weight.unsqueeze(1)
            scale, zero = calculate_qparams(parts.amin(-1), parts.amax(-1), args)
            module.weight_scale.data, module.weight_zero_point.data = scale, zero
            module.quantization_status = q.QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path)
    compressor.update_config(str(tmp_path))
    described = json.loads((tmp_path / "config.json").read_text())
    assert described["quantization_config"]["version"] == library.__version__

    found = safetensors.read(tmp_path)
    quantized_ones = [name for name, tensor in found.tensors.items() if tensor.read_quantized is not None]
    assert len(quantized_ones) == 7
    assert_transformers_agrees(tmp_path, PRESETS[preset])


@pytest.mark.reference
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scheme", ["int8", "int4-g32", "w8a8", "fp8"])
def test_transformers_writes_the_text_of_our_smollm2(tmp_path, scheme):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    source = open_checkpoint(fetch("smollm2-135m", progress=False))
    path = convert(requantized(source, linear_layers(scheme)), tmp_path / "smollm2.hf")
    ours = fusedllm.load(path, dtype="float32", keep_quantized=True, implementation="xla", max_context=256)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = ours.render(messages)
    said = ours.chat(messages, max_tokens=24, temperature=0).text
    model = transformers_model(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == ids
    with torch.no_grad():
        made = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0, len(ids) :]
    text = tokenizer.decode(made, skip_special_tokens=True)
    assert "Paris" in text
    if SCHEMES[scheme].activation_bits is None:
        assert text == said
        measured, wanted = ours.logits(ids), logits(model, ids)
        assert np.abs(measured - wanted).max() <= (SAME if SCHEMES[scheme].symmetric else HALF) * np.ptp(wanted)
