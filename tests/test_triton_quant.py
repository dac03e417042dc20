"""Pallas kernels of grouped codes: interpreted against XLA on the CPU, lowered for GPUs, and run on one where it is."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import HALF_STEP, lowered, random_codes

from fusedllm.errors import ImplementationError
from fusedllm.kernels import pallas_support
from fusedllm.kernels.choose import choose, traced_for
from fusedllm.kernels.dequantize import dequantize
from fusedllm.kernels.dequantize_triton import dequantize_triton
from fusedllm.kernels.grouped import GroupedScheme
from fusedllm.kernels.linear import linear
from fusedllm.kernels.linear_triton import BLOCKS, Plan, product_triton
from fusedllm.kernels.pallas_support import interpreting
from fusedllm.kernels.quantize import quantize, round_activations
from fusedllm.kernels.quantize_triton import quantize_triton
from fusedllm.kernels.triton_tiles import Span, from_float8, round_to_even, tile, to_float8
from fusedllm.quant.schemes import SCHEMES

# jax says so from 0.11 on, whatever the kernel.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")

ALL = tuple(SCHEMES.values())
# Schemes that are not in the table, but in the layout.
OTHERS = (
    GroupedScheme("int4", 4),
    GroupedScheme("int6-g32", 6, 32, symmetric=False),
    GroupedScheme("int8-g64-asym", 8, 64, symmetric=False),
    GroupedScheme("int3-g512", 3, 512),
    GroupedScheme("fp8-g32", 8, 32, codes="float8"),
)
# One of each way to multiply; tables, shapes and dtypes that differ in nothing else are left to a GPU.
MULTIPLIED = (
    *(SCHEMES[name] for name in ("int8", "int4-g64", "int3-g128-sym", "w8a8", "int8-g32", "int4-g32-sym")),
    *(SCHEMES[name] for name in ("fp8", "int3-g64", "int4-g128")),
    *OTHERS,
)
DTYPES = ("float32", "bfloat16", "float16")
# Rows and columns that are multiples of no block, and some that are.
SHAPES = ((37, 200), (1, 1030), (130, 66), (64, 256))
TOKENS = (1, 5, 20, 70)


def turn(choices, number):
    """Every choice in turn, so that neighbours in a list of cases differ."""
    return choices[number % len(choices)]


def matrix(shape, dtype, seed):
    """Weights with rows of zeros, of one sign, of large and of small magnitudes, and groups of zeros."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape)
    rows = np.arange(shape[0]) % 12
    values[rows == 3] = 0
    values[rows == 5, : shape[1] // 2] = 0
    values[rows == 7] *= 1e-6
    values[rows == 9] *= 1e3
    values[rows == 11] = np.abs(values[rows == 11])
    return jnp.asarray(values, dtype)


def assert_same_bits(found, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(raw(a), raw(b)), found, wanted)


def raw(array):
    array = np.asarray(array)
    return array.view(f"u{array.dtype.itemsize}")


def names(schemes):
    return [scheme.name for scheme in schemes]


def check_quantize(scheme, number):
    weights = matrix(turn(SHAPES, number), turn(DTYPES, number), number)
    scale_dtype = turn((jnp.float16, jnp.float32), number // 2)
    wanted = quantize(weights, scheme, scale_dtype=scale_dtype, implementation="xla")
    assert_same_bits(quantize(weights, scheme, scale_dtype=scale_dtype, implementation="pallas"), wanted)


def check_dequantize(scheme, number):
    array = random_codes(scheme, turn(SHAPES, number), number, turn(("float16", "float32"), number))
    dtype = turn(DTYPES, number)
    assert_same_bits(dequantize(array, dtype, implementation="pallas"), dequantize(array, dtype, implementation="xla"))


def check_product(scheme, number, tokens=None, dtype=None):
    shape = turn(((70, 1111), (130, 96), (64, 512), (3, 40)), number)
    tokens, dtype = tokens or turn(TOKENS, number), dtype or turn(DTYPES, number // 2)
    weight = random_codes(scheme, shape, number)
    x = np.random.default_rng(number).standard_normal((tokens, shape[1])).astype(jnp.dtype(dtype))
    found, beside = (
        # One program each, which compiles sooner than an operation after the other.
        jax.jit(lambda x, weight, how=how: linear(x, weight, out_dtype=jnp.float32, implementation=how)[0])(x, weight)
        for how in ("pallas", "xla")
    )
    activations, decoded = np.asarray(x, np.float64), np.asarray(dequantize(weight, implementation="xla"), np.float64)
    magnitudes = np.abs(activations) @ np.abs(decoded).T
    # float32 sums round as often as there are columns, in random directions.
    slack = 2 * np.sqrt(shape[1]) * HALF_STEP["float32"] * magnitudes
    if scheme.sums_integers:
        # The same integers on both sides.
        assert (np.abs(found - beside) <= slack).all()
        return
    step = HALF_STEP[dtype]
    if not scheme.symmetric:
        # A code less a zero point between codes is rounded, as in XLA's product the weight is; of float32 to 16 bits.
        slack = slack + max(step if dtype != "float32" else 0, 2.0**-15) * magnitudes
    assert (np.abs(found - activations @ decoded.T) <= slack).all()
    # XLA rounds scaled weights to the dtype of the activations; in float16 they may lose more below 2 ** -14.
    lost = step * magnitudes + 2.0**-25 * np.abs(activations).sum(1, keepdims=True)
    assert (np.abs(found - beside) <= slack + lost).all()


@pytest.mark.parametrize("scheme", ALL, ids=names(ALL))
def test_pallas_quantizes_to_the_same_bits_as_xla(scheme):
    with interpreting():
        check_quantize(scheme, ALL.index(scheme))


@pytest.mark.parametrize("name", ["int4-g64", "int8", "fp8"])
@pytest.mark.parametrize("scale_dtype", [jnp.float16, jnp.float32])
def test_pallas_quantizes_tiny_weights_to_the_same_bits_as_xla(name, scale_dtype):
    weights = jnp.ldexp(matrix((40, 96), "float32", 4), -jnp.arange(10, 130, 3)[:, None])
    with interpreting():
        found = quantize(weights, SCHEMES[name], scale_dtype=scale_dtype, implementation="pallas")
    assert_same_bits(found, quantize(weights, SCHEMES[name], scale_dtype=scale_dtype, implementation="xla"))
    assert (np.asarray(found.scales)[17] > 0).all(), "weights of 2 ** -61"


@pytest.mark.parametrize("scheme", ALL + OTHERS, ids=names(ALL + OTHERS))
def test_pallas_dequantizes_to_the_same_bits_as_xla(scheme):
    with interpreting():
        check_dequantize(scheme, (ALL + OTHERS).index(scheme))


@pytest.mark.parametrize("scheme", OTHERS, ids=names(OTHERS))
def test_schemes_outside_of_the_table_are_quantized_too(scheme):
    with interpreting():
        check_quantize(scheme, OTHERS.index(scheme))


@pytest.mark.parametrize("scheme", MULTIPLIED, ids=names(MULTIPLIED))
def test_products_are_those_of_the_decoded_weights(scheme):
    with interpreting():
        check_product(scheme, MULTIPLIED.index(scheme))


def test_the_cases_use_every_way_to_cut_a_product():
    plans = [
        Plan.of(tokens, (rows, width), scheme, wide)
        for scheme in ALL
        for tokens in TOKENS
        for rows, width in ((70, 1111), (64, 512))
        for wide in (False, True)
    ]
    assert {plan.blocks for plan in plans} == set(BLOCKS)
    assert {plan.planes for plan in plans} == {1, 2, 8}
    assert min(plan.parts for plan in plans) == min(plan.dots for plan in plans) == 1 < max(p.parts for p in plans)
    assert max(plan.dots for plan in plans) > 1


def test_a_product_is_cut_so_that_every_column_is_multiplied_once():
    for scheme in ALL + OTHERS:
        for tokens in (1, 16, 17, 64, 65, 5000):
            for width in (40, 96, 576, 1111, 2048, 8192):
                for wide in (False, True):
                    plan = Plan.of(tokens, (2048, width), scheme, wide)
                    assert 0 <= plan.columns * plan.dots * plan.turns - width < plan.columns
                    assert plan.grid[0] * plan.blocks.tokens >= tokens
                    assert plan.grid[1] * plan.blocks.rows >= 2048
                    # What Triton asks of a tensor, and a matrix unit of a dot.
                    depth = plan.columns // plan.planes
                    assert depth >= 16
                    assert depth & (depth - 1) == 0


def test_leading_axes_dtypes_and_weights_of_other_kinds_are_kept():
    x = jax.random.normal(jax.random.key(0), (2, 3, 64), jnp.bfloat16)
    weights = [random_codes(SCHEMES["int8"], (8, 64), 1), random_codes(SCHEMES["int4-g32"], (5, 64), 2)]
    with interpreting():
        products = linear(x, *weights, implementation="pallas")
        with pytest.raises(
            ImplementationError, match="it multiplies with grouped codes, got float32, of which it takes"
        ):
            linear(x, weights[0], jnp.ones((4, 64)), implementation="pallas")
        with pytest.raises(
            ImplementationError, match="takes activations in bfloat16, float16, float32, got float8_e4m3fn"
        ):
            linear(jnp.ones((1, 64), jnp.float8_e4m3fn), weights[0], implementation="pallas")
    assert [(p.shape, p.dtype) for p in products] == [((2, 3, 8), jnp.bfloat16), ((2, 3, 5), jnp.bfloat16)]


@pytest.mark.parametrize(
    ("operation", "call"),
    [
        ("quantize", lambda array, how: quantize(jnp.ones((8, 64)), array.scheme, implementation=how)),
        ("dequantize", lambda array, how: dequantize(array, implementation=how)),
        ("linear", lambda array, how: linear(jnp.ones((1, 64)), array, implementation=how)),
    ],
)
def test_pallas_is_refused_on_the_cpu_but_where_it_is_interpreted(monkeypatch, operation, call):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    array = random_codes(SCHEMES["int8"], (8, 64), 0)
    with contextlib.suppress(ZeroDivisionError), interpreting():
        call(array, "pallas")
        raise ZeroDivisionError
    sentence = f"{operation}: the implementation 'pallas' can't run: Pallas has no lowering for the CPU"
    with pytest.raises(ImplementationError, match=sentence):
        call(array, "pallas")
    call(array, None)


@pytest.mark.parametrize("asked", ["pallas", "triton"])
def test_codes_that_pallas_can_not_take_are_refused_if_asked_for_and_left_to_xla_if_not(asked):
    uneven, five = GroupedScheme("int4-g24", 4, 24), GroupedScheme("int5-g32", 5, 32)
    weights = matrix((4, 48), "float32", 0)
    with interpreting(), traced_for("gpu"):
        for scheme, reason in ((uneven, "groups of 24 weights, where a power"), (five, "codes of 5 bits, where 3, 4")):
            array = quantize(weights, scheme)
            dequantize(array)
            linear(weights, array)
            for call in (
                lambda scheme=scheme: quantize(weights, scheme, implementation=asked),
                lambda array=array: dequantize(array, implementation=asked),
                lambda array=array: linear(weights, array, implementation=asked),
            ):
                with pytest.raises(ImplementationError, match=reason):
                    call()


@pytest.mark.parametrize(
    ("backend", "capability", "chosen", "without_mosaic"),
    [
        ("gpu", 10.0, "triton", "triton"),
        ("gpu", 9.0, "mosaic", "triton"),
        ("gpu", 8.0, "triton", "triton"),
        ("gpu", 7.5, "xla", "xla"),
        ("gpu", None, "triton", "triton"),
        ("tpu", None, "xla", "xla"),
    ],
)
def test_the_automatic_choice_is_what_lowers_for_the_gpu(monkeypatch, backend, capability, chosen, without_mosaic):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(pallas_support, "compute_capability", lambda: capability)
    some = {name: (lambda name=name: name) for name in ("xla", "triton")}
    every = {**some, "mosaic": lambda: "mosaic"}
    # A Mosaic kernel that no Hopper has run is nobody's automatic choice.
    assert choose("linear", every, None)() == without_mosaic
    with pallas_support.automatic_mosaic("linear"):
        for implementations, wanted in ((every, chosen), (some, without_mosaic)):
            assert choose("linear", implementations, None)() == wanted
            if wanted == "xla":
                sentence = r"linear: the implementation 'pallas' can't run: .*(7\.5|tpu)"
                with pytest.raises(ImplementationError, match=sentence):
                    choose("linear", implementations, "pallas")
            else:
                assert choose("linear", implementations, "pallas")() == wanted
    if chosen != "mosaic":
        with pytest.raises(ImplementationError, match="the implementation 'mosaic' can't run"):
            choose("linear", every, "mosaic")


def test_a_program_is_traced_for_a_gpu_that_is_not_here():
    every = {name: (lambda name=name: name) for name in ("xla", "ffi", "triton", "mosaic")}
    with traced_for("gpu", 8.0):
        assert choose("linear", every, None)() == "triton"
        with pytest.raises(ImplementationError, match=r"mosaic' can't run: .* capability 9\.0"):
            choose("linear", every, "mosaic")
    with traced_for("gpu", 9.0):
        assert choose("linear", every, None)() == choose("linear", every, "pallas")() == "triton"
        assert choose("linear", every, "mosaic")() == "mosaic"
        with pallas_support.automatic_mosaic("linear"):
            assert choose("linear", every, None)() == choose("linear", every, "pallas")() == "mosaic"
            assert choose("another", every, None)() == "triton"
    assert choose("linear", every, None)() in ("ffi", "xla")


@pytest.mark.parametrize(("name", "number"), [("9.0", 9.0), ("12.0", 12.0), ("gfx942", None), ("", None)])
def test_the_compute_capability_is_a_number_on_nvidia_only(monkeypatch, name, number):
    device = type("Device", (), {"compute_capability": name})
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert pallas_support.compute_capability() == number


def test_activations_are_rounded_to_eight_bits_a_token():
    x = np.asarray(matrix((12, 100), "float32", 1))
    codes, scales = round_activations(jnp.asarray(x))
    largest = np.abs(x).max(1, keepdims=True)
    # float32's rounding of a product and a quotient beside the half step that a code may be off.
    assert (np.abs(codes * scales - x) <= 0.501 * largest / 127).all()
    assert np.abs(codes).max(1).tolist() == [127 if row else 0 for row in largest[:, 0]]
    weight = quantize(jnp.eye(100), SCHEMES["w8a8"])
    (product,) = linear(jnp.asarray(x), weight, implementation="xla")
    # A diagonal matrix of one code times a scale: 127 scales are one but for float16's rounding up.
    np.testing.assert_allclose(product, codes * scales, rtol=2e-3)


@pytest.mark.parametrize(
    ("shape", "counts", "stride"),
    [((37, 25), (32, 8), 1), ((64, 16), (32, 16), 1), ((1, 3), (4, 1), 1), ((64, 5), (64, 4), 3), ((5, 8), (4, 8), 3)],
)
def test_tiles_mask_what_is_outside_of_a_matrix_and_nothing_else(shape, counts, stride):
    """Interpreted kernels would not tell: indices that are too large are clipped there."""
    shape = (shape[0], shape[1] * stride)
    seen = np.zeros(shape, int)

    class Ref:
        at = np.s_

    Ref.shape = shape
    for i in range(-(-shape[0] // counts[0])):
        for j in range(-(-shape[1] // stride // counts[1])):
            for offset in range(stride):
                view, mask = tile(Ref, Span(i, counts[0]), Span(j, counts[1]), stride, offset)
                rows, columns = np.broadcast_arrays(*map(np.asarray, view))
                inside = (rows < shape[0]) & (columns < shape[1])
                np.testing.assert_array_equal(np.ones(counts, bool) if mask is None else mask, inside)
                seen[rows[inside], columns[inside]] += 1
    np.testing.assert_array_equal(seen, 1)


@given(st.lists(st.floats(-1e5, 1e5, width=32), min_size=20, max_size=20))
def test_rounding_by_comparisons_is_rounding_to_even(numbers):
    x = np.asarray(numbers, np.float32)
    x = np.concatenate([x, np.floor(x) + np.float32(0.5)])
    np.testing.assert_array_equal(jax.jit(round_to_even)(x), np.round(x))


@pytest.mark.parametrize("capability", [8.0, 8.9])
def test_every_float8_is_decoded_as_the_format_says(capability):
    codes = np.arange(256).astype(np.uint8)
    wanted = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    with traced_for("gpu", capability):
        program = jax.make_jaxpr(lambda x: from_float8(x))(jnp.asarray(codes.view(np.int8)))
    assert ("f8_e4m3" in str(program)) == (capability == 8.9)
    (found,) = map(np.asarray, jax.core.eval_jaxpr(program.jaxpr, program.consts, jnp.asarray(codes.view(np.int8))))
    np.testing.assert_array_equal(np.isnan(found), np.isnan(wanted))
    assert_same_bits(found[~np.isnan(found)], wanted[~np.isnan(wanted)])


@given(st.lists(st.floats(-500, 500, width=32), min_size=20, max_size=20))
def test_numbers_become_the_nearest_float8(numbers):
    finite = np.arange(0x7F).astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    halves = (finite[1:] + finite[:-1]) / 2
    x = np.concatenate([np.asarray(numbers, np.float32), finite, halves, np.nextafter(halves, 0), -halves])
    wanted = np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    np.testing.assert_array_equal(jax.jit(to_float8)(x), wanted)


def abstract(scheme, shape):
    """An array of codes without values."""
    return jax.eval_shape(lambda w: quantize(w, scheme, implementation="xla"), jax.ShapeDtypeStruct(shape, jnp.float32))


@pytest.mark.parametrize(
    ("scheme", "platform"),
    [(scheme, "cuda") for scheme in ALL + OTHERS] + [(SCHEMES[name], "rocm") for name in ("int4-g64", "fp8", "w8a8")],
    ids=lambda value: getattr(value, "name", value),
)
def test_kernels_are_lowered_for_gpus(scheme, platform):
    """To Triton's language; a GPU's compiler is not asked."""
    shape = turn(((2048, 8192), (37, 200)), (ALL + OTHERS).index(scheme))
    weights, codes = jax.ShapeDtypeStruct(shape, jnp.bfloat16), abstract(scheme, shape)
    x = jax.ShapeDtypeStruct((turn((1, 512, 48), (ALL + OTHERS).index(scheme)), shape[1]), jnp.bfloat16)
    for program in (
        lowered(quantize_triton, weights, scheme, np.dtype(np.float16), False, platform=platform),
        lowered(dequantize_triton, codes, np.dtype(jnp.bfloat16), False, platform=platform),
        lowered(product_triton, x, codes, np.dtype(jnp.bfloat16), False, platform=platform),
    ):
        assert "__gpu$xla.gpu.triton" in program


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 48, 512])
def test_products_of_every_block_and_dtype_are_lowered(tokens, dtype):
    x = jax.ShapeDtypeStruct((tokens, 2048), dtype)
    program = lowered(product_triton, x, abstract(SCHEMES["int4-g64"], (8192, 2048)), np.dtype(dtype), False)
    assert program.count("__gpu$xla.gpu.triton") == 1


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ALL + OTHERS, ids=names(ALL + OTHERS))
def test_a_gpu_gives_the_same(scheme):
    number = (ALL + OTHERS).index(scheme)
    for case in range(number, number + len(SHAPES)):
        check_quantize(scheme, case)
        check_dequantize(scheme, case)
        for dtype in DTYPES:
            check_product(scheme, case, dtype=dtype)
