"""The likeliest tokens of a row: native against XLA, every variant."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusedllm.kernels import native
from fusedllm.kernels.candidates import candidates

pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels were not built")
ISAS = native.isas() if native.available() else ()

ROWS = {
    "normal": lambda rng, vocab: rng.standard_normal(vocab) * 5,
    "ascending": lambda rng, vocab: np.arange(vocab) / 100,
    "descending": lambda rng, vocab: -np.arange(vocab) / 100,
    "all equal": lambda rng, vocab: np.full(vocab, 3.0),
    "few values": lambda rng, vocab: rng.integers(0, 5, vocab),
    "huge": lambda rng, vocab: rng.standard_normal(vocab) * 1e30,
    "mostly impossible": lambda rng, vocab: np.where(np.arange(vocab) % 50 == 7, rng.standard_normal(vocab), -np.inf),
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("vocab", [64, 999, 5000])
def test_native_candidates_are_those_of_xla(isa, vocab):
    rng = np.random.default_rng(vocab)
    rows = np.stack([make(rng, vocab) for make in ROWS.values()]).astype(np.float32)
    logits = jnp.asarray(np.concatenate([rows, rows]))
    temperature = jnp.asarray([0.0, 0.7] * len(ROWS), jnp.float32)
    expected = candidates(logits, temperature, 64, implementation="xla")
    with native.using_isa(isa):
        found = candidates(logits, temperature, 64, implementation="ffi")
    # Those that can't be drawn have no order.
    possible = np.asarray(expected[0]) > -np.inf
    np.testing.assert_array_equal(np.asarray(found[1])[possible], np.asarray(expected[1])[possible])
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(found[2], expected[2], rtol=1e-5)


def test_the_binding_refuses_bad_input_with_a_sentence():
    def call(logits, temperature, count):
        shapes = (
            jax.ShapeDtypeStruct((2, count), jnp.float32),
            jax.ShapeDtypeStruct((2, count), jnp.int32),
            jax.ShapeDtypeStruct((2,), jnp.float32),
        )
        return jax.block_until_ready(jax.ffi.ffi_call("fusedllm_candidates", shapes)(logits, temperature))

    good = np.zeros((2, 50), np.float32), np.ones(2, np.float32)
    assert call(*good, 8)[1].shape == (2, 8)
    for bad, sentence in [
        ((good[0].astype(np.int32), good[1], 8), "logits must be float32"),
        ((good[0], good[1][:1], 8), "temperature must be float32"),
        ((*good, 51), "no more than it has"),
        ((*good, 129), "1 to 128"),
    ]:
        with pytest.raises(jax.errors.JaxRuntimeError, match=sentence):
            call(*bad)
