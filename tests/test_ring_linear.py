"""Products modulo 2^32: every implementation against NumPy's unsigned numbers, bit for bit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedllm.errors import ImplementationError
from fusedllm.kernels import native, native_ring
from fusedllm.kernels import ring_linear as module
from fusedllm.kernels.grouped import MOST_INTEGER_COLUMNS
from fusedllm.kernels.pallas_support import interpreting
from fusedllm.kernels.ring_linear import join, ring_linear, split
from fusedllm.kernels.ring_linear_triton import BLOCKS, LEAST_TURNS, Plan, ring_linear_triton

# jax says so from 0.11 on, whatever the kernel.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
# `native.available()` warns where they are missing, which would take the GPU's tests with it.
IS_NATIVE = native.why_unavailable() is None
needs_native = pytest.mark.skipif(not IS_NATIVE, reason="the native kernels were not built")

ISAS = native.isas() if IS_NATIVE else ()
LEAST, MOST = -(2**31), 2**31 - 1
# Where a limb, its sign or a carry changes.
EXTREME = np.asarray([LEAST, MOST, -1, 0, 1, 127, 128, 255, 256, -128, -129, 32767, 32768, -32769, 2**24 - 1, -(2**23)])
# Rows, columns and tokens that are multiples of no block, and some that are.
SHAPES = ((1, 1, 1), (1, 65, 7), (3, 64, 12), (2, 130, 50), (5, 200, 37), (17, 31, 4), (40, 129, 3))


def wanted(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Unsigned numbers of 32 bits, whose overflow NumPy defines."""
    products = x.view(np.uint32)[:, None, :] * weight.astype(np.int32).view(np.uint32)
    return products.sum(-1, dtype=np.uint32).view(np.int32)


def operands(tokens: int, width: int, rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of all bits, with rows of extreme ones, and all weights that int8 has."""
    rng = np.random.default_rng(seed)
    x = rng.integers(LEAST, MOST, (tokens, width), endpoint=True).astype(np.int32)
    weight = rng.integers(-128, 127, (rows, width), endpoint=True).astype(np.int8)
    x[:: 2 + seed % 2] = rng.choice(EXTREME, (len(x[:: 2 + seed % 2]), width))
    weight[1::3] = rng.choice([-128, 127], (len(weight[1::3]), width))
    return x, weight


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=60)
@given(st.integers(1, 9), st.integers(1, 200), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_native_products_are_those_of_unsigned_numbers(isa, tokens, width, rows, seed):
    x, weight = operands(tokens, width, rows, seed)
    with native.using_isa(isa):
        np.testing.assert_array_equal(native_ring.product(x, weight), wanted(x, weight))


@pytest.mark.parametrize("implementation", ["xla", pytest.param("ffi", marks=needs_native), "triton"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_implementations_give_the_same_bits(implementation, shape):
    for seed in range(3):
        x, weight = operands(*shape, seed)
        with interpreting():
            found = ring_linear(jnp.asarray(x), jnp.asarray(weight), implementation=implementation)
        assert found.dtype == jnp.int32
        np.testing.assert_array_equal(found, wanted(x, weight))


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("tokens", "width", "rows"), [(1, 700, 900), (130, 64, 300), (70, 1000, 33)])
def test_products_that_threads_share_are_whole(isa, tokens, width, rows):
    before = native.threads()
    x, weight = operands(tokens, width, rows, 7)
    try:
        for threads in (1, 3):
            native.set_threads(threads)
            with native.using_isa(isa):
                np.testing.assert_array_equal(native_ring.product(x, weight), wanted(x, weight))
    finally:
        native.set_threads(before)


@pytest.mark.parametrize("implementation", ["xla", pytest.param("ffi", marks=needs_native), "triton"])
def test_the_widest_sums_do_not_overflow_before_they_may(implementation):
    """Of the most columns, with all limbs -128, whose products with -128 are the largest there are."""
    x = np.full((1, MOST_INTEGER_COLUMNS), 0x80808080 - 2**32, np.int32)
    weight = np.full((2, MOST_INTEGER_COLUMNS), -128, np.int8)
    weight[1] = 127
    assert (split(jnp.zeros((1, 1), jnp.int32) - module.CENTER) == -128).all()
    for numbers in (x, -x, np.full_like(x, LEAST)):
        with interpreting():
            found = ring_linear(jnp.asarray(numbers), jnp.asarray(weight), implementation=implementation)
        np.testing.assert_array_equal(found, wanted(numbers, weight))


@given(st.lists(st.integers(LEAST, MOST), min_size=20, max_size=20))
def test_limbs_are_signed_bytes_that_add_up_to_their_number(numbers):
    x = np.concatenate([np.asarray(numbers), EXTREME]).astype(np.int32)[None]
    limbs = split(jnp.asarray(x))
    assert limbs.dtype == jnp.int8
    assert limbs.shape == (4, *x.shape)
    np.testing.assert_array_equal(join(limbs.astype(jnp.int32)), x)


def test_one_product_of_bytes_reads_the_weight_once():
    x, weight = jax.ShapeDtypeStruct((3, 64), jnp.int32), jax.ShapeDtypeStruct((8, 64), jnp.int8)
    program = jax.make_jaxpr(lambda x, w: ring_linear(x, w, implementation="xla"))(x, weight)
    (dot,) = [equation for equation in program.eqns if equation.primitive.name == "dot_general"]
    assert {operand.aval.dtype for operand in dot.invars} == {jnp.dtype(jnp.int8)}
    assert dot.outvars[0].aval.dtype == jnp.int32
    assert dot.outvars[0].aval.shape == (12, 8)


@pytest.mark.parametrize("implementation", ["xla", pytest.param("ffi", marks=needs_native), "triton"])
def test_leading_axes_are_kept_and_none_is_no_trouble(implementation):
    x, weight = operands(6, 40, 5, 1)
    with interpreting():
        found = ring_linear(jnp.asarray(x.reshape(2, 3, 40)), jnp.asarray(weight), implementation=implementation)
        one = ring_linear(jnp.asarray(x[0]), jnp.asarray(weight), implementation=implementation)
        empty = ring_linear(jnp.zeros((0, 40), jnp.int32), jnp.asarray(weight), implementation=implementation)
    np.testing.assert_array_equal(found, wanted(x, weight).reshape(2, 3, 5))
    np.testing.assert_array_equal(one, wanted(x, weight)[0])
    assert empty.shape == (0, 5)


def test_operands_that_do_not_fit_are_refused():
    x, weight = jnp.ones((2, 64), jnp.int32), jnp.ones((8, 64), jnp.int8)
    wide = jax.ShapeDtypeStruct((8, MOST_INTEGER_COLUMNS + 1), jnp.int8)
    for other in (weight[:, :32], weight[None], weight[0], weight[:0], weight.astype(jnp.int32)):
        # Below the annotations, which the tests check and users don't.
        with pytest.raises(ValueError, match=r"ring_linear: int32 \[\.\.\., in\] is multiplied with int8 \[out, in\]"):
            module._check(x, other)
    for other in (x.astype(jnp.uint32), x.astype(jnp.float32), jnp.int32(1)):
        with pytest.raises(ValueError, match="ring_linear: int32"):
            module._check(other, weight)
    with pytest.raises(ValueError, match="int32 holds the sums of 65536 columns, and this weight has 65537"):
        module._check(jax.ShapeDtypeStruct((1, MOST_INTEGER_COLUMNS + 1), jnp.int32), wide)
    with pytest.raises(ImplementationError, match="has no implementation 'gpu'; it has: ffi, triton, xla"):
        ring_linear(x, weight, implementation="gpu")


@needs_native
def test_the_native_handler_refuses_what_python_would_not_send():
    x, weight = jnp.ones((2, 64), jnp.int32), jnp.ones((8, 64), jnp.int8)
    out = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    calls = (
        (out, x, weight[:, :32], "the weight .out, in."),
        (out, x, weight.astype(jnp.int32), "the weight is int8"),
        (jax.ShapeDtypeStruct((2, 9), jnp.int32), x, weight, "the result .tokens, out."),
    )
    for made, left, right, reason in calls:
        with pytest.raises(Exception, match=reason):
            jax.ffi.ffi_call("fusedllm_ring_linear", made)(left, right).block_until_ready()
    with pytest.raises(ValueError, match="takes contiguous int32"):
        native_ring.product(np.ones((2, 64), np.int64), np.ones((8, 64), np.int8))
    with pytest.raises(ValueError, match="takes contiguous int8"):
        native_ring.product(np.ones((2, 64), np.int32), np.ones((64, 8), np.int8).T)


@needs_native
def test_the_cpu_chooses_the_native_kernel():
    program = jax.make_jaxpr(ring_linear)(jnp.ones((1, 32), jnp.int32), jnp.ones((4, 32), jnp.int8))
    assert "fusedllm_ring_linear" in str(program)


def test_a_product_is_cut_so_that_every_column_is_multiplied_once():
    cut = set()
    for tokens in (1, 4, 5, 16, 17, 5000):
        for width in (40, 576, 1111, 2048, 8192):
            plan = Plan.of(tokens, (2048, width))
            assert 0 <= plan.turns * plan.blocks.columns - width < plan.blocks.columns
            assert plan.grid[0] * plan.blocks.tokens >= tokens
            assert plan.grid[1] * plan.blocks.rows >= 2048
            assert plan.parts == 1 or plan.turns >= LEAST_TURNS * plan.parts
            # The least that a matrix unit takes of int8, and Triton's powers of two.
            assert 4 * plan.blocks.tokens >= 16
            assert plan.blocks.columns >= 32
            cut.add((plan.blocks, plan.parts > 1))
    assert {blocks for blocks, _ in cut} == set(BLOCKS)
    assert {parted for _, parted in cut} == {False, True}


@pytest.mark.parametrize("tokens", [1, 9, 70])
def test_products_in_parts_and_of_every_block_are_whole(tokens):
    x, weight = operands(tokens, 1100, 70, tokens)
    np.testing.assert_array_equal(ring_linear_triton(jnp.asarray(x), jnp.asarray(weight), True), wanted(x, weight))


@pytest.mark.parametrize("platform", ["cuda", "rocm"])
@pytest.mark.parametrize(("tokens", "shape"), [(1, (2048, 8192)), (16, (37, 200)), (512, (8192, 2048))])
def test_the_kernel_is_lowered_for_gpus(platform, tokens, shape):
    """To Triton's language; a GPU's compiler is not asked."""
    x, weight = jax.ShapeDtypeStruct((tokens, shape[1]), jnp.int32), jax.ShapeDtypeStruct(shape, jnp.int8)
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        program = ring_linear_triton.trace(x, weight, False).lower(lowering_platforms=(platform,)).as_text()
    assert program.count("__gpu$xla.gpu.triton") == 1


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (1, 8192, 2048), (512, 2048, 8192)], ids=str)
def test_a_gpu_gives_the_same(shape):
    x, weight = operands(*shape, 5)
    exact = native_ring.product(x, weight) if native_ring.available() else wanted(x, weight)
    for implementation in ("xla", "pallas"):
        found = ring_linear(jnp.asarray(x), jnp.asarray(weight), implementation=implementation)
        np.testing.assert_array_equal(found, exact)
