"""GPTQ and AWQ checkpoints, packed here code by code from the definition of their formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from grouped_checkpoints import CONFIG, LINEAR, codes_of, plain
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

import fusedllm
from fusedllm.errors import CheckpointError, ConfigError
from fusedllm.model.families import config_to_hf
from fusedllm.quant.schemes import SCHEMES
from fusedllm.weights import safetensors
from fusedllm.weights.checkpoint import LazyTensor
from fusedllm.weights.convert import convert
from fusedllm.weights.gptq import read_awq, read_gptq
from fusedllm.weights.random import random_checkpoint

MODULE = "model.layers.0.mlp.up_proj"
NAME = f"{MODULE}.weight"
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def words_down(codes: np.ndarray, bits: int) -> np.ndarray:
    """Each column as one number, code i in its bits `i * bits` and up, cut into words of 32 bits from the lowest."""
    count, columns = codes.shape
    words = -(-count * bits // 32)
    packed = np.zeros((words, columns), np.uint32)
    for column in range(columns):
        number = sum(int(code) << (bits * index) for index, code in enumerate(codes[:, column]))
        packed[:, column] = [(number >> (32 * word)) & 0xFFFFFFFF for word in range(words)]
    return packed.view(np.int32)


def gptq_parts(
    codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, bits: int, order: np.ndarray | None, version: int = 1
) -> dict[str, np.ndarray]:
    """Codes `[in, out]`, zero points and scales `[groups, out]` as AutoGPTQ stores them."""
    stored = zeros - 1 if version == 1 else zeros
    parts = {
        f"{MODULE}.qweight": words_down(codes, bits),
        f"{MODULE}.qzeros": np.ascontiguousarray(words_down(stored.T, bits).T),
        f"{MODULE}.scales": scales,
    }
    return parts if order is None else {**parts, f"{MODULE}.g_idx": order.astype(np.int32)}


def words_of_awq(codes: np.ndarray) -> np.ndarray:
    """Codes `[n, out]`: nibble i of a word is the column `AWQ_ORDER[i]` of eight."""
    eight = codes.reshape(len(codes), -1, 8).astype(np.int64)
    return (
        sum(eight[..., column] << (4 * index) for index, column in enumerate(AWQ_ORDER))
        .astype(np.uint32)
        .view(np.int32)
    )


def asked(bits: int = 4, size: int = 32, **more: Any) -> dict[str, Any]:
    """As GPTQModel writes it, with some of what it adds."""
    meta = {"quantizer": ["gptqmodel:7.7.0"], "damp_percent": 0.05, "mse": 0.0, "static_groups": False}
    usual = {"quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": False, "sym": False}
    return {**usual, "lm_head": False, "dynamic": None, "pack_dtype": "int32", "meta": meta, **more}


def numbers(
    bits: int, width: int, rows: int, groups: int, seed: int, low: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**bits, (width, rows))
    zeros = rng.integers(low, 2**bits, (groups, rows))
    return codes, zeros, rng.uniform(1e-3, 0.1, (groups, rows)).astype(np.float16)


def dequantized(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, order: np.ndarray) -> np.ndarray:
    return ((codes - zeros[order]) * scales.astype(np.float32)[order]).T.astype(np.float32)


@given(
    bits=st.sampled_from([3, 4, 8]),
    size=st.sampled_from([-1, 8, 16, 32, 48, 128]),
    blocks=st.integers(1, 5),
    rows=st.integers(1, 40),
    version=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**32),
)
def test_codes_scales_and_zero_points_are_those_that_were_packed(bits, size, blocks, rows, version, seed):
    width = 32 * blocks
    groups = 1 if size < 0 else -(-width // size)
    codes, zeros, scales = numbers(bits, width, rows, groups, seed, low=2 - version)
    order = np.arange(width) // (width if size < 0 else size)
    parts = gptq_parts(codes, zeros, scales, bits, order if seed % 2 else None, version)
    format = "gptq" if version == 1 else "gptq_v2"
    found = read_gptq(asked(bits, size, checkpoint_format=format), plain(parts))[NAME]
    shift = 128 if bits == 8 else 0
    array = found.read_quantized()
    assert (array.scheme.bits, array.scheme.group_size, array.shape) == (bits, max(size, 0), (rows, width))
    np.testing.assert_array_equal(codes_of(array), codes.T - shift)
    np.testing.assert_array_equal(array.zeros, zeros.T - shift)
    np.testing.assert_array_equal(array.scales, scales.T)
    wanted = dequantized(codes, zeros, scales, order)
    np.testing.assert_array_equal(found.read(), wanted)
    assert found.read().dtype == found.dtype == np.float32


@pytest.mark.parametrize(
    ("bits", "size", "scheme"),
    [(4, 64, "int4-g64-sym"), (8, 32, "int8-g32"), (8, -1, "int8"), (3, 128, "int3-g128-sym")],
)
def test_symmetric_codes_get_the_schemes_of_the_table(bits, size, scheme):
    codes, _, scales = numbers(bits, 128, 16, 1 if size < 0 else 128 // size, 0)
    zeros = np.full(scales.shape, 2 ** (bits - 1))
    found = read_gptq(asked(bits, size, sym=True), plain(gptq_parts(codes, zeros, scales, bits, None)))[NAME]
    array = found.read_quantized()
    assert array.scheme is SCHEMES[scheme]
    assert array.zeros is None
    np.testing.assert_array_equal(codes_of(array), codes.T - (128 if bits == 8 else 0))


def test_zero_points_beside_the_middle_are_not_symmetric():
    codes, zeros, scales = numbers(4, 64, 16, 2, 0)
    found = read_gptq(asked(sym=True), plain(gptq_parts(codes, zeros, scales, 4, None)))[NAME]
    with pytest.raises(CheckpointError, match=rf"{MODULE}.qzeros has zero points beside the middle"):
        found.read()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_zero_point_of_nought_that_borrowed_from_its_neighbour_gets_it_back(bits):
    codes, zeros, scales = numbers(bits, 64, 16, 2, 0)
    zeros[0, ::3] = 0
    zeros[1, 1] = zeros[1, 2] = 0
    parts = gptq_parts(codes, zeros, scales, bits, None, version=2)
    # GPTQModel makes the format gptq of its second version by subtracting whole words.
    ones = sum(1 << shift for shift in range(0, 32, bits))
    parts[f"{MODULE}.qzeros"] = (parts[f"{MODULE}.qzeros"].view(np.uint32) - np.uint32(ones)).view(np.int32)
    found = read_gptq(asked(bits), plain(parts))[NAME]
    np.testing.assert_array_equal(found.read(), dequantized(codes, zeros, scales, np.arange(64) // 32))


@given(size=st.sampled_from([8, 32, 64]), blocks=st.integers(1, 3), seed=st.integers(0, 2**32))
def test_act_order_is_dequantized_only(size, blocks, seed):
    width = 64 * blocks
    codes, zeros, scales = numbers(4, width, 8, width // size, seed)
    order = np.random.default_rng(seed).permutation(np.arange(width) // size)
    follows = (order == np.arange(width) // size).all()
    parts = plain(gptq_parts(codes, zeros, scales, 4, order))
    found = read_gptq(asked(size=size, desc_act=True), parts)[NAME]
    assert (found.read_quantized is None) == (not follows)
    assert found.quantization is not None
    assert found.quantization.endswith("in act-order") == (not follows)
    np.testing.assert_array_equal(found.read(), dequantized(codes, zeros, scales, order))


@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize(("size", "width"), [(32, 96), (64, 128), (-1, 72)])
def test_awq_is_read_in_its_own_order(size, width, zero_point):
    groups = 1 if size < 0 else width // size
    codes, zeros, scales = numbers(4, width, 24, groups, 0, low=0)
    if not zero_point:
        zeros[:] = 8
    parts = {f"{MODULE}.qweight": words_of_awq(codes), f"{MODULE}.qzeros": words_of_awq(zeros)}
    parts[f"{MODULE}.scales"] = scales
    quantization = {"quant_method": "awq", "bits": 4, "group_size": size, "version": "gemm", "zero_point": zero_point}
    found = read_awq({**quantization, "modules_to_not_convert": None}, plain(parts))[NAME]
    array = found.read_quantized()
    np.testing.assert_array_equal(codes_of(array), codes.T)
    assert (array.zeros is None) == (not zero_point)
    np.testing.assert_array_equal(
        found.read(), dequantized(codes, zeros, scales, np.arange(width) // max(size, width * (size < 0)))
    )


@pytest.mark.parametrize("awq", [False, True])
def test_a_group_that_is_longer_than_the_row_is_the_row(awq):
    """A size that a stranger wrote asks for no memory: rows were padded to it before."""
    codes, zeros, scales = np.full((32, 8), 7), np.full((1, 8), 5), np.ones((1, 8), np.float16)
    words = words_of_awq if awq else lambda codes: words_down(codes, 4)
    stored = words_of_awq(zeros) if awq else np.ascontiguousarray(words_down((zeros - 1).T, 4).T)
    parts = {f"{MODULE}.qweight": words(codes), f"{MODULE}.qzeros": stored, f"{MODULE}.scales": scales}
    size = {"group_size": 2**30}
    read = read_awq({"bits": 4, **size}, plain(parts)) if awq else read_gptq({**asked(), **size}, plain(parts))
    assert read[NAME].read_quantized().values.nbytes == 8 * 16
    np.testing.assert_array_equal(read[NAME].read(), np.full((8, 32), 2.0))


@pytest.mark.parametrize("awq", [False, True])
def test_a_matrix_without_codes_is_refused(awq):
    parts = {f"{MODULE}.qweight": np.zeros((0, 8), np.int32)}
    with pytest.raises(CheckpointError, match="holds no codes"):
        (read_awq({"bits": 4, "group_size": 32}, plain(parts)) if awq else read_gptq(asked(), plain(parts)))


def test_a_bias_and_everything_else_stay():
    codes, zeros, scales = numbers(4, 64, 16, 2, 0)
    parts = gptq_parts(codes, zeros, scales, 4, None)
    others = {f"{MODULE}.bias": np.ones(16, np.float16), "model.norm.weight": np.ones(64, np.float32)}
    found = read_gptq(asked(), plain({**parts, **others}))
    assert found.keys() == {NAME, *others}


def test_scales_of_bfloat16_stay_exact():
    codes, zeros, scales = numbers(4, 64, 16, 2, 0)
    brain = scales.astype(ml_dtypes.bfloat16)
    found = read_gptq(asked(), plain(gptq_parts(codes, zeros, brain, 4, None)))[NAME]
    assert found.read_quantized().scales.dtype == np.float16
    np.testing.assert_array_equal(found.read(), dequantized(codes, zeros, brain, np.arange(64) // 32))


def damaged(part: str, value: np.ndarray | None) -> dict[str, LazyTensor]:
    codes, zeros, scales = numbers(4, 64, 16, 2, 0)
    parts = gptq_parts(codes, zeros, scales, 4, np.arange(64) // 32)
    if value is None:
        del parts[f"{MODULE}.{part}"]
    else:
        parts[f"{MODULE}.{part}"] = value
    return plain(parts)


@pytest.mark.parametrize(
    ("part", "value", "said"),
    [
        ("scales", None, f"{NAME} is quantized and has no 'scales'"),
        ("qzeros", None, f"{NAME} is quantized and has no 'qzeros'"),
        ("scales", np.ones((3, 16), np.float16), r"scales is float16 \[3, 16\], .* \[2, 16\]"),
        ("scales", np.ones((2, 16), np.int32), r"scales is int32 \[2, 16\]"),
        ("qzeros", np.ones((2, 3), np.int32), r"qzeros is int32 \[2, 3\], .* int32 \[2, 2\]"),
        ("qweight", np.ones((8, 16), np.int64), r"qweight is int64 \[8, 16\]"),
        ("qweight", np.ones(8, np.int32), r"qweight is int32 \[8\]"),
        ("g_idx", np.zeros(63, np.int32), r"g_idx is int32 \[63\], .* \[64\]"),
        ("g_idx", np.full(64, 2, np.int32), r"g_idx names groups from 2 to 2, and there are 2"),
        ("g_idx", np.full(64, -1, np.int32), r"g_idx names groups from -1 to -1"),
        ("weight", np.ones((16, 64), np.float16), "has both a weight and a qweight"),
    ],
)
def test_a_damaged_matrix_is_named(part, value, said):
    with pytest.raises(CheckpointError, match=said) as caught:
        read_gptq(asked(), damaged(part, value))
    assert "\n" not in str(caught.value)


def test_act_order_without_an_index_is_refused():
    with pytest.raises(CheckpointError, match=f"{NAME} is quantized and has no 'g_idx'"):
        read_gptq(asked(desc_act=True), damaged("g_idx", None))
    assert read_gptq(asked(), damaged("g_idx", None)).keys() == {NAME}


def test_words_that_end_inside_a_code_are_named():
    with pytest.raises(
        CheckpointError, match="qweight has columns of 8 words, which do not hold whole codes of 3 bits"
    ):
        read_gptq(asked(bits=3), damaged("scales", np.ones((2, 16), np.float16)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bits": 5}, "has bits 5 and group_size 32; codes of 3, 4, 8 bits"),
        ({"bits": 2}, "has bits 2"),
        ({"bits": None}, "has bits None"),
        ({"group_size": None}, "has bits 4 and group_size None"),
        ({"group_size": -2}, "'group_size'"),
        ({"group_size": 12}, "no layout for integers of 4 bits in groups of 12"),
        ({"checkpoint_format": "marlin"}, "has the format 'marlin'"),
        ({"format": "gptq_p"}, "has the format 'gptq_p'"),
        ({"is_marlin_format": True}, "is_marlin_format"),
        ({"pack_dtype": "int16"}, "pack_dtype"),
        ({"adapter": {"name": "eora"}}, "adapter"),
        ({"rotation": "hadamard"}, "rotation"),
        ({"dynamic": {"+:.*down.*": {"bits": 8}}}, r"rules for single modules \('dynamic'\)"),
        ({"sym": "yes"}, "'sym'"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(changes, said):
    with pytest.raises(ConfigError, match=said):
        read_gptq({**asked(), **changes}, {})


def test_rules_that_leave_modules_alone_are_followed():
    codes, zeros, scales = numbers(4, 64, 16, 2, 0)
    parts = gptq_parts(codes, zeros, scales, 4, None)
    assert read_gptq(asked(dynamic={"-:.*down_proj.*": {}}), plain(parts)).keys() == {NAME}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": "gemv"}, "has the version 'gemv'; of AWQ only gemm"),
        ({"backend": "llm-awq"}, "has the version 'llm-awq'"),
        ({"bits": 8}, "has bits 8"),
    ],
)
def test_other_packings_of_awq_are_refused_by_name(changes, said):
    with pytest.raises(ConfigError, match=said):
        read_awq({"quant_method": "awq", "bits": 4, "group_size": 32, **changes}, {})


def write_model(path: Path, bits: int = 4, size: int = 32) -> dict[str, np.ndarray]:
    """A whole checkpoint in GPTQ; returns the floats of its matrices."""
    path.mkdir()
    tensors, floats = {}, {}
    for name, tensor in random_checkpoint(CONFIG, "float16", seed=5).tensors.items():
        if name not in LINEAR:
            tensors[name] = tensor.read()
            continue
        rows, width = tensor.shape
        codes, zeros, scales = numbers(bits, width, rows, width // size, len(floats))
        # Near the middle of the codes, so that the floats are weights that a model could have.
        scales *= np.float16(0.1)
        order = np.arange(width) // size
        parts = gptq_parts(codes, zeros, scales, bits, order)
        tensors |= {part.replace(MODULE, name.removesuffix(".weight")): value for part, value in parts.items()}
        floats[name] = dequantized(codes, zeros, scales, order)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config_to_hf(CONFIG) | {"quantization_config": asked(bits, size)}))
    return floats


@pytest.mark.parametrize("bits", [4, 8])
def test_a_checkpoint_is_read_and_runs(tmp_path, bits):
    floats = write_model(tmp_path / "gptq", bits)
    found = safetensors.read(tmp_path / "gptq")
    assert found.config == CONFIG
    for name, values in floats.items():
        np.testing.assert_array_equal(found.tensors[name].read(), values)
    options = {"dtype": "float32", "implementation": "xla", "max_context": 32}
    kept = fusedllm.load(tmp_path / "gptq", keep_quantized=True, **options)
    whole = fusedllm.load(convert(found, tmp_path / "floats.hf", dtype="float32"), **options)
    # The same float32 values enter the same products; only how XLA orders the sums may differ.
    np.testing.assert_allclose(kept.logits(range(3, 19)), whole.logits(range(3, 19)), atol=1e-3)


def test_a_configuration_in_a_file_of_its_own_is_found(tmp_path):
    floats = write_model(tmp_path / "gptq")
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())
    quantization = config.pop("quantization_config")
    del quantization["quant_method"]
    (tmp_path / "gptq" / "config.json").write_text(json.dumps(config))
    (tmp_path / "gptq" / "quantize_config.json").write_text(json.dumps(quantization))
    found = safetensors.read(tmp_path / "gptq")
    np.testing.assert_array_equal(found.tensors[LINEAR[0]].read(), floats[LINEAR[0]])


def test_gptq_becomes_compressed_tensors_with_the_same_codes(tmp_path):
    floats = write_model(tmp_path / "gptq")
    found = safetensors.read(convert(tmp_path / "gptq", tmp_path / "model.hf"))
    for name, values in floats.items():
        assert found.tensors[name].quantization == "int4-g32"
        np.testing.assert_array_equal(found.tensors[name].read(), values)


def test_other_methods_are_refused_by_name(tmp_path):
    write_model(tmp_path / "gptq")
    path = tmp_path / "gptq" / "config.json"
    for method in ("bitsandbytes", "fp8", None, ["gptq"]):
        path.write_text(json.dumps(config_to_hf(CONFIG) | {"quantization_config": {"quant_method": method}}))
        with pytest.raises(
            ConfigError, match=r"'quantization_config' \(.*compressed-tensors, GPTQ and AWQ can"
        ) as caught:
            safetensors.read(tmp_path / "gptq")
        assert repr(method) in str(caught.value)
