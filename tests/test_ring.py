"""The trusted side's arithmetic: the bits of `w8a8` around a product that somebody else makes."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedllm.kernels import native, native_ring
from fusedllm.kernels.grouped import MOST_INTEGER_COLUMNS
from fusedllm.kernels.linear import linear
from fusedllm.kernels.quantize import SMALLEST_TOKEN, quantize, round_activations
from fusedllm.kernels.ring_linear import ring_linear
from fusedllm.partition import integrity, ring
from fusedllm.quant.schemes import SCHEMES

needs_native = pytest.mark.skipif(not native.available(), reason="the native kernels were not built")
ISAS = native.isas() if native.available() else ()
WAYS = (False, *(pytest.param(isa, marks=needs_native) for isa in ISAS))
SEEDS = st.integers(0, 2**32 - 1)
# Compiled once each.
XLA_ROUND = jax.jit(round_activations)


@pytest.fixture(scope="module", params=WAYS, ids=lambda way: way or "numpy")
def way(request):
    """False for NumPy, True for native code, in every variant."""
    if not request.param:
        yield False
        return
    with native.using_isa(request.param):
        yield True


def activations(tokens: int, width: int, seed: int) -> np.ndarray:
    """Of every size, with halves between codes, zeros, the smallest that counts, and what is no number."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((tokens, width)) * 10.0 ** rng.integers(-20, 20, (tokens, 1))).astype(np.float32)
    for row in x:
        kind = rng.integers(0, 12)
        if kind == 0:
            row[:] = 0
        elif kind == 1:
            row[:] = rng.integers(-254, 255, width) / np.float32(2)
            row[0] = 127
        elif kind == 2:
            row[:] = rng.choice(np.float32([SMALLEST_TOKEN, -SMALLEST_TOKEN * 0.99, 1e-40]), width)
        elif kind == 3:
            row[rng.integers(width)] = rng.choice(np.float32([np.inf, -np.inf, np.nan]))
        elif kind == 4:
            row[:] = rng.choice(np.float32([3.4e38, -1e38, 1e-38, 0]), width)
    return x


def uniform(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-(2**31), 2**31, shape).astype(np.int32)


def codes_matrix(rows: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-127, 128, (rows, width)).astype(np.int8)


@settings(max_examples=60)
@given(seed=SEEDS)
def test_codes_and_scales_are_those_of_the_compiled_model(way, seed):
    x = activations(6, 83, seed)
    codes, scales = XLA_ROUND(x)
    made = ring.encode(x, native=way)
    np.testing.assert_array_equal(made.codes, codes)
    np.testing.assert_array_equal(
        made.scales.view(np.int32)[~np.isnan(scales)], np.asarray(scales).view(np.int32)[~np.isnan(scales)]
    )
    np.testing.assert_array_equal(np.isnan(made.scales), np.isnan(scales))
    np.testing.assert_array_equal(made.sent, codes)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_narrow_activations_are_widened_first(way, dtype):
    with np.errstate(over="ignore"):
        x = activations(9, 40, 3)[:, ::-1].astype(dtype)
    codes, scales = XLA_ROUND(jnp.asarray(x))
    made = ring.encode(x, native=way)
    np.testing.assert_array_equal(made.codes, codes)
    np.testing.assert_array_equal(made.scales, scales)


@settings(max_examples=60)
@given(seed=SEEDS, width=st.integers(1, 70), tokens=st.integers(0, 5))
def test_pads_that_are_added_and_removed_leave_nothing(way, seed, width, tokens):
    pads, x = uniform((tokens, width), seed), activations(tokens, width, seed)
    made = ring.encode(x, pads, native=way)
    np.testing.assert_array_equal(ring.subtract(made.sent, pads), made.codes)
    np.testing.assert_array_equal(ring.subtract(made.sent, made.codes.astype(np.int32)), pads)
    np.testing.assert_array_equal(ring.add(ring.subtract(pads, made.sent), made.sent), pads)


@settings(max_examples=40)
@given(seed=SEEDS, width=st.integers(1, 70), tokens=st.integers(0, 5), bound=st.integers(1, 2**30))
def test_native_code_decodes_as_numpy_does(way, seed, width, tokens, bound):
    rng = np.random.default_rng(seed)
    sums = rng.integers(-bound, bound, (tokens, width), endpoint=True).astype(np.int32)
    if tokens and seed % 2:
        sums[rng.integers(tokens), rng.integers(width)] = rng.choice(
            [-bound - 1, bound + 1, -(2**31), 2**31 - 1, bound]
        )
    pads = uniform(sums.shape, seed)
    scales = rng.random((tokens, 1), np.float32), rng.random(width, np.float32)
    received = ring.add(sums, pads)
    found = ring.decode(received, pads, *scales, bound, native=way)
    np.testing.assert_array_equal(found.sums, sums)
    np.testing.assert_array_equal(found.out.view(np.int32), ring.scale(sums, *scales).view(np.int32))
    assert found.in_range == bool((np.abs(sums.astype(np.int64)) <= bound).all())
    bare = ring.decode(sums, None, *scales, bound, native=way)
    np.testing.assert_array_equal(bare.out, found.out)
    assert bare.in_range == found.in_range


def test_memory_of_the_callers_is_written(way):
    x, pads = activations(3, 33, 1), uniform((3, 33), 1)
    sent, sums, out = np.ones_like(pads), np.ones_like(pads), np.ones_like(x)
    made = ring.encode(x, pads, sent=sent, native=way)
    assert made.sent is sent
    np.testing.assert_array_equal(sent, ring.encode(x, pads, native=False).sent)
    scales = np.ones((3, 1), np.float32), np.ones(33, np.float32)
    found = ring.decode(sent, pads, *scales, 127, out=out, sums=sums, native=way)
    assert found.out is out
    assert found.sums is sums
    np.testing.assert_array_equal(sums, made.codes)
    np.testing.assert_array_equal(out, made.codes)


@pytest.mark.parametrize("implementation", ["xla", pytest.param("ffi", marks=needs_native)])
@pytest.mark.parametrize("tokens", [1, 5])
def test_a_masked_product_has_the_bits_of_the_unmasked_one(way, implementation, tokens):
    rng = np.random.default_rng(tokens)
    weight = quantize(jnp.asarray(rng.standard_normal((40, 96)), jnp.float32), SCHEMES["w8a8"])
    x = rng.standard_normal((tokens, 96)).astype(np.float32)
    (unmasked,) = linear(jnp.asarray(x), weight, implementation="xla")
    matrix = np.asarray(weight.values).view(np.int8)
    scales = np.asarray(weight.scales)[:, 0].astype(np.float32)
    pads = uniform(x.shape, tokens)
    made = ring.encode(x, pads, native=way)
    received = np.asarray(ring_linear(jnp.asarray(made.sent), jnp.asarray(matrix), implementation=implementation))
    removed = ring.product(pads, matrix, native=way)
    found = ring.decode(received, removed, made.scales, scales, ring.range_bound(matrix), native=way)
    np.testing.assert_array_equal(found.out.view(np.int32), np.asarray(unmasked).view(np.int32))
    np.testing.assert_array_equal(found.sums, made.codes.astype(np.int32) @ matrix.T.astype(np.int32))
    assert found.in_range


@settings(max_examples=40)
@given(seed=SEEDS, tokens=st.integers(0, 6), width=st.integers(1, 90), rows=st.integers(1, 30))
def test_products_on_the_host_are_those_of_unsigned_numbers(way, seed, tokens, width, rows):
    x, weight = (
        uniform((tokens, width), seed),
        np.random.default_rng(seed).integers(-128, 128, (rows, width)).astype(np.int8),
    )
    x[::2] = np.random.default_rng(seed).choice([-(2**31), 2**31 - 1, -1, 65536, 32768], x[::2].shape)
    wanted = (x.view(np.uint32)[:, None] * weight.astype(np.int32).view(np.uint32)).sum(-1, dtype=np.uint32)
    np.testing.assert_array_equal(ring.product(x, weight, native=way).view(np.uint32), wanted)


def test_products_on_the_host_are_exact_at_the_largest_width_and_in_parts(monkeypatch, way):
    x = np.full((1, MOST_INTEGER_COLUMNS), -1, np.int32)
    weight = np.full((130, MOST_INTEGER_COLUMNS), -128, np.int8)
    weight[1::2] = 127
    wanted = np.where(np.arange(130) % 2, -127, 128) * MOST_INTEGER_COLUMNS
    np.testing.assert_array_equal(ring.product(x, weight, native=way)[0], wanted)


def test_the_bound_is_reached_and_never_exceeded():
    weight = codes_matrix(9, 50, 1)
    bound = ring.range_bound(weight)
    row = np.abs(weight.astype(int)).sum(1).argmax()
    codes = (127 * np.sign(weight[row])).astype(np.int8)[None]
    sums = codes.astype(np.int32) @ weight.T.astype(np.int32)
    assert sums.max() == bound <= 127 * 127 * 50
    assert ring.in_range(sums, bound)
    assert not ring.in_range(sums, bound - 1)
    assert (
        ring.range_bound(np.full((1, MOST_INTEGER_COLUMNS), 127, np.int8)) == 127 * 127 * MOST_INTEGER_COLUMNS < 2**30
    )


@settings(max_examples=30)
@given(seed=SEEDS, rows=st.integers(1, 40), width=st.integers(1, 300))
def test_bounds_are_the_same_natively(way, seed, rows, width):
    weight = np.random.default_rng(seed).integers(-128, 128, (rows, width)).astype(np.int8)
    assert ring.range_bound(weight, native=way) == 127 * np.abs(weight.astype(int)).sum(1).max()


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=20)
@given(seed=SEEDS, rows=st.integers(1, 60), width=st.integers(1, 600))
def test_secrets_times_weights_are_the_same_natively(isa, seed, rows, width):
    rng = np.random.default_rng(seed)
    secrets = rng.integers(0, integrity.PRIME, (2, rows)).astype(np.uint32)
    secrets[:, ::3] = integrity.PRIME - 1
    weight = rng.choice(np.int8([-128, -1, 0, 5, 127]), (rows, width))
    with native.using_isa(isa):
        np.testing.assert_array_equal(native_ring.weigh(secrets, weight), integrity.times(secrets, weight))


def test_weights_whose_products_would_not_come_back_are_refused():
    for weight in (np.ones((2, 3), np.int32), np.ones(3, np.int8), np.ones((1, MOST_INTEGER_COLUMNS + 1), np.int8)):
        with pytest.raises(ValueError, match="an int8 weight of 1 to 65536 columns"):
            # Below the annotations, which the tests check and users don't.
            inspect.unwrap(ring.check_weight)(weight)
    # No weight of int8 that has few enough columns is refused for its sums.
    assert ring.range_bound(np.full((1, MOST_INTEGER_COLUMNS), -128, np.int8)) < 2**30


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=40)
@given(seed=SEEDS, width=st.integers(1, 200), tokens=st.integers(0, 4))
def test_residues_are_those_of_whole_numbers(isa, seed, width, tokens):
    rng = np.random.default_rng(seed)
    prime = 2**31 - 1
    secrets = rng.integers(0, prime, (2, width)).astype(np.uint32)
    secrets[:, ::3] = prime - 1
    x = uniform((tokens, width), seed)
    x[:, ::4] = -(2**31)
    codes = codes_matrix(tokens, width, seed)
    with native.using_isa(isa):
        for numbers in (x, codes):
            wanted = [
                [sum(map(int.__mul__, row, secret)) % prime for secret in secrets.tolist()] for row in numbers.tolist()
            ]
            np.testing.assert_array_equal(native_ring.residues(numbers, secrets), np.reshape(wanted, (tokens, 2)))


@needs_native
def test_residues_of_the_largest_numbers_do_not_overflow():
    """Twice as many columns as a vocabulary has, all of the same extreme."""
    width, prime = 2**18, 2**31 - 1
    secrets = np.full((1, width), prime - 1, np.uint32)
    for number in (-(2**31), 2**31 - 1):
        found = native_ring.residues(np.full((1, width), number, np.int32), secrets)
        assert found == number * (prime - 1) * width % prime
    assert native_ring.residues(np.full((1, width), -127, np.int8), secrets) == -127 * (prime - 1) * width % prime
