"""Rows turned by Hadamard matrices: one definition, the same bits everywhere, and the scheme that is made of it."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packing import grouped, pack_array

from fusedllm.errors import QuantizationError
from fusedllm.kernels import native
from fusedllm.kernels.dequantize import dequantize
from fusedllm.kernels.embed import embed
from fusedllm.kernels.hadamard import hadamard, hadamard_numpy
from fusedllm.kernels.linear import linear
from fusedllm.kernels.packed import layout_of
from fusedllm.kernels.pallas_support import interpreting
from fusedllm.kernels.quantize import quantize
from fusedllm.kernels.walsh import MOST_TOGETHER, SMALLEST, block_of, factor_of
from fusedllm.partition import ring
from fusedllm.quant.faces import row_array
from fusedllm.quant.methods import quantize_matrix
from fusedllm.quant.schemes import RECIPES, SCHEMES, in_full, scheme_named
from fusedllm.quant.statistics import Statistics
from fusedllm.quant.table import rows as rows_of
from fusedllm.quantizing import dequantize as dequantize_table
from fusedllm.quantizing import quantize as quantize_table

TURNED, PLAIN = SCHEMES["w8a8-h"], SCHEMES["w8a8"]
needs_native = pytest.mark.skipif(not native.available(), reason="the native kernels were not built")
ISAS = native.isas() if native.available() else ()
SEEDS = st.integers(0, 2**32 - 1)
# Blocks of 1, 2, 4, 32, 64, 512 and whole rows of 256.
WIDTHS = (1, 3, 10, 36, 96, 192, 256, 1536)


def sylvester(size: int) -> np.ndarray:
    """The matrix as a textbook makes it."""
    made = np.ones((1, 1))
    while len(made) < size:
        made = np.block([[made, made], [made, -made]])
    return made / math.sqrt(size)


def bits(x: np.ndarray) -> np.ndarray:
    """With one pattern for what is no number."""
    return np.where(np.isnan(x), np.float32(np.nan), x).astype(np.float32).view(np.int32)


def activations(tokens: int, width: int, seed: int) -> np.ndarray:
    """Of every size, with outliers, denormal numbers, zeros of both signs, and what is infinite or no number."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((tokens, width)) * 10.0 ** rng.integers(-30, 30, (tokens, 1))).astype(np.float32)
    x *= np.where(rng.random(x.shape) < 0.05, np.float32(1e3), np.float32(1))
    for row in x:
        kind = rng.integers(0, 8)
        if kind == 0:
            row[:] = rng.choice(np.float32([0, -0.0, SMALLEST, -SMALLEST, SMALLEST * 0.99, 1e-40, 1.0]), width)
        elif kind == 1:
            row[rng.integers(width)] = rng.choice(np.float32([np.inf, -np.inf, np.nan, 3.4e38]))
    return x


@pytest.mark.parametrize("width", WIDTHS)
def test_each_block_is_multiplied_with_the_matrix_and_comes_back(width):
    x = np.random.default_rng(width).standard_normal((4, width)).astype(np.float32)
    size = block_of(width)
    exact = (x.astype(np.float64).reshape(4, -1, size) @ sylvester(size)).reshape(x.shape)
    found = hadamard_numpy(x)
    # Each stage and the factor round once; of blocks up to 512, elements of magnitudes up to 5.
    np.testing.assert_allclose(found, exact, atol=11 * 2.0**-24 * 5)
    np.testing.assert_allclose(hadamard_numpy(found), x, atol=22 * 2.0**-24 * 5)


def test_blocks_are_the_largest_powers_of_two_that_divide():
    assert [block_of(width) for width in (576, 1536, 2048, 8192, 11008, 7)] == [64, 512, 2048, 8192, 256, 1]
    assert block_of(3 * 2**20) == MOST_TOGETHER
    for stages in range(17):
        assert factor_of(2**stages) == np.float32(2.0 ** (-stages / 2))


@settings(max_examples=40)
@given(seed=SEEDS, width=st.sampled_from(WIDTHS))
def test_xla_and_native_code_give_the_bits_of_numpy(seed, width):
    x = activations(3, width, seed)
    expected = bits(hadamard_numpy(x))
    np.testing.assert_array_equal(bits(np.asarray(hadamard(jnp.asarray(x), implementation="xla"))), expected)
    for isa in ISAS:
        with native.using_isa(isa):
            np.testing.assert_array_equal(bits(np.asarray(hadamard(jnp.asarray(x), implementation="ffi"))), expected)


@pytest.mark.parametrize("width", [192, 1536])
def test_a_product_before_it_is_not_contracted_into_it(width):
    """XLA makes one operation of a product and the addition after it where it can, with another rounding."""
    rng = np.random.default_rng(width)
    gate, up = (rng.standard_normal((40, width)).astype(np.float32) for _ in range(2))
    fused = jax.jit(lambda gate, up: hadamard(gate * up, implementation="xla"))(gate, up)
    np.testing.assert_array_equal(bits(np.asarray(fused)), bits(hadamard_numpy(gate * up)))


@pytest.mark.parametrize("way", [False, *(pytest.param(isa, marks=needs_native) for isa in ISAS)])
def test_the_trusted_side_encodes_what_the_compiled_model_rounds(way):
    for seed, width in enumerate((96, 192, 100, 1536, 7)):
        x, pads = activations(9, width, seed), np.random.default_rng(seed).integers(-(2**31), 2**31, (9, width))
        wanted = ring.encode(hadamard_numpy(x), native=False)
        if way:
            with native.using_isa(way):
                found = ring.encode(x, pads.astype(np.int32), turned=True, native=True)
        else:
            found = ring.encode(x, pads.astype(np.int32), turned=True, native=False)
        np.testing.assert_array_equal(found.codes, wanted.codes)
        np.testing.assert_array_equal(bits(found.scales), bits(wanted.scales))
        np.testing.assert_array_equal(ring.subtract(found.sent, pads.astype(np.int32)), wanted.codes)


@needs_native
@pytest.mark.parametrize("isa", ISAS)
def test_products_have_the_same_bits_everywhere(isa):
    rng = np.random.default_rng(0)
    for width in (96, 1536):
        matrix = jnp.asarray(rng.standard_normal((37, width)), jnp.float32)
        weight, beside = quantize(matrix, TURNED), quantize(matrix, PLAIN)
        x = jnp.asarray(activations(6, width, width))
        (expected,) = jax.jit(lambda x, weight: linear(x, weight, implementation="xla"))(x, weight)
        (unturned,) = linear(x, beside, implementation="xla")
        with native.using_isa(isa):
            found, other, floats = linear(x, pack_array(weight), pack_array(beside), matrix, implementation="ffi")
            (alone,) = linear(x, matrix, implementation="ffi")
        np.testing.assert_array_equal(bits(np.asarray(found)), bits(np.asarray(expected)))
        np.testing.assert_array_equal(bits(np.asarray(other)), bits(np.asarray(unturned)))
        np.testing.assert_array_equal(floats, alone)
        made = ring.encode(np.asarray(x), turned=True)
        sums = made.codes.astype(np.int32) @ np.asarray(weight.values).view(np.int8).T.astype(np.int32)
        out = ring.scale(sums, made.scales, np.asarray(weight.scales, np.float32)[:, 0])
        np.testing.assert_array_equal(bits(out), bits(np.asarray(expected)))


def test_pallas_multiplies_the_same_integers():
    matrix = jnp.asarray(np.random.default_rng(1).standard_normal((37, 96)), jnp.float32)
    x = jnp.asarray(np.random.default_rng(2).standard_normal((5, 96)), jnp.float32)
    with interpreting():
        weight = quantize(matrix, TURNED, implementation="pallas")
        (found,) = linear(x, weight, implementation="pallas")
        decoded = dequantize(weight, implementation="pallas")
    np.testing.assert_array_equal(weight.values, quantize(matrix, TURNED, implementation="xla").values)
    np.testing.assert_allclose(found, linear(x, weight, implementation="xla")[0], rtol=2.0**-22)
    np.testing.assert_array_equal(decoded, weight.dequantize())


def test_one_large_element_of_a_token_costs_little():
    rng = np.random.default_rng(3)
    matrix, x = rng.standard_normal((64, 512)).astype(np.float32), rng.standard_normal((20, 512)).astype(np.float32)
    x[:, 5] *= 100
    exact = x @ matrix.T
    off = {}
    for scheme in (PLAIN, TURNED):
        (product,) = linear(jnp.asarray(x), quantize(jnp.asarray(matrix), scheme))
        off[scheme.name] = np.linalg.norm(product - exact) / np.linalg.norm(exact)
    # The step falls from 100 / 127 to some 3 * 4.6 / 127 (an element of 100 and 511 of one, over the root of 512), of
    # which the weights' own rounding leaves a part.
    assert off["w8a8-h"] < off["w8a8"] / 2


@pytest.mark.parametrize("width", [96, 33])
def test_weights_come_back_in_their_own_basis_wherever_they_are_decoded(width):
    matrix = np.random.default_rng(width).standard_normal((40, width)).astype(np.float32)
    array = quantize(jnp.asarray(matrix), TURNED)
    decoded = np.asarray(array.dequantize())
    # Steps of four standard deviations over 127: an error of a third of half a step in the mean.
    assert np.sqrt(np.square(decoded - matrix).mean()) < 4 / 127 / math.sqrt(12) * 1.1
    np.testing.assert_array_equal(dequantize(array), decoded)
    np.testing.assert_array_equal(dequantize(array, jnp.bfloat16), decoded.astype(ml_dtypes.bfloat16))
    tokens = jnp.asarray([[3, 0], [39, 17]])
    np.testing.assert_array_equal(embed(array, tokens, jnp.float32), decoded[np.asarray(tokens)])
    if layout_of(array) is not None and native.available():
        held = pack_array(array)
        np.testing.assert_array_equal(held.dequantize(), decoded)
        for implementation in ("xla", "ffi"):
            np.testing.assert_array_equal(
                embed(held, tokens, jnp.float32, implementation=implementation), decoded[np.asarray(tokens)]
            )


def test_tables_say_it_and_are_read_again():
    matrix = np.random.default_rng(4).standard_normal((24, 96)).astype(np.float32)
    table = quantize_table({"a": matrix, "b": matrix}, "w8a8", rules={"a": "w8a8-h"})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    again = pa.ipc.open_file(sink.getvalue()).read_all()
    found = [row for batch in again.to_batches() for row in rows_of(batch)]
    assert [row.scheme for row in found] == [TURNED, PLAIN]
    expected = quantize(jnp.asarray(matrix), TURNED)
    np.testing.assert_array_equal(found[0].values, expected.values)
    np.testing.assert_array_equal(row_array(found[0]).dequantize(), expected.dequantize())
    given_back = dequantize_table(again).to_pylist()[0]["weights"]
    np.testing.assert_array_equal(np.float32(given_back).reshape(24, 96), expected.dequantize())


def test_the_recipe_turns_o_and_down_and_rules_come_before_it():
    names = [
        f"model.layers.0.{name}.weight"
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    ]
    weights = dict.fromkeys([*names, "lm_head.weight"], np.ones((4, 32), np.float32))
    table = quantize_table(weights, "w8a8-turned", rules={"up_proj|q_proj": "keep", "layers.0.*o_proj": "int8"})
    assert dict(zip(table["layer_name"].to_pylist(), table["scheme"].to_pylist(), strict=True)) == {
        names[0]: "float32",
        names[1]: "int8",
        names[2]: "float32",
        names[3]: "w8a8-h",
        "lm_head.weight": "w8a8",
    }
    for recipe, (scheme, rules) in RECIPES.items():
        assert recipe not in SCHEMES
        assert in_full(recipe) == (scheme, rules)
        with pytest.raises(QuantizationError, match=f"{recipe} is a recipe for a whole model.* of w8a8 or of w8a8-h"):
            scheme_named(recipe)


@pytest.mark.parametrize("method", ["clip", "hqq", "gptq", "clip+gptq"])
def test_methods_see_the_inputs_as_the_codes_meet_them(method):
    """Better than rounding by the error of outputs, which is what statistics of other inputs would not give."""
    rng = np.random.default_rng(5)
    x = (rng.standard_normal((300, 64)) @ rng.standard_normal((64, 64)) * rng.exponential(size=64) ** 3).astype(
        np.float32
    )
    matrix = jnp.asarray(rng.standard_normal((48, 64)), jnp.float32)
    statistics = Statistics.of_inputs(jnp.asarray(x))

    def error(array) -> float:
        return float(np.square((np.asarray(array.dequantize()) - np.asarray(matrix)) @ x.T).mean())

    found = quantize_matrix(matrix, TURNED, method, statistics)
    assert found.scheme == TURNED
    rounded = error(quantize(matrix, TURNED))
    # Of inputs as correlated as these GPTQ leaves less than a half; HQQ minimizes another norm of unweighted errors.
    assert error(found) < rounded * (0.5 if "gptq" in method else 1.2 if method == "hqq" else 1)
    turned = statistics.of_turned()
    exact = Statistics.of_inputs(hadamard(jnp.asarray(x)))
    np.testing.assert_allclose(turned.hessian, exact.hessian, rtol=1e-3, atol=1e-4 * float(exact.mean_square.max()))
    np.testing.assert_allclose(turned.mean_square, exact.mean_square, rtol=1e-3)
    assert (np.asarray(turned.mean_abs) >= np.asarray(exact.mean_abs) * (1 - 1e-3)).all()


def test_what_can_not_be_known_of_turned_inputs_is_refused():
    from fusedllm.quant.awq import awq_scales

    matrix = jnp.ones((4, 32))
    statistics = Statistics.of_inputs(jnp.ones((5, 32)))
    with pytest.raises(QuantizationError, match="awq scales the channels of inputs, and w8a8-h turns them"):
        awq_scales([(matrix, PLAIN), (matrix, TURNED)], statistics, jnp.float16)
    with pytest.raises(QuantizationError, match="made of their Hessian, and there is none"):
        quantize_matrix(matrix, TURNED, "clip", dataclasses.replace(statistics, hessian=None))


def test_turned_codes_of_other_kinds_multiply_as_they_decode():
    """No table makes them; products must not take their codes for those of the weights all the same."""
    scheme = dataclasses.replace(SCHEMES["int8-g32"], name="int8-g32-h", turned=True)
    rng = np.random.default_rng(6)
    array = grouped(scheme, 20, 96, rng)
    assert layout_of(array) is None
    x = rng.standard_normal((3, 96)).astype(np.float32)
    exact = x @ np.asarray(array.dequantize()).T
    np.testing.assert_allclose(linear(jnp.asarray(x), array)[0], exact, rtol=1e-4, atol=1e-5)
    with interpreting():
        np.testing.assert_allclose(
            linear(jnp.asarray(x), array, implementation="pallas")[0], exact, rtol=1e-4, atol=1e-5
        )
