"""Codes of e4m3 against ml_dtypes' conversion, and the cache that holds them in XLA's implementation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import TINY
from hypothesis import given
from hypothesis import strategies as st

from fusedllm.kernels.e4m3 import from_e4m3, to_e4m3
from fusedllm.model.cache import empty_cache

encode, decode = jax.jit(to_e4m3), jax.jit(from_e4m3, static_argnums=1)

CODES = np.arange(256, dtype=np.uint8)
NUMBERS = CODES.view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def expected_codes(x):
    with np.errstate(invalid="ignore"):  # of what is no number
        return np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_code_is_read_as_the_number_that_it_is(dtype):
    np.testing.assert_array_equal(np.asarray(decode(CODES, dtype), np.float32), NUMBERS)


def test_every_number_has_its_own_code():
    np.testing.assert_array_equal(encode(NUMBERS), CODES)


def test_ties_go_to_even_and_their_neighbours_to_the_nearest():
    magnitudes = NUMBERS[:127]
    ties = (magnitudes[1:] + magnitudes[:-1]) / 2
    around = np.concatenate([ties, np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(0))])
    codes = encode(np.concatenate([around, -around])).reshape(2, 3, 126)
    below = np.arange(126)
    np.testing.assert_array_equal(codes[0], [below + below % 2, below + 1, below])
    np.testing.assert_array_equal(codes[1], codes[0] + 128)


@pytest.mark.parametrize(
    ("x", "code"), [(448, 0x7E), (464, 0x7E), (1e30, 0x7E), (np.inf, 0x7E), (-np.inf, 0xFE), (1e-40, 0), (-0.0, 0x80)]
)
def test_the_ends_saturate(x, code):
    assert encode(np.full(3, x, np.float32)).tolist() == [code] * 3


def test_what_is_no_number_stays_none():
    assert np.isnan(decode(encode(np.full(3, np.nan, np.float32)), "float32")).all()


@given(seed=st.integers(0, 2**32), spread=st.sampled_from([None, 1e-3, 1.0, 300.0]))
def test_any_number_becomes_the_code_of_ml_dtypes(seed, spread):
    """Random bits, or normal numbers around where e4m3 has its subnormal ones, most of its own, and its end."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**32, 4096, dtype=np.uint32)
    x = bits.view(np.float32) if spread is None else (spread * rng.standard_normal(4096)).astype(np.float32)
    np.testing.assert_array_equal(encode(x), expected_codes(x))


def test_a_cache_takes_a_byte_a_number_and_nothing_else():
    cache = empty_cache(TINY, 4, 16, "float8_e4m3fn")
    arrays = jax.tree.leaves(cache)
    assert sum(x.nbytes for x in arrays) == 2 * TINY.num_layers * 4 * 16 * TINY.num_kv_heads * TINY.head_dim
    assert all(not np.asarray(decode(x, jnp.float32)).any() for x in arrays)
