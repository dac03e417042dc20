"""The packed layout: every value as it was in the file, in as many bytes as promised."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from packing import NAMES, blocks, pack, raw

from fusedllm.errors import ImplementationError
from fusedllm.kernels import native, packed
from fusedllm.kernels.embed import embed
from fusedllm.quant.blocks import SCHEMES

pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels were not built")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("rows", "width"), [(1, 32), (37, 96)])
def test_packing_keeps_every_bit_of_every_value(name, rows, width):
    rng = np.random.default_rng(rows)
    made = blocks(name, rows, width, rng)
    whole = pack(name, width, made)
    expected = SCHEMES[name].decode_numpy(made, (rows, width))
    np.testing.assert_array_equal(np.asarray(whole.dequantize()), expected)
    assert whole.nbytes == native.packed_bytes(packed.SCHEMES[name].number, rows, width)
    ids = rng.integers(0, rows, 9).astype(np.int32)
    for implementation in ("xla", "ffi"):
        found = embed(whole, jnp.asarray(ids), jnp.float32, implementation=implementation)
        np.testing.assert_array_equal(np.asarray(found), expected[ids])


@pytest.mark.parametrize("name", NAMES)
def test_special_scales_survive(name):
    specials = np.asarray([0.0, -0.0, 6e-8, -6e-8, 65504.0, 1.0, -3.0, 0.1], np.float16)
    made = blocks(name, 16, 32, np.random.default_rng(0)).reshape(16, -1)
    made[:8, :2] = specials[:, None].view(np.uint8)
    found, expected = (np.asarray(array(name, 32, made).dequantize()) for array in (pack, raw))
    np.testing.assert_array_equal(found, expected)
    rows = embed(pack(name, 32, made), jnp.arange(16), jnp.float32, implementation="ffi")
    np.testing.assert_array_equal(np.asarray(rows), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_packed_matrix_is_hardly_larger_than_its_blocks(name):
    made = blocks(name, 48, 576, np.random.default_rng(0))
    assert pack(name, 576, made).nbytes <= 1.03 * made.nbytes


def test_what_has_no_packed_layout():
    assert not packed.can_pack("Q4_K", (16, 256))
    assert not packed.can_pack("Q4_0", (16, 48))
    assert native.packed_bytes(0, 16, 48) == -1
    assert native.packed_bytes(99, 16, 64) == -1
    assert native.packed_bytes(0, 0, 64) == -1


def test_ids_outside_of_the_table_are_clipped_by_both():
    table = pack("Q4_0", 64, blocks("Q4_0", 20, 64, np.random.default_rng(1)))
    ids = jnp.asarray([-5, 0, 19, 20, 10**6])
    both = [embed(table, ids, jnp.float32, implementation=name) for name in ("xla", "ffi")]
    np.testing.assert_array_equal(*map(np.asarray, both))


def test_a_plain_table_has_no_native_embed():
    with pytest.raises(ImplementationError, match="reads packed tables"):
        embed(jnp.zeros((4, 8)), jnp.asarray([1]), jnp.float32, implementation="ffi")
