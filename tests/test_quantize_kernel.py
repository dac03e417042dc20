"""Grouped codes: the quantizer and its inverse, XLA's against their definition, and the native ones against XLA's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedllm.errors import ImplementationError
from fusedllm.kernels import native
from fusedllm.kernels.dequantize import dequantize
from fusedllm.kernels.grouped import GroupedScheme, pack, unpack
from fusedllm.kernels.quantize import quantize
from fusedllm.quant.schemes import SCHEMES

INTEGER = [scheme for scheme in SCHEMES.values() if scheme.codes == "integer"]
ISAS = native.isas() if native.available() else ()
# Each property compiles a program for every shape that it tries.
QUICK = settings(max_examples=12, deadline=None)


def random_matrix(seed: int, rows: int, width: int, dtype: object = np.float32) -> np.ndarray:
    """Groups of very different size, some of zeros, some with an outlier."""
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((rows, width)) * np.exp2(rng.integers(-20, 6, (rows, 1)))
    weights += rng.standard_normal((rows, 1)) * (rng.random((rows, 1)) < 0.3)
    weights[rng.random((rows, width)) < 0.01] *= 30
    weights[rng.random(rows) < 0.2] = 0
    return weights.astype(dtype)


def spread(numbers: jax.Array, scheme: GroupedScheme, width: int) -> np.ndarray:
    return np.repeat(np.asarray(numbers, np.float64), scheme.group_size or width, axis=1)[:, :width]


def assert_same(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("bits", [3, 4, 5, 6, 7, 8])
def test_packing_is_the_identity_on_codes_and_a_little_endian_stream_of_bits(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 64))
    codes = codes.astype(np.uint8).view(np.int8) if bits == 8 else codes.astype(np.uint8)
    packed = pack(np, codes, bits)
    assert packed.shape == (3, 8 * bits)
    np.testing.assert_array_equal(unpack(np, packed, bits), codes)
    stream = (codes[..., None].view(np.uint8) >> np.arange(bits, dtype=np.uint8)) & 1
    np.testing.assert_array_equal(packed, np.packbits(stream.reshape(3, -1), axis=-1, bitorder="little"))
    np.testing.assert_array_equal(pack(jnp, jnp.asarray(codes), bits), packed)
    np.testing.assert_array_equal(unpack(jnp, jnp.asarray(packed), bits), codes)


# Of turned rows it is the turned weight that is: `test_hadamard.py`.
@pytest.mark.parametrize("scheme", [one for one in INTEGER if not one.turned], ids=lambda scheme: scheme.name)
@QUICK
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 4), width=st.sampled_from([1, 31, 64, 200]))
def test_a_decoded_weight_is_within_half_a_step(scheme, seed, rows, width):
    weights = random_matrix(seed, rows, width)
    array = quantize(jnp.asarray(weights), scheme, implementation="xla")
    assert array.values.shape == (rows, scheme.row_bytes(width))
    step = spread(array.scales, scheme, width)
    error = np.abs(np.asarray(dequantize(array, implementation="xla"), np.float64) - weights)
    # The product with the inverse of a step, and the product with the step, round once each.
    assert (error <= step * (0.5 + 2**-16)).all()
    assert (error[step == 0] == 0).all()


def test_a_float8_is_within_half_of_its_own_last_bit():
    weights = random_matrix(3, 6, 100)
    array = quantize(jnp.asarray(weights), SCHEMES["fp8"])
    step = spread(array.scales, SCHEMES["fp8"], 100)
    decoded = np.asarray(dequantize(array), np.float64)
    # Three bits of fraction, and 2 ** -9 of a step below the least normal number.
    assert (np.abs(decoded - weights) <= np.maximum(np.abs(weights) * 2**-4, step * 2**-10) * (1 + 2**-10)).all()


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda scheme: scheme.name)
def test_zeros_stay_zeros_and_extremes_find_codes(scheme):
    weights = np.zeros((4, 128), np.float32)
    weights[1, 5] = 60000.0
    weights[2, 7] = -1e-30
    weights[3] = 1.0
    decoded = np.asarray(dequantize(quantize(jnp.asarray(weights), scheme)))
    assert (decoded[0] == 0).all()
    np.testing.assert_allclose(decoded[1, 5], 60000.0, rtol=0.5 / 3.5)
    assert abs(decoded[2]).max() < 2**-20
    # A float16 scale is rounded up: of 3 bits by up to 2 ** -10 in all.
    np.testing.assert_allclose(decoded[3], 1.0, rtol=0.5 / 3.5)


def test_float32_scales_are_exact():
    weights = np.full((1, 64), 0.7, np.float32)
    array = quantize(jnp.asarray(weights), SCHEMES["int8-g64"], scale_dtype=jnp.float32)
    assert array.scales.dtype == jnp.float32
    np.testing.assert_allclose(dequantize(array), weights, rtol=1e-7)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda scheme: scheme.name)
def test_float32_scales_hold_weights_that_float16_has_no_scale_for(scheme):
    weights = np.random.default_rng(5).standard_normal((4, 128)).astype(np.float32)
    # What is turned counts as zero below 2 ** -88.
    units = np.exp2([[-30.0], [-60.0], [-70.0 if scheme.turned else -88.0], [100.0]])
    tiny = (weights * units).astype(np.float32)
    decoded = np.asarray(dequantize(quantize(jnp.asarray(tiny), scheme, scale_dtype=jnp.float32)), np.float64)
    # Powers of two change the exponents of all numbers on the way, and no other bit.
    expected = np.asarray(dequantize(quantize(jnp.asarray(weights), scheme, scale_dtype=jnp.float32)), np.float64)
    np.testing.assert_array_equal(decoded / units, expected)


def tiny_matrix() -> np.ndarray:
    """Rows around every bound of scales: of float16, of float32, and the denormal numbers."""
    exponents = np.concatenate([np.arange(-149, -85), np.arange(-40, -14)])
    return np.ldexp(np.random.default_rng(6).uniform(-2, 2, (len(exponents), 96)), exponents[:, None]).astype(
        np.float32
    )


@pytest.mark.parametrize("scale_dtype", [np.float16, np.float32])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("scheme", INTEGER, ids=lambda scheme: scheme.name)
def test_tiny_weights_become_the_same_bits_in_the_native_quantizer(isa, scheme, scale_dtype):
    weights = jnp.asarray(tiny_matrix())
    expected = quantize(weights, scheme, scale_dtype=scale_dtype, implementation="xla")
    with native.using_isa(isa):
        assert_same(quantize(weights, scheme, scale_dtype=scale_dtype, implementation="ffi"), expected)
    assert (np.asarray(expected.scales)[:20] == 0).all()
    assert (np.asarray(expected.scales)[-20:] > 0).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("scheme", INTEGER, ids=lambda scheme: scheme.name)
def test_the_native_quantizer_makes_the_same_bits(isa, scheme):
    cases = [
        (7, 200, np.float32, np.float16),
        (33, 64, ml_dtypes.bfloat16, np.float16),
        (1, 20001, np.float32, np.float16),
        (5, 17, np.float16, np.float32),
    ]
    with native.using_isa(isa):
        for seed, (rows, width, dtype, scale_dtype) in enumerate(cases):
            weights = jnp.asarray(random_matrix(seed, rows, width, dtype))
            expected = quantize(weights, scheme, scale_dtype=scale_dtype, implementation="xla")
            found = quantize(weights, scheme, scale_dtype=scale_dtype, implementation="ffi")
            assert_same(found, expected)
            for out in (dtype, np.float32):
                assert_same(dequantize(found, out, implementation="ffi"), dequantize(expected, out))


@pytest.mark.skipif(not ISAS, reason="the native kernels are not built")
def test_other_dtypes_and_codes_are_left_to_xla():
    weights = jnp.asarray(random_matrix(1, 3, 64))
    assert_same(quantize(weights, SCHEMES["fp8"], implementation="ffi"), quantize(weights, SCHEMES["fp8"]))
    array = quantize(weights, SCHEMES["int4-g32"])
    np.testing.assert_array_equal(
        dequantize(array, jnp.float8_e4m3fn, implementation="ffi"), dequantize(array, jnp.float8_e4m3fn)
    )


def test_an_implementation_that_does_not_exist_is_refused():
    with pytest.raises(ImplementationError, match="quantize has no implementation 'cuda'"):
        quantize(jnp.ones((2, 32)), SCHEMES["int8"], implementation="cuda")


@pytest.mark.skipif(not ISAS, reason="the native kernels are not built")
def test_the_handlers_refuse_what_does_not_fit():
    weights, numbers = jnp.ones((2, 64)), jax.ShapeDtypeStruct((2, 2), np.float16)

    def call(codes: tuple[int, int], group: int, bits: int, scales: jax.ShapeDtypeStruct = numbers) -> None:
        results = [jax.ShapeDtypeStruct(codes, np.uint8), scales]
        made = jax.ffi.ffi_call("fusedllm_quantize", results)(weights, group=np.int64(group), bits=np.int32(bits))
        jax.block_until_ready(made)

    call((2, 32), 32, 4)
    for arguments in (
        ((2, 31), 32, 4),
        ((2, 32), 33, 4),
        ((2, 32), 32, 2),
        ((2, 32), -32, 4),
        ((2, 32), 32, 4, jax.ShapeDtypeStruct((2, 3), np.float16)),
        ((2, 32), 32, 4, jax.ShapeDtypeStruct((2, 2), np.int16)),
    ):
        with pytest.raises(Exception, match="fusedllm: "):
            call(*arguments)
