"""The packed layout: every value as it was in the file, in as many bytes as promised."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packing import GROUPED, NAMES, SOME_GROUPED, blocks, grouped, pack, pack_array, raw

from fusedllm.errors import ImplementationError
from fusedllm.kernels import native, packed
from fusedllm.kernels.dequantize import dequantize
from fusedllm.kernels.embed import embed
from fusedllm.kernels.grouped import MOST_INTEGER_COLUMNS, GroupedScheme
from fusedllm.kernels.quantize import quantize
from fusedllm.qarray import QuantArray
from fusedllm.quant import schemes
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
    assert whole.nbytes == native.packed_bytes(packed.SCHEMES[name].number, 1, rows, width)
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
    def layout(scheme, shape):
        return packed.layout_of(QuantArray(np.zeros(4, np.uint8), None, None, scheme, shape))

    assert layout(SCHEMES["Q4_0"], (16, 96)) == packed.SCHEMES["Q4_0"]
    for scheme, shape in (("Q4_K", (16, 256)), ("Q4_0", (16, 48)), ("Q4_0", (64,)), ("Q4_0", (16, 0))):
        assert layout(SCHEMES[scheme], shape) is None
    assert native.packed_bytes(0, 1, 16, 48) == -1
    assert native.packed_bytes(99, 1, 16, 64) == -1
    assert native.packed_bytes(0, 1, 0, 64) == -1
    for number in (1, 2, 3):
        assert native.packed_bytes(number, 2, 16, 64) == -1
    for shared in (0, -1, 2**31):
        assert native.packed_bytes(0, shared, 16, 64) == -1
    assert native.packed_bytes(packed.INTEGER, 1, 16, 64) == -1
    assert native.packed_bytes(packed.INTEGER, 2049, 16, 32 * 2049) == -1


def test_ids_outside_of_the_table_are_clipped_by_both():
    table = pack("Q4_0", 64, blocks("Q4_0", 20, 64, np.random.default_rng(1)))
    ids = jnp.asarray([-5, 0, 19, 20, 10**6])
    both = [embed(table, ids, jnp.float32, implementation=name) for name in ("xla", "ffi")]
    np.testing.assert_array_equal(*map(np.asarray, both))


def test_a_plain_table_has_no_native_embed():
    with pytest.raises(ImplementationError, match="reads packed tables"):
        embed(jnp.zeros((4, 8)), jnp.asarray([1]), jnp.float32, implementation="ffi")


@pytest.mark.parametrize("name", [*GROUPED, "w8a8"])
def test_packing_keeps_every_value_of_grouped_codes(name):
    rng = np.random.default_rng(0)
    array = grouped(name, 37, 160, rng)
    whole = pack_array(array)
    expected = np.asarray(dequantize(array))
    np.testing.assert_array_equal(dequantize(whole), expected)
    assert whole.scheme.name == name
    assert whole.nbytes == native.packed_bytes(whole.scheme.number, whole.scheme.shared, 37, 160)
    ids = rng.integers(0, 37, 9).astype(np.int32)
    for implementation in ("xla", "ffi"):
        found = embed(whole, jnp.asarray(ids), jnp.float32, implementation=implementation)
        np.testing.assert_array_equal(np.asarray(found), expected[ids])


@settings(max_examples=15)
@given(
    bits=st.sampled_from((3, 4, 8)),
    symmetric=st.booleans(),
    size=st.integers(0, 5),
    rows=st.integers(1, 40),
    groups=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
)
def test_groups_of_any_size_in_matrices_of_any_shape(bits, symmetric, size, rows, groups, seed):
    scheme = GroupedScheme("any", bits, 32 * size, symmetric or bits == 8)
    array = grouped(scheme, rows, 32 * groups, np.random.default_rng(seed))
    found = embed(pack_array(array), jnp.arange(rows), jnp.float32, implementation="ffi")
    np.testing.assert_array_equal(np.asarray(found), dequantize(array))


@pytest.mark.parametrize("name", SOME_GROUPED)
def test_what_the_quantizer_makes_is_packed_bit_for_bit(name):
    weights = np.random.default_rng(0).standard_normal((33, 160)).astype(np.float32)
    weights[:, 64:128] = 0
    array = quantize(jnp.asarray(weights), schemes.SCHEMES[name])
    np.testing.assert_array_equal(dequantize(pack_array(array)), dequantize(array))


@pytest.mark.parametrize("name", SOME_GROUPED)
def test_special_scales_and_zero_points_survive(name):
    specials = np.asarray(
        [0.0, -0.0, 6e-8, -6e-8, 65504.0, 1.0, -3.0, 0.1, 6e-5, np.inf, -np.inf, np.nan, 7.5, -65504.0, 1e-3, 15.0],
        np.float16,
    )
    scheme = schemes.SCHEMES[name]
    scales = np.tile(specials[:, None], scheme.groups(96))
    zeros = None if scheme.symmetric else np.tile(specials[::-1, None], scheme.groups(96))
    array = grouped(name, 16, 96, np.random.default_rng(0), scales=scales, zeros=zeros)
    expected = np.asarray(dequantize(array))
    whole = pack_array(array)
    np.testing.assert_array_equal(dequantize(whole), expected)
    np.testing.assert_array_equal(embed(whole, jnp.arange(16), jnp.float32, implementation="ffi"), expected)


@pytest.mark.parametrize("name", GROUPED)
def test_packed_codes_take_no_more_bytes_than_promised(name):
    whole = pack_array(grouped(name, 48, 1152, np.random.default_rng(0)))
    # A panel ends on a boundary of 64 bytes, and a scale of whole rows is not counted.
    assert whole.nbytes - 3 * 64 - 48 * 2 * whole.scheme.numbers <= whole.scheme.bits_per_weight * 48 * 1152 / 8
    stored = schemes.SCHEMES[name].bits_per_weight + (1 if name.startswith("int3") else 0)
    assert whole.scheme.bits_per_weight <= stored + 16 * whole.scheme.numbers / 1152


def test_scales_of_float32_are_packed_where_float16_holds_them():
    rng = np.random.default_rng(0)
    array = grouped("int4-g64", 20, 96, rng)
    wide = array.replace(scales=array.scales.astype(jnp.float32), zeros=array.zeros.astype(jnp.float32))
    np.testing.assert_array_equal(pack_array(wide).values, pack_array(array).values)
    for name, number in (("scales", 0.1), ("scales", 1e6), ("scales", 1e-9), ("zeros", 7.0001)):
        assert packed.layout_of(wide.replace(**{name: getattr(wide, name).at[3, 1].set(number)})) is None
    assert packed.layout_of(array.replace(scales=array.scales.astype(jnp.bfloat16))) is None


@pytest.mark.parametrize(
    ("scheme", "width"),
    [
        (schemes.SCHEMES["fp8"], 64),
        (schemes.SCHEMES["int4-g32"], 48),
        (schemes.SCHEMES["w8a8"], MOST_INTEGER_COLUMNS + 32),
        (GroupedScheme("int4-g16", 4, 16), 64),
        (GroupedScheme("int4-g48", 4, 48), 96),
        (GroupedScheme("int5", 5), 64),
        (GroupedScheme("int8-g32-asym", 8, 32, symmetric=False), 64),
        (GroupedScheme("w8a8-g32", 8, 32, activation_bits=8), 64),
        (GroupedScheme("w4a8", 4, activation_bits=8), 64),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_grouped_codes_that_have_no_packed_layout(scheme, width):
    assert packed.layout_of(grouped(scheme, 2, width, np.random.default_rng(0))) is None


def test_buffers_of_wrong_sizes_are_not_packed():
    array = grouped("int4-g64", 20, 96, np.random.default_rng(0))
    layout = packed.layout_of(array)
    out = np.empty(layout.packed_shape(array.shape), np.uint8)
    packed.pack(array, layout, out)
    wrong = [
        (array.replace(values=array.values[:, :-17]), layout, out),
        (array.replace(values=array.values[:-1]), layout, out),
        (array.replace(scales=array.scales[:, :1]), layout, out),
        (array.replace(zeros=array.zeros[:-1]), layout, out),
        (array.replace(zeros=None), layout, out),
        (array, layout, out[:-1]),
        (array, dataclasses.replace(layout, shared=1), out),
        (array, dataclasses.replace(layout, number=packed.SYMMETRIC_4), out),
        (array, dataclasses.replace(layout, number=packed.SYMMETRIC_8), out),
    ]
    for arguments in wrong:
        with pytest.raises(ValueError, match="20 x 96 is not packed from codes"):
            packed.pack(*arguments)


@pytest.mark.parametrize("name", SOME_GROUPED)
def test_several_threads_pack_what_one_packs(name):
    array = grouped(name, 170, 160, np.random.default_rng(0))
    before = native.threads()
    try:
        found = []
        for threads in (1, 5):
            native.set_threads(threads)
            found.append(pack_array(array).values)
        np.testing.assert_array_equal(*found)
    finally:
        native.set_threads(before)
