"""The methods of quantization: each is what it promises, in its own measure and as it is stored."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedllm.errors import QuantizationError
from fusedllm.kernels.grouped import GroupedScheme, unpack
from fusedllm.kernels.quantize import quantize
from fusedllm.qarray import QuantArray
from fusedllm.quant import awq, methods
from fusedllm.quant.awq import awq_scales, output_error
from fusedllm.quant.gptq import DAMPING, Factor, factorized, gptq_codes
from fusedllm.quant.grid import Grid, as_array, as_groups, codes_on, nearest_grid
from fusedllm.quant.hqq import NORM, shrink
from fusedllm.quant.methods import method_named, quantize_matrices, quantize_matrix
from fusedllm.quant.schemes import SCHEMES
from fusedllm.quant.statistics import Statistics

# No multiple of any group, nor of the eight codes that are packed together.
ROWS, WIDTH = 24, 150
ALL = ("rtn", "clip", "hqq", "gptq", "clip+gptq", "hqq+gptq")
# One of each kind: asymmetric, symmetric, three bits, whole rows of eight bits, floats as codes.
SOME = ("int4-g32", "int4-g64-sym", "int3-g32", "int8", "fp8")
HALF = np.dtype(np.float16)
every_method = pytest.mark.parametrize("method", ALL)
some_schemes = pytest.mark.parametrize("scheme", [SCHEMES[name] for name in SOME], ids=SOME)


def random_weights(rows: int = ROWS, width: int = WIDTH, seed: int = 0) -> jax.Array:
    # Student's t: some weights are much larger than most, as in a trained model.
    return jnp.asarray(np.random.default_rng(seed).standard_t(5, (rows, width)) * 0.02, jnp.float32)


def correlated_inputs(width: int = WIDTH, tokens: int = 600, seed: int = 1) -> jax.Array:
    """A few directions carry most, and channels differ in size."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((tokens, width // 4)) @ rng.standard_normal((width // 4, width))
    sizes = np.exp(rng.standard_normal(width))
    return jnp.asarray((mixed * 0.2 + rng.standard_normal((tokens, width)) * 0.2) * sizes, jnp.float32)


def statistics(width: int = WIDTH) -> Statistics:
    return Statistics.of_inputs(correlated_inputs(width))


def lost(array: QuantArray, weights: jax.Array, known: Statistics) -> float:
    return float(output_error(array.dequantize() - weights, known))


def codes_of(array: QuantArray) -> np.ndarray:
    return np.asarray(unpack(jnp, array.values, array.scheme.bits)).astype(int)


def assert_sound(array: QuantArray) -> None:
    assert np.isfinite(np.asarray(array.dequantize())).all()
    assert array.scales.dtype == jnp.float16
    if array.scheme.codes == "integer":
        codes = codes_of(array)
        assert codes.min() >= array.scheme.lowest
        assert codes.max() <= array.scheme.highest


@every_method
@some_schemes
def test_codes_are_in_range_and_values_near(method, scheme):
    weights = random_weights()
    array = quantize_matrix(weights, scheme, method, statistics())
    assert_sound(array)
    assert array.values.shape == quantize(weights, scheme).values.shape
    # What makes up for other codes' errors moves a weight further than rounding does, but not anywhere.
    assert float(jnp.abs(array.dequantize() - weights).mean()) < 0.5 * float(jnp.abs(weights).mean())


@some_schemes
@pytest.mark.parametrize("method", ["clip", "hqq"])
def test_codes_are_the_nearest_on_the_scales_that_are_stored(method, scheme):
    weights = random_weights()
    array = quantize_matrix(weights, scheme, method, statistics())
    zero = jnp.full_like(array.scales, scheme.center) if array.zeros is None else array.zeros
    grid = Grid(array.scales.astype(jnp.float32), zero.astype(jnp.float32))
    wanted = codes_on(grid, as_groups(weights, scheme), scheme).reshape(ROWS, -1)
    if scheme.codes == "float8":
        found = jax.lax.bitcast_convert_type(array.values, jnp.float8_e4m3fn).astype(jnp.float32)
    else:
        found = codes_of(array)
    np.testing.assert_array_equal(found, wanted)


@every_method
@some_schemes
def test_groups_of_zeros_stay_zeros_and_disturb_nothing(method, scheme):
    weights = random_weights().at[:, 32:96].set(0).at[3].set(0)
    array = quantize_matrix(weights, scheme, method, statistics())
    assert_sound(array)
    assert not np.asarray(array.dequantize())[3].any()
    assert not np.asarray(quantize_matrix(0 * weights, scheme, method, statistics()).dequantize()).any()


@every_method
def test_the_same_arguments_give_the_same_bits_whole_or_in_parts(method, monkeypatch):
    weights, known = random_weights(), statistics()
    whole = quantize_matrix(weights, SCHEMES["int4-g32"], method, known)
    monkeypatch.setattr(methods, "MOST_WEIGHTS", 7 * WIDTH)
    parts = quantize_matrix(weights, SCHEMES["int4-g32"], method, known)
    assert parts.shape == whole.shape
    jax.tree.map(np.testing.assert_array_equal, parts, whole)


# --- the grids


@some_schemes
def test_clip_never_has_more_squared_error_than_rounding_in_any_group(scheme):
    weights = random_weights()

    def squared(array: QuantArray) -> np.ndarray:
        return np.asarray(jnp.square(as_groups(array.dequantize() - weights, scheme)).sum(-1))

    clipped, plain = squared(quantize_matrix(weights, scheme, "clip")), squared(quantize(weights, scheme))
    # Sums of other orders: their last bits differ.
    assert (clipped <= plain * (1 + 1e-5)).all()
    if scheme.bits < 8:
        assert clipped.sum() < 0.95 * plain.sum()


def test_weighted_clip_serves_the_columns_that_count():
    weights, scheme = random_weights(), SCHEMES["int3-g32"]
    heavy = np.zeros(WIDTH, bool)
    heavy[::4] = True
    known = Statistics(jnp.where(heavy, 100.0, 1.0), jnp.ones(WIDTH))

    def squared(array: QuantArray) -> np.ndarray:
        return np.square(np.asarray(array.dequantize() - weights)).sum(0)

    weighted = squared(quantize_matrix(weights, scheme, "clip", known))
    even = squared(quantize_matrix(weights, scheme, "clip"))
    assert weighted[heavy].sum() < 0.8 * even[heavy].sum()
    assert weighted[~heavy].sum() > even[~heavy].sum()


def test_columns_that_were_never_used_are_still_rounded_with_care():
    weights, scheme = random_weights(), SCHEMES["int4-g32"]
    unused = Statistics(jnp.ones(WIDTH).at[:64].set(0), jnp.ones(WIDTH))
    array = quantize_matrix(weights, scheme, "clip", unused)
    even = quantize_matrix(weights, scheme, "clip")
    np.testing.assert_array_equal(array.scales[:, :2], even.scales[:, :2])
    np.testing.assert_array_equal(array.zeros[:, :2], even.zeros[:, :2])


@some_schemes
@pytest.mark.parametrize("weighted", [False, True])
def test_hqq_never_has_a_larger_norm_than_rounding_in_any_group(scheme, weighted):
    weights = random_weights()
    known = statistics() if weighted else None
    importance = known.mean_square if weighted else jnp.ones(WIDTH)

    def norm(array: QuantArray) -> np.ndarray:
        off = as_groups(jnp.abs(array.dequantize() - weights) ** NORM, scheme)
        return np.asarray((off * as_groups(importance, scheme)).sum(-1))

    found, plain = norm(quantize_matrix(weights, scheme, "hqq", known)), norm(quantize(weights, scheme))
    assert (found <= plain * (1 + 1e-5)).all()
    if scheme.bits < 8:
        assert found.sum() < 0.99 * plain.sum()


@given(st.floats(-1e3, 1e3, width=32), st.floats(1.0, 1e3))
def test_shrinkage_moves_towards_zero_and_not_past_it(x, penalty):
    found = float(shrink(jnp.float32(x), jnp.float32(penalty)))
    assert 0 <= found * np.sign(x) <= abs(x)


def test_shrinkage_is_the_proximal_step_of_the_norm_to_first_order():
    # Of |e|^p + p penalty / 2 (x - e)^2 the derivative is zero at e = x - e^(p - 1) / penalty.
    x, penalty = 3.0, 50.0
    grid = np.linspace(2.5, 3, 500_001)
    exact = grid[np.argmin(grid**NORM + NORM * penalty / 2 * (x - grid) ** 2)]
    assert float(shrink(jnp.float32(x), jnp.float32(penalty))) == pytest.approx(exact, abs=1e-3)


# --- GPTQ


@some_schemes
def test_gptq_loses_less_of_the_outputs_than_rounding(scheme):
    weights, known = random_weights(), statistics()
    plain = lost(quantize(weights, scheme), weights, known)
    found = {name: lost(quantize_matrix(weights, scheme, name, known), weights, known) for name in ALL[3:]}
    assert max(found.values()) < 0.5 * plain


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_agrees_with_the_paper_s_recursion_in_float64(act_order):
    scheme, weights, known = SCHEMES["int4-g32"], random_weights(), statistics()
    grid = quantize(weights, scheme)
    scale = np.repeat(np.asarray(grid.scales, np.float64), 32, axis=1)[:, :WIDTH]
    zero = np.repeat(np.asarray(grid.zeros, np.float64), 32, axis=1)[:, :WIDTH]
    hessian = np.asarray(known.hessian, np.float64)
    hessian += DAMPING * np.diagonal(hessian).mean() * np.eye(WIDTH)
    order = np.argsort(-np.diagonal(hessian)) if act_order else np.arange(WIDTH)
    left, codes = np.asarray(weights, np.float64).copy(), np.zeros((ROWS, WIDTH))
    # Equations 2 and 3, one column at a time, the inverse made anew for those that are left.
    for at, column in enumerate(order):
        rest = order[at:]
        inverse = np.linalg.inv(hessian[np.ix_(rest, rest)])
        codes[:, column] = np.clip(np.round(left[:, column] / scale[:, column] + zero[:, column]), 0, 15)
        error = (left[:, column] - scale[:, column] * (codes[:, column] - zero[:, column])) / inverse[0, 0]
        left[:, rest] -= error[:, None] * inverse[0]
    factor = factorized(known.hessian, act_order=act_order)
    assert factor.damping == np.float32(DAMPING)
    found = gptq_with(weights, factor, scheme)
    # Once float32 rounds a weight to the other neighbour, all later ones of its row differ; few rows have that.
    same = (codes_of(found)[:, :WIDTH] == codes).all(axis=1)
    assert same.mean() > 0.8


def gptq_with(weights: jax.Array, factor: Factor, scheme: GroupedScheme) -> QuantArray:
    grid, codes = gptq_codes(weights, factor, scheme, nearest_grid(weights, scheme, HALF), HALF)
    return as_array(grid, codes, scheme, WIDTH, HALF)


@pytest.mark.parametrize("method", ["gptq", "clip+gptq"])
def test_gptq_of_inputs_without_correlation_rounds_to_the_nearest(method):
    weights, scheme = random_weights(), SCHEMES["int4-g32"]
    known = Statistics(jnp.ones(WIDTH), jnp.ones(WIDTH), jnp.eye(WIDTH))
    plain = quantize_matrix(weights, scheme, method.removesuffix("+gptq") if "+" in method else "rtn", known)
    np.testing.assert_array_equal(quantize_matrix(weights, scheme, method, known).values, plain.values)


def test_scales_found_on_the_way_spread_what_weights_have_become():
    weights, known, scheme = random_weights(), statistics(), SCHEMES["int4-g32"]
    factor = factorized(known.hessian, act_order=False)
    grid, _ = gptq_codes(weights, factor, scheme, None, HALF)
    first = quantize(weights, scheme)
    np.testing.assert_array_equal(grid.scale[:, 0], first.scales[:, 0].astype(jnp.float32))
    assert (np.asarray(grid.scale[:, 1:]) != np.asarray(first.scales[:, 1:], np.float32)).mean() > 0.5


def test_damping_rises_until_a_singular_hessian_has_a_factor():
    # Four tokens know four directions of 32; rounding makes some of the others slightly negative.
    few = jnp.asarray(np.random.default_rng(0).standard_normal((4, 32)), jnp.float32) * 100
    hessian = few.T @ few - 1e-3 * jnp.eye(32)
    factor = factorized(hessian, 1e-9)
    assert float(factor.damping) > 5e-9
    assert np.isfinite(np.asarray(factor.upper)).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_hessian_that_is_not_finite_is_refused(value):
    """No damping helps, and the codes would be noise."""
    hessian = np.eye(64, dtype=np.float32)
    hessian[3, 3] = value
    ones = jnp.ones(64)
    with pytest.raises(QuantizationError, match="needs a finite Hessian"):
        quantize_matrix(jnp.ones((2, 64)), SCHEMES["int4-g32"], "gptq", Statistics(ones, ones, jnp.asarray(hessian)))


def test_columns_without_inputs_are_rounded_to_the_nearest():
    weights, scheme = random_weights(), SCHEMES["int8-g32"]
    dead = np.arange(5, 40)
    known = Statistics.of_inputs(correlated_inputs().at[:, dead].set(0))
    found = quantize_matrix(weights, scheme, "gptq", known)
    np.testing.assert_array_equal(codes_of(found)[:, dead], codes_of(quantize(weights, scheme))[:, dead])


# --- AWQ


def test_awq_scales_lose_less_than_none_and_are_around_one():
    weights, known, scheme = random_weights(), statistics(), SCHEMES["int3-g32"]
    scales = awq_scales([(weights, scheme)], known, HALF)
    assert float(scales.max() * scales.min()) == pytest.approx(1, rel=1e-4)  # float32
    scaled = quantize(weights * scales, scheme).dequantize() / scales
    assert float(output_error(scaled - weights, known)) < 0.9 * lost(quantize(weights, scheme), weights, known)


def test_awq_of_nothing_changes_nothing():
    nothing = Statistics(jnp.zeros(WIDTH), jnp.zeros(WIDTH))
    scales = awq_scales([(jnp.zeros((ROWS, WIDTH)), SCHEMES["int3-g32"])], nothing, HALF)
    np.testing.assert_array_equal(scales, 1)


def test_awq_on_a_sample_of_rows_decides_as_on_all(monkeypatch):
    weights, known, scheme = random_weights(rows=256), statistics(), SCHEMES["int3-g32"]
    monkeypatch.setattr(awq, "SAMPLED_ROWS", 64)
    sampled = awq_scales([(weights, scheme)], known, HALF)
    off = quantize(weights * sampled, scheme).dequantize() / sampled - weights
    monkeypatch.undo()
    best = awq_scales([(weights, scheme)], known, HALF)
    off_best = quantize(weights * best, scheme).dequantize() / best - weights
    assert float(output_error(off, known)) < 1.05 * float(output_error(off_best, known))


def test_statistics_of_divided_inputs_are_those_of_inputs_divided():
    x, scales = correlated_inputs(), jnp.exp(jnp.linspace(-1, 1, WIDTH))
    jax.tree.map(
        lambda found, wanted: np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4),  # float32 sums
        Statistics.of_inputs(x).of_divided(scales),
        Statistics.of_inputs(x / scales),
    )


# --- names


def is_in_order(steps: list[str]) -> bool:
    ranks = [{"awq": 0, "gptq": 2}.get(step, 1) for step in steps]
    return ranks == sorted(set(ranks))


@settings(max_examples=50)
@given(st.lists(st.sampled_from(methods.STEPS), min_size=1, max_size=4))
def test_a_method_is_read_back_from_its_name_or_refused(steps):
    name = "+".join(steps)
    if is_in_order(steps):
        assert method_named(str(method_named(name))) == method_named(name)
        assert str(method_named(name)) == name or "rtn" in steps
    else:
        with pytest.raises(QuantizationError, match="awq comes first"):
            method_named(name)


def test_an_unknown_method_is_refused_with_the_known_ones():
    with pytest.raises(QuantizationError, match=r"no quantization method 'magic'; known are rtn, clip, hqq, awq, gptq"):
        method_named("clip+magic")


def test_methods_that_look_at_activations_say_so():
    needing = {name for name in (*ALL, "awq", "awq+clip") if method_named(name).needs_calibration}
    assert needing == {"gptq", "clip+gptq", "hqq+gptq", "awq", "awq+clip"}
    with pytest.raises(QuantizationError, match="needs the Hessian"):
        quantize_matrices([(random_weights(), SCHEMES["int4-g32"])], "gptq", None)
