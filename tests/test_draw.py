"""The draw: native against XLA, every variant, wherever rounding leaves one answer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusedllm.kernels import native
from fusedllm.kernels.draw import draw

pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels were not built")
ISAS = native.isas() if native.available() else ()
DRAWS = 48

ROWS = {
    "normal": lambda rng, vocab: rng.standard_normal(vocab) * 5,
    "flat": lambda rng, vocab: rng.standard_normal(vocab) * 0.1,
    "ascending": lambda rng, vocab: np.arange(vocab) / 100,
    "descending": lambda rng, vocab: -np.arange(vocab) / 100,
    "all equal": lambda rng, vocab: np.full(vocab, 3.0),
    "few values": lambda rng, vocab: rng.integers(0, 5, vocab),
    "huge": lambda rng, vocab: rng.standard_normal(vocab) * 1e30,
    "mostly impossible": lambda rng, vocab: np.where(np.arange(vocab) % 50 == 7, rng.standard_normal(vocab), -np.inf),
}
FILTERS = [
    {},
    {"top_k": 5},
    {"top_k": 200},
    {"top_p": 0.6},
    {"top_p": 0.99},
    {"min_p": 0.1},
    {"top_k": 150, "top_p": 0.9, "min_p": 0.001},
    {"temperature": 0.0},
    {"temperature": 3.0, "top_p": 0.95},
]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("vocab", [3, 64, 999, 5000])
def test_native_draws_are_those_of_xla(isa, vocab):
    rng = np.random.default_rng(vocab)
    rows = [make(rng, vocab) for make in ROWS.values()]
    logits = np.repeat(np.stack(rows).astype(np.float32), len(FILTERS) * DRAWS // 8, axis=0)
    batch = len(logits)
    chosen = [FILTERS[i] for i in rng.integers(0, len(FILTERS), batch)]

    def column(name, default, dtype):
        return jnp.asarray([filters.get(name, default) for filters in chosen], dtype)

    arguments = (
        jnp.asarray(logits),
        column("temperature", 0.8, jnp.float32),
        column("top_k", 0, jnp.int32),
        column("top_p", 1.0, jnp.float32),
        column("min_p", 0.0, jnp.float32),
        jnp.asarray(rng.random(batch), jnp.float32),
    )
    expected = np.asarray(draw(*arguments, implementation="xla"))
    with native.using_isa(isa):
        found = np.asarray(draw(*arguments, implementation="ffi"))
    # Two tokens change places where the uniform number lies within rounding of the border between them.
    assert (found == expected).mean() > 0.98
    different = found != expected
    # And then they are as likely as each other, or next to each other: never a token that a filter removed.
    assert (logits[np.arange(batch), found][different] > -np.inf).all()


@pytest.mark.parametrize("implementation", ["xla", *(["ffi"] if ISAS else [])])
@pytest.mark.parametrize("filters", FILTERS)
def test_logits_that_are_no_numbers_still_give_a_token(implementation, filters):
    vocab = 999
    logits = np.zeros((5, vocab), np.float32)
    logits[0] = np.nan
    logits[1, 500] = np.nan
    logits[2, 998] = np.inf
    logits[3] = -np.inf
    logits[4, :3] = [np.inf, -np.inf, np.nan]
    settings = {"temperature": 0.8, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **filters}
    rows = [jnp.full(5, value, jnp.int32 if name == "top_k" else jnp.float32) for name, value in settings.items()]
    for uniform in (0.0, 0.5, 0.999999):
        tokens = draw(jnp.asarray(logits), *rows, jnp.full(5, uniform), implementation=implementation)
        assert ((np.asarray(tokens) >= 0) & (np.asarray(tokens) < vocab)).all()
        if implementation == "ffi":
            assert tokens[2] == 998


def test_the_binding_refuses_bad_input_with_a_sentence():
    def call(logits, *rest):
        return jax.block_until_ready(
            jax.ffi.ffi_call("fusedllm_draw", jax.ShapeDtypeStruct((2,), jnp.int32))(logits, *rest)
        )

    one = np.ones(2, np.float32)
    good = (np.zeros((2, 50), np.float32), one, np.zeros(2, np.int32), one, one, one)
    assert call(*good).tolist() == [49, 49]
    for position, bad, sentence in [
        (0, good[0].astype(np.int32), "logits must be float32"),
        (0, good[0][0], "logits must be float32"),
        (1, one[:1], "temperature, top_p, min_p and uniform"),
        (2, one, "top_k and the result int32"),
    ]:
        arguments = list(good)
        arguments[position] = bad
        with pytest.raises(jax.errors.JaxRuntimeError, match=sentence):
            call(*arguments)
