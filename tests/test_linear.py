"""Products with weights: native against XLA, every variant, over shapes that are multiples of nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packing import NAMES, blocks, pack, raw

from fusedllm.errors import ImplementationError
from fusedllm.kernels import linear as linear_module
from fusedllm.kernels import native
from fusedllm.kernels.linear import linear

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
    names=st.lists(st.sampled_from(NAMES + PLAIN), min_size=1, max_size=4),
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
            weights.append(pack(name, width, blocks(name, rows, width, rng)))
            matrices.append(np.asarray(weights[-1].dequantize()))
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
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [1, 3, 21])
def test_precise_products_are_hundreds_of_times_nearer(isa, name, tokens):
    rng = np.random.default_rng(tokens)
    weight = pack(name, 96, blocks(name, 37, 96, rng))
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
    weights = [pack(name, 96, blocks(name, 70, 96, rng)) for name in NAMES]
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


def call(x, weights, formats, rows, outs):
    shapes = [jax.ShapeDtypeStruct(out, jnp.float32) for out in outs]
    results = jax.ffi.ffi_call("fusedllm_linear", shapes)(
        x, *weights, formats=np.asarray(formats, np.int32), rows=np.asarray(rows, np.int64), levels=np.int32(1)
    )
    return jax.block_until_ready(results)


X = np.ones((1, 32), np.float32)
W = np.ones((4, 32), np.float32)


@pytest.mark.parametrize(
    ("x", "weights", "formats", "rows", "outs", "sentence"),
    [
        (X.astype(np.int32), [W], [7], [4], [(1, 4)], "x must be float32"),
        (X[0], [W], [7], [4], [(1, 4)], "x must be float32"),
        (X, [W], [9], [4], [(1, 4)], "no format has the number 9"),
        (X, [W], [7], [-4], [(1, 4)], "has rows and columns"),
        (X, [W], [5], [4], [(1, 4)], "the dtype of its format"),
        (X, [W[:, :31]], [7], [4], [(1, 4)], "as many elements"),
        (X, [W], [7], [4], [(1, 5)], "result 0 must be float32"),
        (X, [np.ones(8, np.uint8)], [0], [4], [(1, 4)], "must be 320 bytes of uint8"),
        (np.ones((1, 33), np.float32), [np.ones(8, np.uint8)], [0], [4], [(1, 4)], "columns a multiple of 32"),
        (X, [W], [7, 7], [4], [(1, 4)], "1 to 8 weights"),
    ],
)
def test_the_binding_refuses_bad_input_with_a_sentence(x, weights, formats, rows, outs, sentence):
    with pytest.raises(jax.errors.JaxRuntimeError, match=sentence):
        call(x, weights, formats, rows, outs)
