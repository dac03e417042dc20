"""Floats become GGUF blocks: the simple formats as the gguf library writes them, K-quants closer than llama.cpp's."""

from __future__ import annotations

import ctypes
import importlib.util

import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fusedllm.errors import FusedLLMError, QuantizationError
from fusedllm.quant import pack
from fusedllm.quant.blocks import SCHEMES
from fusedllm.quant.encode import ENCODERS, encode, fallback

gguf = pytest.importorskip("gguf")

# Steps from the lowest to the highest code of a simple format; whether the low end is a number of its own.
SIMPLE = {"Q8_0": (254, False), "Q4_0": (15, False), "Q4_1": (15, True), "Q5_0": (31, False), "Q5_1": (31, True)}
K_QUANTS = {"Q4_K": 15, "Q5_K": 31, "Q6_K": 63}
HALF_ROUNDING = 2.0**-11  # of float16, relative
SMALLEST_HALF = 2.0**-24

simple = pytest.mark.parametrize("name", SIMPLE)
k_quant = pytest.mark.parametrize("name", K_QUANTS)
every = pytest.mark.parametrize("name", ENCODERS)


def gaussian(rows: int, cols: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32) * np.float32(0.02)


def heavy_tailed(rows: int, cols: int, seed: int = 0) -> np.ndarray:
    """Student's t with three degrees of freedom: a few weights are ten times the typical one."""
    return np.random.default_rng(seed).standard_t(3, (rows, cols)).astype(np.float32) * np.float32(0.02)


def shifted(rows: int, cols: int, seed: int = 0) -> np.ndarray:
    """Weights that are nearly all positive, which a minimum below zero does not help."""
    return np.random.default_rng(seed).normal(1.5, 1, (rows, cols)).astype(np.float32)


def column_importance(cols: int, seed: int = 0) -> np.ndarray:
    """As activations have it: a few columns matter a hundred times as much as most."""
    return np.exp(1.5 * np.random.default_rng(seed).standard_normal(cols)).astype(np.float32)


DISTRIBUTIONS = {"gaussian": gaussian, "heavy tailed": heavy_tailed, "shifted": shifted}
every_distribution = pytest.mark.parametrize("draw", DISTRIBUTIONS.values(), ids=list(DISTRIBUTIONS))


def decode(name: str, blocks: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return SCHEMES[name].decode_numpy(blocks, shape)


def through(name: str, weights: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """What a reader finds after `weights` were written."""
    return decode(name, encode(name, weights, importance), weights.shape)


def by_the_library(name: str, weights: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.quantize(weights, gguf.GGMLQuantizationType[name])


def error(found: np.ndarray, wanted: np.ndarray, weight: np.ndarray | float = 1.0) -> float:
    return float((weight * (found.astype(np.float64) - wanted) ** 2).sum())


# Subnormal scales have no reciprocal in float32; what the library makes of them depends on the processor.
numbers = st.one_of(
    st.floats(-60000, 60000, width=32, allow_subnormal=False),
    st.integers(-32, 32).map(lambda value: value / 4),  # many ties between two codes
)
blocks_of_numbers = arrays(np.float32, (2, 32), elements=numbers)


def steps(name: str, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale and minimum of each simple block, as the file holds them."""
    halves = blocks[:, :4].copy().view(np.float16).astype(np.float32)
    return np.abs(halves[:, :1]), np.abs(halves[:, 1:]) if SIMPLE[name][1] else np.zeros_like(halves[:, :1])


@simple
@settings(max_examples=40)
@given(weights=blocks_of_numbers)
@example(weights=np.zeros((2, 32), np.float32))
@example(weights=np.full((2, 32), -3.25, np.float32))
def test_simple_formats_have_the_bits_of_the_gguf_library(name, weights):
    peak = np.abs(weights)
    assume(((peak == 0) | (peak > 1e-30)).all())
    assert encode(name, weights).tobytes() == by_the_library(name, weights).tobytes()


@simple
@every_distribution
def test_whole_matrices_in_simple_formats_have_the_bits_of_the_gguf_library(name, draw):
    weights = draw(96, 1536)  # more than one chunk
    assert encode(name, weights).tobytes() == by_the_library(name, weights).tobytes()


@simple
@settings(max_examples=40)
@given(weights=blocks_of_numbers)
def test_a_simple_format_is_within_half_a_step_of_every_weight(name, weights):
    blocks = encode(name, weights)
    count, has_minimum = SIMPLE[name]
    scale, minimum = steps(name, blocks)
    # Half a step of rounding; the scale's and the minimum's own rounding to float16, the scale's once for each step.
    allowed = scale / 2 + HALF_ROUNDING * (1.01 * scale * count + minimum) + SMALLEST_HALF * count
    # Q4_0 and Q5_0 have a code less on one side: what mirrors the largest magnitude there is a whole step away.
    if name in ("Q4_0", "Q5_0"):
        peak = np.take_along_axis(weights, np.abs(weights).argmax(-1, keepdims=True), -1)
        beyond = weights * np.sign(peak) < -(count // 2) * scale
        allowed = allowed + np.where(beyond, scale / 2, 0)
    assert has_minimum or not minimum.any()
    assert (np.abs(decode(name, blocks, weights.shape) - weights) <= allowed).all()


def six_bit(draw: np.random.Generator, count: int) -> np.ndarray:
    values = draw.integers(0, 64, (count, 8)).astype(np.uint8)
    values[np.arange(count), draw.integers(0, 8, count)] = 63
    return values


def k_fields(name: str, count: int, seed: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Fields of blocks that use all of their range, as `pack` takes them, and the values that the format defines."""
    draw = np.random.default_rng(seed)
    levels = K_QUANTS[name]
    scale = np.exp(draw.uniform(-9, -3, count)).astype(np.float16)
    groups = 16 if name == "Q6_K" else 8
    codes = draw.integers(0, levels + 1, (count, groups, 256 // groups)).astype(np.uint8)
    codes[..., 3], codes[..., 7] = 0, levels
    flat = codes.reshape(count, 256)
    if name == "Q6_K":
        scales = draw.integers(-127, 128, (count, 16)).astype(np.int8)
        scales[np.arange(count), draw.integers(0, 16, count)] = -128
        step = scale.astype(np.float32)[:, None] * scales
        return [scale, scales, flat], (step[..., None] * (codes.astype(np.float32) - 32)).reshape(count, 256)
    minimum = (scale * np.exp(draw.uniform(0, 4, count))).astype(np.float16)
    scales, minimums = six_bit(draw, count), six_bit(draw, count)
    step = scale.astype(np.float32)[:, None] * scales
    offset = minimum.astype(np.float32)[:, None] * minimums
    values = step[..., None] * codes - offset[..., None]
    return [scale, minimum, scales, minimums, flat], values.reshape(count, 256)


@k_quant
@settings(max_examples=40)
@given(seed=st.integers(0, 2**32))
def test_packing_puts_every_field_where_decoding_looks_for_it(name, seed):
    fields, values = k_fields(name, 4, seed)
    packed = getattr(pack, name.lower())(*fields)
    assert packed.shape == (4, SCHEMES[name].block_bytes)
    np.testing.assert_array_equal(decode(name, packed, values.shape), values)


@k_quant
@settings(max_examples=8)
@given(seed=st.integers(0, 2**32))
def test_k_quant_blocks_that_use_their_range_are_found_again_exactly(name, seed):
    _, values = k_fields(name, 512, seed)
    np.testing.assert_array_equal(through(name, values), values)


@simple
@every_distribution
def test_encoding_what_was_decoded_changes_nothing(name, draw):
    once = through(name, draw(16, 512))
    np.testing.assert_array_equal(through(name, once), once)


@k_quant
@every_distribution
def test_encoding_a_k_quant_again_loses_little(name, draw):
    weights = draw(16, 512)
    once = through(name, weights)
    # Where a sub-block uses few of its codes another scale may be found; a second rounding would lose as much again.
    assert error(through(name, once), once) < 0.1 * error(once, weights)


def nearest_k_quant(name: str, weights: np.ndarray) -> np.ndarray:
    """Round to nearest: the range of every sub-block divided evenly, then the scales rounded, then the codes."""
    groups = weights.reshape(-1, 256 // (16 if name == "Q6_K" else 32), 16 if name == "Q6_K" else 32)
    if name == "Q6_K":
        scale = np.abs(groups).max(-1) / 31
        shared = scale.max(-1, keepdims=True) / 127
        step = (shared * np.round(scale / shared))[..., None]
        return (step * np.round(groups / np.maximum(step, 1e-30)).clip(-32, 31)).reshape(weights.shape)
    low = np.minimum(groups.min(-1), 0)
    scale = (groups.max(-1) - low) / K_QUANTS[name]
    shared, shared_low = scale.max(-1, keepdims=True) / 63, low.min(-1, keepdims=True) / 63
    step = (shared * np.round(scale / shared))[..., None]
    offset = (shared_low * np.round(low / np.where(shared_low == 0, 1, shared_low)))[..., None]
    codes = np.round((groups - offset) / np.maximum(step, 1e-30)).clip(0, K_QUANTS[name])
    return (step * codes + offset).reshape(weights.shape)


@k_quant
@every_distribution
def test_a_k_quant_loses_less_than_rounding_to_the_nearest(name, draw):
    weights = draw(64, 512)
    baseline = nearest_k_quant(name, weights)
    found = through(name, weights)
    # Measured: 0.70 to 0.86 of the squared error; the rest is room for other random numbers.
    assert error(found, weights) < 0.9 * error(baseline, weights)
    size = np.abs(weights)
    assert error(found, weights, size) < 0.95 * error(baseline, weights, size)


@pytest.mark.parametrize("name", [name for name in ENCODERS if name != "Q8_0"])
@pytest.mark.parametrize("draw", [gaussian, heavy_tailed])
def test_importance_moves_the_error_to_the_columns_that_do_not_matter(name, draw):
    weights, importance = draw(32, 512), column_importance(512)
    with_it, without = through(name, weights, importance), through(name, weights)
    assert error(with_it, weights, importance) < 0.8 * error(without, weights, importance)


@pytest.mark.parametrize("name", [name for name in ENCODERS if name != "Q8_0"])
def test_columns_that_calibration_never_saw_are_still_weights(name):
    weights = gaussian(16, 512)
    unseen = np.arange(512) % 3 == 0
    found = through(name, weights, np.where(unseen, 0, 1))
    # Zeros would lose all of their squares; measured are 0.2 % (Q6_K) to 2 % (Q4_1, Q4_K).
    assert error(found[:, unseen], weights[:, unseen]) < 0.05 * error(0 * weights[:, unseen], weights[:, unseen])


@pytest.mark.parametrize("name", ["Q4_1", "Q4_K"])
def test_only_ratios_of_importance_matter_and_none_is_as_good_as_no_ratio(name):
    weights, importance = gaussian(4, 256), column_importance(256)
    assert encode(name, weights, importance).tobytes() == encode(name, weights, importance * 1024).tobytes()
    assert encode(name, weights, np.zeros(256)).tobytes() == encode(name, weights, np.ones(256)).tobytes()


def test_q8_0_has_nothing_to_gain_from_importance():
    weights = gaussian(4, 64)
    assert encode("Q8_0", weights, np.arange(64)).tobytes() == encode("Q8_0", weights).tobytes()


@every
@pytest.mark.parametrize("importance", [None, np.linspace(0.1, 9, 512)], ids=["plain", "importance"])
def test_a_row_is_encoded_alike_alone_and_among_others(name, importance):
    weights = heavy_tailed(300, 512)  # K-quants: two chunks, the second one padded
    together = encode(name, weights, importance)
    for row in (0, 255, 256, 299):
        alone = encode(name, weights[row : row + 1], importance)
        assert alone.tobytes() == together[row : row + 1].tobytes()


@every
@pytest.mark.parametrize("importance", [None, np.ones(256)], ids=["plain", "importance"])
@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-40, -1e-30, 1e-9])
def test_weights_below_every_scale_become_zeros(name, value, importance):
    assert not through(name, np.full((2, 256), value, np.float32), importance).any()


@k_quant
def test_the_scale_of_small_weights_does_not_vanish_in_float16(name):
    # A sixty-third of a fifteenth of these has no float16 above 0, of all but the smallest of which a reader would
    # see zeros.
    weights = gaussian(8, 256) * np.float32(1e-5 / 0.02)
    assert error(through(name, weights), weights) < 0.02 * error(np.zeros_like(weights), weights)


@every
def test_constant_weights_keep_their_value(name):
    weights = np.repeat(np.float32([[0.7], [-0.7], [123.0], [-1e-2]]), 256, axis=1)
    # Half of the last of 128 steps, in which Q6_K holds its scales where float16 is too coarse to hold them.
    np.testing.assert_allclose(through(name, weights), weights, rtol=1 / 256, atol=SMALLEST_HALF)


@every
def test_large_weights_are_written_as_long_as_float16_holds_the_scale(name):
    weights = gaussian(4, 256) * np.float32(1e4 / 0.02)
    assert error(through(name, weights), weights) < 0.02 * error(np.zeros_like(weights), weights)


@every
@pytest.mark.parametrize("importance", [None, np.ones(256)], ids=["plain", "importance"])
@pytest.mark.parametrize("value", [1e10, -3e38])
def test_a_scale_that_float16_can_not_hold_is_refused_with_what_to_do(name, value, importance):
    weights = gaussian(2, 256)
    weights[1, 3] = value
    with pytest.raises(QuantizationError, match=rf"weights up to .* need a scale in {name} .*: write them as BF16"):
        encode(name, weights, importance)


@every
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_refused(name, value):
    weights = gaussian(2, 256)
    weights[1, 3] = value
    with pytest.raises(QuantizationError, match="the weights hold NaN or infinity"):
        encode(name, weights)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("Q2_K", np.zeros((1, 256), np.float32)), "Q2_K can't be written; known are: Q8_0"),
        (("Q4_K", np.zeros((2, 576), np.float32)), "whole blocks of 256 weights, and these have 576; Q5_0 fits"),
        (("Q4_0", np.zeros(32, np.float32)), r"for matrices, and the shape is \(32,\)"),
        (("Q4_0", np.zeros((0, 32), np.float32)), r"for matrices, and the shape is \(0, 32\)"),
        (("Q8_0", np.zeros((2, 40), np.float32)), "these have 40; F16 fits"),
        (("Q4_0", np.zeros((2, 64), np.float32), np.ones(32)), r"the shape \(32,\), and there are 64 columns"),
        (("Q4_0", np.zeros((2, 64), np.float32), -np.ones(64)), "a number that is not negative"),
        (("Q4_0", np.zeros((2, 64), np.float32), np.full(64, np.nan)), "a number that is not negative"),
    ],
)
def test_what_can_not_be_encoded_is_one_sentence(arguments, said):
    with pytest.raises(QuantizationError, match=said) as caught:
        encode(*arguments)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, FusedLLMError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("name", "cols", "found"),
    [
        ("Q4_K", 512, "Q4_K"),
        ("Q4_K", 576, "Q5_0"),
        ("Q5_K", 576, "Q5_1"),
        ("Q6_K", 576, "Q8_0"),
        ("Q4_0", 576, "Q4_0"),
        ("Q4_K", 40, "F16"),
        ("Q8_0", 40, "F16"),
    ],
)
def test_the_fallback_is_llama_cpp_s(name, cols, found):
    assert fallback(name, cols) == found


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("name", ["Q8_0", "Q4_K"])
def test_other_floats_are_encoded_as_their_float32(name, dtype):
    weights = gaussian(3, 256).astype(dtype)
    assert encode(name, weights).tobytes() == encode(name, weights.astype(np.float32)).tobytes()


def by_llama_cpp(name: str, weights: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """What llama.cpp's own quantizer writes, out of the library inside `xllamacpp`."""
    spec = importlib.util.find_spec("xllamacpp.xllamacpp")
    quantize = ctypes.CDLL(spec.origin).ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    whole, pointer = ctypes.c_int64, ctypes.c_void_p
    quantize.argtypes = [ctypes.c_int, pointer, pointer, whole, whole, whole, pointer]
    scheme = SCHEMES[name]
    rows, cols = weights.shape
    result = np.zeros((rows, cols // scheme.block_size * scheme.block_bytes), np.uint8)
    kind = int(gguf.GGMLQuantizationType[name])
    columns = None if importance is None else importance.ctypes.data
    written = quantize(kind, weights.ctypes.data, result.ctypes.data, 0, rows, cols, columns)
    assert written == result.nbytes
    return result


@pytest.mark.reference
@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="needs the extra `test`")
@k_quant
@every_distribution
def test_a_k_quant_loses_less_than_llama_cpp_s(name, draw):
    weights, importance = draw(256, 1024), column_importance(1024)
    ours, theirs = through(name, weights), decode(name, by_llama_cpp(name, weights), weights.shape)
    for weight in (1.0, np.abs(weights), weights * weights):
        assert error(ours, weights, weight) < error(theirs, weights, weight)
    ours = through(name, weights, importance)
    theirs = decode(name, by_llama_cpp(name, weights, importance), weights.shape)
    assert error(ours, weights, importance) < 0.95 * error(theirs, weights, importance)
