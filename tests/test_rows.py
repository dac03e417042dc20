"""The norm and the gated activation: native against XLA, every variant."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusedllm.kernels import native
from fusedllm.kernels import rms_norm as rms_norm_module
from fusedllm.kernels import swiglu as swiglu_module
from fusedllm.kernels.rms_norm import rms_norm
from fusedllm.kernels.swiglu import swiglu

pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels were not built")
ISAS = native.isas() if native.available() else ()
SHAPES = [(1, 1, 8), (2, 3, 33), (40, 577)]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("magnitude", [1e-20, 1.0, 1e15])
def test_the_norm_with_and_without_a_residual(isa, shape, magnitude):
    rng = np.random.default_rng(0)
    x, delta = (jnp.asarray(rng.standard_normal(shape) * magnitude, jnp.float32) for _ in range(2))
    weight = jnp.asarray(rng.standard_normal(shape[-1]), jnp.bfloat16)
    for addend in (None, delta):
        expected = rms_norm(x, weight, 1e-5, delta=addend, implementation="xla")
        with native.using_isa(isa):
            found = rms_norm(x, weight, 1e-5, delta=addend, implementation="ffi")
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_allclose(found[1], expected[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_gated_activation(isa, shape):
    rng = np.random.default_rng(1)
    gate, up = (rng.standard_normal(shape).astype(np.float32) * 10 for _ in range(2))
    gate.flat[:8] = [0, -0.0, 90, -90, 1e30, -1e30, 1e-40, -100]
    expected = swiglu(jnp.asarray(gate), jnp.asarray(up), implementation="xla")
    with native.using_isa(isa):
        found = swiglu(jnp.asarray(gate), jnp.asarray(up), implementation="ffi")
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("isa", ISAS)
def test_what_is_no_number_stays_none(isa):
    x = jnp.asarray([[1.0, jnp.nan, 2.0], [1.0, 2.0, 3.0]])
    with native.using_isa(isa):
        normed = rms_norm(x, jnp.ones(3), 1e-5, implementation="ffi")[1]
        active = swiglu(x, jnp.ones((2, 3)), implementation="ffi")
    assert np.isnan(normed).tolist() == [[True] * 3, [False] * 3]
    assert np.isnan(active).tolist() == [[False, True, False], [False] * 3]


def test_other_dtypes_are_left_to_xla():
    x = jnp.ones((2, 8), jnp.bfloat16)
    assert rms_norm(x, jnp.ones(8), 1e-5, implementation="ffi")[1].dtype == jnp.bfloat16
    assert swiglu(x, x, implementation="ffi").dtype == jnp.bfloat16


def test_other_shapes_are_what_xla_makes_of_them():
    # Below the annotations, which the tests check and users don't.
    norm, gate = rms_norm_module._rms_norm_ffi, swiglu_module._swiglu_ffi
    x = jnp.asarray(np.random.default_rng(2).standard_normal((4, 64)), jnp.float32)
    for weight in (jnp.full(1, 2.0), jnp.full((4, 64), 2.0)):
        expected = rms_norm_module._rms_norm_xla(x, weight, 1e-5, None)[1]
        np.testing.assert_array_equal(norm(x, weight, 1e-5, None)[1], expected)
    np.testing.assert_array_equal(gate(x, x[0]), jax.nn.silu(x) * x[0])
    for call in (
        lambda: norm(x, jnp.ones(32), 1e-5, None),
        lambda: norm(x, jnp.ones(64), 1e-5, x.T),
        lambda: gate(x, x.T),
    ):
        with pytest.raises((TypeError, ValueError)):
            call()


def test_the_bindings_refuse_bad_input_with_a_sentence():
    x, out = np.ones((2, 8), np.float32), jax.ShapeDtypeStruct((2, 8), jnp.float32)
    norm, gate = (jax.ffi.ffi_call(f"fusedllm_{name}", out) for name in ("rms_norm", "swiglu"))
    for call in (
        lambda: norm(x, np.ones(3, np.float32), epsilon=np.float32(1)),
        lambda: norm(x, np.ones(8, np.int32), epsilon=np.float32(1)),
        lambda: norm(x, x, x, epsilon=np.float32(1)),
        lambda: gate(x, x[:1]),
        lambda: gate(x.astype(np.int32), x),
    ):
        with pytest.raises(jax.errors.JaxRuntimeError, match=r"must be|taken for one result"):
            jax.block_until_ready(call())
