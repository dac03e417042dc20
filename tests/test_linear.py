"""Products with weights: native against XLA, every variant, over shapes that are multiples of nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packing import GROUPED, NAMES, SOME_GROUPED, blocks, grouped, pack, pack_array, random_packed, raw

from fusedllm.errors import ImplementationError
from fusedllm.kernels import linear as linear_module
from fusedllm.kernels import native
from fusedllm.kernels.dequantize import dequantize
from fusedllm.kernels.grouped import MOST_INTEGER_COLUMNS, GroupedScheme
from fusedllm.kernels.linear import linear
from fusedllm.kernels.packed import PLAIN_NUMBERS
from fusedllm.kernels.quantize import quantize
from fusedllm.qarray import QuantArray
from fusedllm.quant.schemes import SCHEMES

pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels were not built")
ISAS = native.isas() if native.available() else ()
PLAIN = ("float32", "bfloat16", "float16")


def as_codes(x: np.ndarray) -> np.ndarray:
    """What is left of activations that are rounded to eight bits in groups of 32, in float64."""
    groups = x.reshape(*x.shape[:-1], -1, 32)
    scale = np.abs(groups).max(axis=-1, keepdims=True) / np.float32(127)
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.where(scale > 0, np.rint(groups / scale), 0)
    return (codes * scale).reshape(x.shape).astype(np.float64)


def bound(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """How far the rounding of activations may move a product: half a step for every weight."""
    groups = np.abs(x.reshape(len(x), -1, 32)).max(axis=-1) / 127
    magnitudes = np.abs(weight.astype(np.float64)).reshape(len(weight), -1, 32).sum(axis=-1)
    return 0.5 * groups @ magnitudes.T


def rounded_activations(isa: str, dtype: str, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """How far products may move where the processor multiplies bfloat16 with bfloat16: half a step of activations."""
    applies = isa == "avx512bf16" and dtype == "bfloat16"
    return np.abs(x) @ np.abs(weight).T * (2.0**-8 if applies else 0.0)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=12)
@given(
    names=st.lists(st.sampled_from(NAMES + GROUPED + PLAIN), min_size=1, max_size=4),
    groups=st.integers(1, 5),
    tokens=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
)
def test_products_equal_those_of_the_decoded_weights(isa, names, groups, tokens, seed):
    rng = np.random.default_rng(seed)
    width = 32 * groups
    x = (rng.standard_normal((tokens, width)) * 10.0 ** rng.integers(-3, 4, (tokens, 1))).astype(np.float32)
    weights, matrices = [], []
    for name in names:
        rows = int(rng.integers(1, 50))
        if name in PLAIN:
            weights.append(jnp.asarray(rng.standard_normal((rows, width)), name))
            matrices.append(np.asarray(weights[-1], np.float32))
        else:
            weights.append(random_packed(name, rows, width, rng))
            matrices.append(np.asarray(dequantize(weights[-1])))
    with native.using_isa(isa):
        products = linear(jnp.asarray(x), *weights, implementation="ffi")
        precise = linear(jnp.asarray(x), *weights, precise=True, implementation="ffi")
    for name, product, near, matrix in zip(names, products, precise, matrices, strict=True):
        exact = x.astype(np.float64) @ matrix.T.astype(np.float64)
        # Rounding of float32 sums, whose terms with offset 128 are larger than the weights that they make.
        slack = 1e-5 * (np.abs(x) @ np.abs(matrix).T + 128 * np.abs(x).sum(axis=1, keepdims=True) * 0.01)
        if name in PLAIN:
            assert (np.abs(near - exact) <= slack).all()
            assert (np.abs(product - exact) <= slack + rounded_activations(isa, name, x, matrix)).all()
            continue
        assert (np.abs(near - exact) <= bound(x, matrix) / 100 + slack).all()
        assert (np.abs(product - exact) <= bound(x, matrix) * 1.01 + slack).all()
        # And nothing but the rounding of activations: a code may go the other way where two are equally near.
        moved = np.abs(product - as_codes(x) @ matrix.T.astype(np.float64))
        assert np.median(moved - slack) <= 0


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", NAMES + SOME_GROUPED)
@pytest.mark.parametrize("tokens", [1, 3, 21])
def test_precise_products_are_hundreds_of_times_nearer(isa, name, tokens):
    rng = np.random.default_rng(tokens)
    weight = random_packed(name, 37, 96, rng)
    x = jnp.asarray(rng.standard_normal((tokens, 96)), jnp.float32)
    exact = np.asarray(x, np.float64) @ np.asarray(weight.dequantize(), np.float64).T
    with native.using_isa(isa):
        rough, near = (
            linear(jnp.asarray(x), weight, precise=precise, implementation="ffi")[0] for precise in (False, True)
        )
    assert np.abs(near - exact).max() < np.abs(rough - exact).max() / 50
    assert np.abs(near - exact).max() < 1e-4 * np.abs(exact).max()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", NAMES)
def test_weights_at_the_ends_of_their_range(isa, name):
    made = blocks(name, 16, 64, np.random.default_rng(2))
    for byte in (0, 255):
        made.reshape(16, 2, -1)[..., -16:] = byte
        weight = pack(name, 64, made)
        x = np.full((3, 64), 127.0, np.float32)
        with native.using_isa(isa):
            (product,) = linear(jnp.asarray(x), weight, implementation="ffi")
        matrix = np.asarray(weight.dequantize(), np.float64)
        # Every activation is a code exactly, so nothing is lost but float32's last bits.
        np.testing.assert_allclose(product, x @ matrix.T, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precise", [False, True])
@pytest.mark.parametrize("tokens", [2, 17])
@pytest.mark.parametrize("value", [0.0, 1e-42, 1e-31, 1e36, 5e36, 6e36, 3e38, np.inf, -np.inf, np.nan])
def test_activations_of_any_magnitude(isa, precise, tokens, value):
    weight = pack("Q4_1", 64, blocks("Q4_1", 20, 64, np.random.default_rng(3), scale=1e-3))
    x = np.ones((tokens, 64), np.float32)
    x[1, 32:] = value
    with native.using_isa(isa):
        (product,) = linear(jnp.asarray(x), weight, precise=precise, implementation="ffi")
    (expected,) = linear(jnp.asarray(x), weight, implementation="xla")
    others = np.arange(tokens) != 1
    np.testing.assert_allclose(product[others], expected[others], rtol=1e-4, atol=1e-5)
    if abs(value) < 2.0**122:
        np.testing.assert_allclose(product[1], expected[1], rtol=1e-4, atol=1e-5)
    else:
        assert not np.isfinite(product[1]).any()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [1, 2, 5, 8, 16])
def test_scales_of_any_kind(isa, name, tokens):
    """Zero of both signs, the least and the largest denormal, the largest number, infinities and what is none."""
    rng = np.random.default_rng(tokens)
    scales = np.asarray([0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00], "<u2")
    made = blocks(name, len(scales), 64, rng, scale=1e-6)
    made.reshape(len(scales), 2, -1)[:, 1, :2] = scales[:, None].view(np.uint8)
    weight = pack(name, 64, made)
    matrix = np.asarray(weight.dequantize())
    for magnitude in (2e-26, 1e-3, 1.0, 5e36):
        x = (rng.uniform(-1, 1, (tokens, 64)) * magnitude).astype(np.float32)
        with native.using_isa(isa):
            (product,) = linear(jnp.asarray(x), weight, precise=True, implementation="ffi")
        with np.errstate(all="ignore"):
            exact = x.astype(np.float64) @ matrix.T.astype(np.float64)
            sizes = np.abs(x) @ np.abs(matrix).T + 128 * np.abs(x) @ np.abs(matrix / np.maximum(1, np.abs(matrix))).T
            finite = np.isfinite(matrix).all(axis=1) & (sizes < 3e38)
            assert (np.abs(product - exact) <= 1e-4 * sizes + 1e-38)[finite].all()
        assert not np.isfinite(np.asarray(product)[:, ~np.isfinite(matrix).all(axis=1)]).any()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [1, 8, 19])
def test_groups_of_zeros_beside_large_scales(isa, name, tokens):
    rng = np.random.default_rng(tokens)
    scales = np.asarray([0.5, 0.7, -0.5, -0.99, 1.0, 2.0, 1e-4, 0.25], np.float16)
    made = blocks(name, len(scales), 96, rng)
    made.reshape(len(scales), 3, -1)[:, :, :2] = scales[:, None, None].view(np.uint8)
    weight = pack(name, 96, made)
    x = rng.standard_normal((tokens, 96)).astype(np.float32)
    x[:, 32:64] = 0
    x[::2, 64:] = 1e-30
    matrix = np.asarray(weight.dequantize())
    exact = x.astype(np.float64) @ matrix.T.astype(np.float64)
    for precise in (False, True):
        with native.using_isa(isa):
            (product,) = linear(jnp.asarray(x), weight, precise=precise, implementation="ffi")
        slack = 1e-5 * (np.abs(x) @ np.abs(matrix).T + 128 * np.abs(x).sum(axis=1, keepdims=True))
        assert (
            np.abs(product - exact) <= (bound(x, matrix) / 100 if precise else bound(x, matrix) * 1.01) + slack
        ).all()


def steps(array: QuantArray, codes: float) -> np.ndarray:
    """The largest term that a product makes of a weight whose codes are as large as `codes`, beside its zero point."""
    scheme, width = array.scheme, array.shape[1]
    scales, zeros = (0 if numbers is None else np.abs(numbers) for numbers in (array.scales, array.zeros))
    return np.repeat(np.asarray(scales * (codes + zeros), np.float64), scheme.group_size or width, axis=1)[:, :width]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", SOME_GROUPED)
def test_grouped_codes_at_the_ends_of_their_range(isa, name):
    rng = np.random.default_rng(2)
    array = grouped(name, 16, 96, rng)
    x = np.full((3, 96), 127.0, np.float32) * np.asarray([[1], [-1], [0]], np.float32)
    # Of eight bits the least code is one below what the quantizer makes.
    for byte in (0, 255, 0x80, 0x7F):
        weight = pack_array(array.replace(values=jnp.full_like(array.values, byte)))
        with native.using_isa(isa):
            (product,) = linear(jnp.asarray(x), weight, implementation="ffi")
        exact = x @ np.asarray(dequantize(weight), np.float64).T
        # Every activation is a code exactly, so nothing is lost but float32's last bits.
        assert (np.abs(product - exact) <= 1e-6 * np.abs(x) @ steps(array, 128).T).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", SOME_GROUPED)
@pytest.mark.parametrize("tokens", [1, 2, 5, 8, 16])
def test_shared_scales_and_zero_points_of_any_kind(isa, name, tokens):
    """Zero of both signs, the least and the largest denormal, the largest number, infinities and what is none."""
    rng = np.random.default_rng(tokens)
    kinds = np.asarray([0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00], "<u2")
    array = grouped(name, 2 * len(kinds), 160, rng, scale=1e-6)
    scales, zeros = (None if numbers is None else np.array(numbers) for numbers in (array.scales, array.zeros))
    scales[: len(kinds), -1] = kinds.view(np.float16)
    if zeros is not None:
        zeros[len(kinds) :, -1] = kinds.view(np.float16)
    array = array.replace(scales=jnp.asarray(scales), zeros=None if zeros is None else jnp.asarray(zeros))
    weight, matrix = pack_array(array), np.asarray(dequantize(array))
    finite = np.isfinite(matrix).all(axis=1)
    for magnitude in (2e-26, 1e-3, 1.0, 5e36):
        x = (rng.uniform(-1, 1, (tokens, 160)) * magnitude).astype(np.float32)
        # The sum of all elements is infinite with the largest.
        x[1::2] = np.abs(x[1::2])
        with native.using_isa(isa):
            (product,) = linear(jnp.asarray(x), weight, precise=True, implementation="ffi")
        with np.errstate(all="ignore"):
            exact = x.astype(np.float64) @ matrix.T.astype(np.float64)
            sizes = np.abs(x) @ steps(array, 128).T
            assert (np.abs(product - exact) <= 1e-4 * sizes + 1e-38)[
                np.broadcast_to(finite, sizes.shape) & (sizes < 3e38)
            ].all()
        assert not np.isfinite(np.asarray(product)[:, ~finite]).any()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", SOME_GROUPED)
@pytest.mark.parametrize("tokens", [1, 8, 19])
def test_groups_of_zeros_beside_large_shared_scales(isa, name, tokens):
    rng = np.random.default_rng(tokens)
    scales = np.asarray([0.5, 0.7, -0.5, -0.99, 1.0, 2.0, 1e-4, 0.25, 0.0], np.float16)
    array = grouped(name, len(scales), 160, rng)
    array = array.replace(scales=jnp.asarray(np.tile(scales[:, None], array.scales.shape[1])))
    weight, matrix = pack_array(array), np.asarray(dequantize(array))
    x = rng.standard_normal((tokens, 160)).astype(np.float32)
    x[:, 32:64] = 0
    x[::2, 64:] = 1e-30
    exact = x.astype(np.float64) @ matrix.T.astype(np.float64)
    for precise in (False, True):
        with native.using_isa(isa):
            (product,) = linear(jnp.asarray(x), weight, precise=precise, implementation="ffi")
        moved = bound(x, matrix) / 100 if precise else bound(x, matrix) * 1.01
        assert (np.abs(product - exact) <= moved + 1e-5 * np.abs(x) @ steps(array, 128).T).all()


@jax.jit
def fused(x: jax.Array, weight: QuantArray) -> jax.Array:
    return linear(x, weight, implementation="xla")[0]


def integer_product(x: np.ndarray, array: QuantArray) -> np.ndarray:
    """What the docstring of `linear` says of w8a8, with NumPy and sums of int64."""
    largest = np.abs(x).max(axis=1, keepdims=True)
    codes = np.rint(x * (np.float32(127) / largest)).astype(np.int64)
    sums = codes @ np.asarray(array.values).view(np.int8).astype(np.int64).T
    return sums.astype(np.float32) * (largest * np.float32(1 / 127)) * np.asarray(array.scales, np.float32).T


@settings(max_examples=12)
@given(rows=st.integers(1, 50), groups=st.integers(1, 9), tokens=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
def test_products_of_integers_are_the_same_bits_everywhere(rows, groups, tokens, seed):
    rng = np.random.default_rng(seed)
    width = 32 * groups
    x = (rng.standard_normal((tokens, width)) * 10.0 ** rng.integers(-12, 12, (tokens, 1))).astype(np.float32)
    array = grouped("w8a8", rows, width, rng)
    weight, expected = pack_array(array), integer_product(x, array)
    for held in (array, weight):
        np.testing.assert_array_equal(fused(jnp.asarray(x), held), expected)
    for isa in ISAS:
        with native.using_isa(isa):
            for precise in (False, True):
                (product,) = linear(jnp.asarray(x), weight, precise=precise, implementation="ffi")
                np.testing.assert_array_equal(product, expected)


def test_products_of_integers_are_near_those_of_the_weights():
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((40, 256)).astype(np.float32)
    x = rng.standard_normal((5, 256)).astype(np.float32)
    weight = pack_array(quantize(jnp.asarray(matrix), SCHEMES["w8a8"]))
    (product,) = linear(jnp.asarray(x), weight)
    exact = x @ matrix.T
    # Both are rounded to steps of 3/127, so errors of 0.7 % of their size each, independent.
    assert np.linalg.norm(product - exact) < 0.015 * np.linalg.norm(exact)


@pytest.mark.parametrize("implementation", ["xla", *ISAS])
@pytest.mark.parametrize("value", [0.0, 1e-42, 1e-31, 1e36, 3.4e38, np.inf, -np.inf, np.nan])
def test_products_of_integers_with_activations_of_any_magnitude(implementation, value):
    array = grouped("w8a8", 20, 64, np.random.default_rng(3), scale=1e-3)
    x = np.ones((5, 64), np.float32)
    x[1] = value
    x[2, 7] = value
    if implementation == "xla":
        (product,) = linear(jnp.asarray(x), array, implementation="xla")
    else:
        with native.using_isa(implementation):
            (product,) = linear(jnp.asarray(x), pack_array(array), implementation="ffi")
    if np.isfinite(value):
        if abs(value) < 1e-30:
            x = np.where(np.abs(x) < 1e-30, 0, x)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            expected = np.where(np.abs(x).max(axis=1, keepdims=True) > 0, integer_product(x, array), 0)
        np.testing.assert_array_equal(product, expected)
    else:
        np.testing.assert_array_equal(np.isnan(product).all(axis=1), [False, True, True, False, False])
        assert np.isfinite(np.delete(np.asarray(product), [1, 2], axis=0)).all()


@pytest.mark.parametrize("isa", ISAS)
def test_the_largest_sums_of_integers_fit(isa):
    for code in (-128, 127):
        values = np.full((1, MOST_INTEGER_COLUMNS), code, np.int8).view(np.uint8)
        array = QuantArray(jnp.asarray(values), jnp.ones((1, 1), jnp.float16), None, SCHEMES["w8a8"], values.shape)
        weight = pack_array(array)
        half = np.repeat(np.asarray([[127, -127], [-127, 127], [127, 127], [-127, -127]]), values.shape[1] // 2, axis=1)
        x = half.astype(np.float32)
        (expected,) = linear(jnp.asarray(x), array, implementation="xla")
        np.testing.assert_array_equal(expected[:, 0], half.sum(axis=1) * code)
        with native.using_isa(isa):
            np.testing.assert_array_equal(linear(jnp.asarray(x), weight, implementation="ffi")[0], expected)


def test_activations_of_eight_bits_are_refused_for_other_codes():
    rng = np.random.default_rng(0)
    for scheme in (GroupedScheme("w8a8-g32", 8, 32, activation_bits=8), GroupedScheme("w4a8", 4, activation_bits=8)):
        with pytest.raises(
            ValueError, match=f"int8 with one scale a row and no zero points, and the scheme {scheme.name}"
        ):
            linear(jnp.ones((1, 64)), grouped(scheme, 3, 64, rng))
    width = MOST_INTEGER_COLUMNS + 32
    with pytest.raises(
        ValueError, match=f"sums of {MOST_INTEGER_COLUMNS} columns of w8a8, and this weight has {width}"
    ):
        linear(jnp.ones((1, width)), grouped("w8a8", 1, width, rng))


@pytest.mark.parametrize("name", [*SOME_GROUPED, "w8a8"])
def test_codes_that_are_not_packed_are_left_to_xla(name):
    array = grouped(name, 24, 96, np.random.default_rng(7))
    x = jnp.asarray(np.random.default_rng(8).standard_normal((2, 96)), jnp.float32)
    mixed = linear(x, array, pack_array(array), precise=True)
    np.testing.assert_allclose(*mixed, rtol=1e-3, atol=1e-3)
    with pytest.raises(ImplementationError, match=rf"reads packed and floating-point weights; got {name}\."):
        linear(x, array, implementation="ffi")


def test_more_weights_than_one_call_takes():
    x, weights = jnp.ones((2, 8)), [jnp.full((i + 1, 8), float(i)) for i in range(19)]
    products = linear(x, *weights, implementation="ffi")
    assert [product.shape for product in products] == [(2, i + 1) for i in range(19)]
    assert [float(product[0, 0]) for product in products] == [8.0 * i for i in range(19)]


def test_weights_that_are_no_matrix_of_that_width_are_refused():
    for x, weight in (((2, 64), (8, 8, 8)), ((2, 64), (8, 32)), ((2, 0), (8, 0)), ((2, 64), (64,))):
        # Below the annotations, which the tests check and users don't.
        with pytest.raises(ValueError, match=r"linear: a weight must be \[out, "):
            linear_module._check_shapes(jnp.ones(x), (jnp.ones(weight),))


@pytest.mark.parametrize("isa", ISAS)
def test_bfloat16_rows_do_not_depend_on_their_number(isa):
    """Where activations are rounded to bfloat16, they are for few tokens too; if precise, for none."""
    rng = np.random.default_rng(6)
    weight = jnp.asarray(rng.standard_normal((33, 70)), jnp.bfloat16)
    x = jnp.asarray(rng.standard_normal((16, 70)), jnp.float32)
    exact = np.asarray(x) @ np.asarray(weight, np.float32).T
    with native.using_isa(isa):
        for precise in (False, True):
            (whole,) = linear(x, weight, precise=precise, implementation="ffi")
            rows = [linear(x[i : i + 1], weight, precise=precise, implementation="ffi")[0] for i in range(16)]
            np.testing.assert_allclose(whole, np.concatenate(rows), atol=2e-5)
        np.testing.assert_allclose(whole, exact, atol=2e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", PLAIN)
def test_plain_weights_of_any_width(isa, dtype):
    rng = np.random.default_rng(4)
    for width in (1, 7, 16, 31, 100):
        for tokens in (1, 2, 9, 17):
            weight = jnp.asarray(rng.standard_normal((19, width)), dtype)
            x = rng.standard_normal((tokens, width)).astype(np.float32)
            with native.using_isa(isa):
                (product,) = linear(jnp.asarray(x), weight, implementation="ffi")
            matrix = np.asarray(weight, np.float32)
            error = np.abs(np.asarray(product) - x @ matrix.T)
            assert (error <= 1e-4 + rounded_activations(isa, dtype, x, matrix)).all()


def test_several_threads_give_what_one_gives():
    rng = np.random.default_rng(5)
    weights = [random_packed(name, 70, 96, rng) for name in (*NAMES, *SOME_GROUPED, "w8a8")]
    before = native.threads()
    try:
        for tokens in (1, 5, 80):
            x = jnp.asarray(rng.standard_normal((tokens, 96)), jnp.float32)
            found = []
            for threads in (1, 2, 5):
                native.set_threads(threads)
                found.append(linear(x, *weights, implementation="ffi"))
            for other in found[1:]:
                jax.tree.map(np.testing.assert_array_equal, found[0], other)
    finally:
        native.set_threads(before)


def test_leading_axes_and_dtypes_are_kept():
    weight = pack("Q8_0", 32, blocks("Q8_0", 24, 32, np.random.default_rng(6)))
    x = jnp.ones((2, 3, 32), jnp.bfloat16)
    (same,) = linear(x, weight, implementation="ffi")
    (wide,) = linear(x, weight, out_dtype=jnp.float32, implementation="ffi")
    assert (same.shape, same.dtype, wide.dtype) == ((2, 3, 24), jnp.bfloat16, jnp.float32)


def test_blocks_as_they_are_in_the_file_are_left_to_xla():
    made = blocks("Q4_0", 8, 32, np.random.default_rng(7))
    x = jnp.ones((1, 32))
    mixed = linear(x, raw("Q4_0", 32, made), pack("Q4_0", 32, made))
    np.testing.assert_allclose(*mixed, atol=1e-4)
    with pytest.raises(ImplementationError, match=r"reads packed and floating-point weights; got Q4_0\."):
        linear(x, raw("Q4_0", 32, made), implementation="ffi")


def call(x, weights, formats, rows, outs, shared=1):
    shapes = [jax.ShapeDtypeStruct(out, jnp.float32) for out in outs]
    results = jax.ffi.ffi_call("fusedllm_linear", shapes)(
        x,
        *weights,
        formats=np.asarray(formats, np.int32),
        shared=np.asarray([shared] * len(formats), np.int64),
        rows=np.asarray(rows, np.int64),
        levels=np.int32(1),
    )
    return jax.block_until_ready(results)


X = np.ones((1, 32), np.float32)
W = np.ones((4, 32), np.float32)
BFLOAT16, FLOAT32 = PLAIN_NUMBERS["bfloat16"], PLAIN_NUMBERS["float32"]


@pytest.mark.parametrize(("number", "shared"), [(0, 0), (0, -1), (0, 2**40), (1, 2), (3, 2), (6, 2)])
def test_the_binding_refuses_scales_that_are_shared_otherwise(number, shared):
    with pytest.raises(jax.errors.JaxRuntimeError, match="as many of its groups share a scale as its format allows"):
        call(X, [np.ones(1024, np.uint8)], [number], [4], [(1, 4)], shared)


@pytest.mark.parametrize(
    ("x", "weights", "formats", "rows", "outs", "sentence"),
    [
        (X.astype(np.int32), [W], [FLOAT32], [4], [(1, 4)], "x must be float32"),
        (X[0], [W], [FLOAT32], [4], [(1, 4)], "x must be float32"),
        (X, [W], [99], [4], [(1, 4)], "no format has the number 99"),
        (X, [W], [FLOAT32], [-4], [(1, 4)], "has rows and columns"),
        (X, [W], [BFLOAT16], [4], [(1, 4)], "the dtype of its format"),
        (X, [W[:, :31]], [FLOAT32], [4], [(1, 4)], "as many elements"),
        (X, [W], [FLOAT32], [4], [(1, 5)], "result 0 must be float32"),
        (X, [np.ones(8, np.uint8)], [0], [4], [(1, 4)], "must be 320 bytes of uint8"),
        (np.ones((1, 33), np.float32), [np.ones(8, np.uint8)], [0], [4], [(1, 4)], "columns a multiple of 32"),
        (X, [W], [FLOAT32, FLOAT32], [4], [(1, 4)], "1 to 8 weights"),
    ],
)
def test_the_binding_refuses_bad_input_with_a_sentence(x, weights, formats, rows, outs, sentence):
    with pytest.raises(jax.errors.JaxRuntimeError, match=sentence):
        call(x, weights, formats, rows, outs)
