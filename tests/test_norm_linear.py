"""Add, norm, multiply, and SwiGLU in one operation: each implementation against float64, and what a GPU launches."""

from __future__ import annotations

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import HALF_STEP, lowered, random_codes

from fusedllm.config import ModelConfig
from fusedllm.engine.config import EngineConfig
from fusedllm.engine.programs import Programs
from fusedllm.engine.slots import empty_seats, mask_words
from fusedllm.errors import ImplementationError
from fusedllm.kernels.choose import traced_for
from fusedllm.kernels.dequantize import dequantize
from fusedllm.kernels.few_tokens_plan import Kind, Plan, cut
from fusedllm.kernels.few_tokens_support import MOST_FEW_TOKENS, MOST_SOME_TOKENS
from fusedllm.kernels.few_tokens_triton import products_triton
from fusedllm.kernels.linear import linear
from fusedllm.kernels.norm_linear import norm_linear, norm_swiglu
from fusedllm.kernels.pallas_support import interpreting
from fusedllm.kernels.quantize import quantize
from fusedllm.kernels.rms_norm import rms_norm
from fusedllm.kernels.rms_norm_triton import norm_triton
from fusedllm.kernels.some_tokens_triton import tiles_triton
from fusedllm.model.cache import empty_cache
from fusedllm.model.params import describe, map_specs
from fusedllm.partition.plain import Plain
from fusedllm.qarray import QuantArray
from fusedllm.quant.schemes import SCHEMES

# jax says so from 0.11 on, whatever the kernel.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")

EPS = 1e-5
KINDS = ("plain", "int8", "int4-g64", "int4-g64-sym", "int4-g128", "int8-g32", "fp8", "w8a8", "int3-g64", "mixed")
TOKENS = (1, 2, 5, 16, 17)
# Widths that are a power of two, several, and none; heights that no block divides.
WIDTHS = (512, 832, 200, 1111)
DTYPES = ("bfloat16", "float32", "float16")


class Case:
    """Operands by number; every choice changes from one number to the next."""

    def __init__(self, number, tokens, kind, dtype=None, heights=(37, 16)):
        self.width, self.dtype = WIDTHS[number % len(WIDTHS)], dtype or DTYPES[number % len(DTYPES)]
        self.rng = np.random.default_rng(number)
        self.x, self.norm = self.normal(tokens, self.width), self.normal(self.width)
        self.delta = self.normal(tokens, self.width) if number % 2 else None
        kinds = ("plain", "int4-g64") if kind == "mixed" else (kind,) * len(heights)
        self.weights = tuple(self.weight(one, height) for one, height in zip(kinds, heights, strict=True))

    def normal(self, *shape):
        return jnp.asarray(self.rng.standard_normal(shape), self.dtype)

    def weight(self, kind, height):
        if kind == "plain":
            return self.normal(height, self.width)
        return random_codes(SCHEMES[kind], (height, self.width), height)

    def operands(self):
        """Of `norm_linear`, but for what is added."""
        return self.x, self.norm, *self.weights

    def truth(self):
        """The sum in its dtype, its norm, and the weights, in float64."""
        total = self.x if self.delta is None else self.x + self.delta
        wide = np.asarray(total, np.float64)
        normed = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + EPS) * np.asarray(self.norm, np.float64)
        return total, normed, [matrix(weight) for weight in self.weights]


def matrix(weight):
    plain = dequantize(weight, implementation="xla") if isinstance(weight, QuantArray) else weight
    return np.asarray(plain, np.float64)


def integers(weight):
    return isinstance(weight, QuantArray) and weight.scheme.sums_integers


def slack(case, normed, weight, implementation):
    """What rounding may change in a product: sums of float32, operands of the activations' dtype, and the result."""
    decoded = matrix(weight)
    magnitudes = np.abs(normed) @ np.abs(decoded).T
    step = HALF_STEP[case.dtype]
    # float32 sums round as often as there are columns; a code's distance from its zero point is less than the code.
    sums = 8 * np.sqrt(case.width) * HALF_STEP["float32"] * magnitudes
    # The norm, and for XLA the decoded weight, are rounded to the activations' dtype. Errors of terms are independent:
    # eight deviations of a sum of them.
    terms = 8 * 2 * step * np.sqrt((normed**2) @ (decoded**2).T)
    rounded = 2 * step * np.abs(normed @ decoded.T)
    if case.dtype == "float16":
        # Weights below 2 ** -14 lose more.
        rounded = rounded + 2.0**-24 * np.abs(normed).sum(1, keepdims=True)
    if integers(weight):
        # Activations are rounded to eight bits: half a step of 1 / 127 of the largest.
        rounded = rounded + 8 * (0.5 / 127) * np.abs(normed).max(1, keepdims=True) * np.sqrt((decoded**2).sum(1))
    del implementation
    return sums + terms + rounded + 1e-30


@contextlib.contextmanager
def on_a_gpu():
    """Inside, what nobody asks for by name is what a GPU would choose, interpreted."""
    with interpreting(), traced_for("gpu"):
        yield


def check_norm_linear(case, implementation):
    run = jax.jit(functools.partial(norm_linear, eps=EPS, precise=True, implementation=implementation))
    total, products = run(case.x, case.norm, *case.weights, delta=case.delta)
    wanted, normed, _ = case.truth()
    np.testing.assert_array_equal(np.asarray(total, np.float64), np.asarray(wanted, np.float64))
    for product, weight in zip(products, case.weights, strict=True):
        assert product.dtype == case.x.dtype
        error = np.abs(np.asarray(product, np.float64) - normed @ matrix(weight).T)
        assert (error <= slack(case, normed, weight, implementation)).all()


def check_norm_swiglu(case, implementation, biased):
    gate, up = case.weights
    biases = (case.normal(gate.shape[0]), case.normal(up.shape[0])) if biased else (None, None)
    run = jax.jit(functools.partial(norm_swiglu, eps=EPS, precise=True, implementation=implementation))
    total, active = run(case.x, case.norm, gate, up, delta=case.delta, biases=biases)
    wanted, normed, (gates, ups) = case.truth()
    np.testing.assert_array_equal(np.asarray(total, np.float64), np.asarray(wanted, np.float64))
    left, right = (
        normed @ decoded.T + (0 if bias is None else np.asarray(bias, np.float64))
        for decoded, bias in zip((gates, ups), biases, strict=True)
    )
    silu = left / (1 + np.exp(-left))
    step = HALF_STEP[case.dtype]
    off_left, off_right = (
        slack(case, normed, weight, implementation) + 2 * step * np.abs(side)
        for weight, side in ((gate, left), (up, right))
    )
    # The slope of silu is 1.1 at most; each operation's result is rounded, and float16 has no numbers below 2 ** -24.
    allowed = 1.1 * off_left * (np.abs(right) + off_right) + np.abs(silu) * off_right
    allowed = allowed + 4 * step * np.abs(silu * right) + (2.0**-23 * (1 + np.abs(right)) if step == 2.0**-12 else 0)
    assert (np.abs(np.asarray(active, np.float64) - silu * right) <= allowed + 1e-30).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_products_of_the_norm_are_those_of_float64(tokens, kind):
    case = Case(TOKENS.index(tokens) + 3 * KINDS.index(kind), tokens, kind)
    check_norm_linear(case, "xla")
    check_norm_linear(case, None)
    if kind not in ("w8a8", "int3-g64") and tokens <= (MOST_SOME_TOKENS if kind == "plain" else MOST_FEW_TOKENS):
        # Beyond, the parts are tested by themselves.
        with on_a_gpu():
            assert "pallas_call" in str(jax.make_jaxpr(functools.partial(norm_linear, eps=EPS))(*case.operands()))
            check_norm_linear(case, None)


@pytest.mark.parametrize("number", range(2 * len(WIDTHS)))
def test_a_kernel_takes_all_of_a_norm_and_plain_products(number):
    with interpreting():
        check_norm_linear(Case(number, (1, 4, 2, 3)[number % 4], "plain"), "pallas")


@pytest.mark.parametrize("kind", ["plain", "int8", "int4-g64", "w8a8"])
@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_swiglu_of_the_products_is_that_of_float64(tokens, kind):
    number = tokens + 5 * KINDS.index(kind)
    case = Case(number, tokens, kind, heights=(37, 37))
    for biased in (False, True):
        check_norm_swiglu(case, "xla", biased)
    if kind == "plain" or (kind != "w8a8" and tokens <= MOST_FEW_TOKENS):
        with on_a_gpu():
            check_norm_swiglu(case, None, number % 2 == 0)


@pytest.mark.parametrize("number", range(6))
def test_some_tokens_are_multiplied_in_tiles(number):
    case = Case(number, (5, 16, 11)[number % 3], "plain", ("bfloat16", "float16")[number // 3])
    with interpreting():
        check_norm_linear(case, "pallas")
        case.weights = case.weights[:1] * 2
        check_norm_swiglu(case, "pallas", number % 2 == 0)


@pytest.mark.parametrize("width", [512, 832, 4100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_is_that_of_float64(width, dtype):
    rng = np.random.default_rng(width)
    x, delta = (jnp.asarray(rng.standard_normal((3, 2, width)), dtype) for _ in range(2))
    weight = jnp.asarray(rng.standard_normal(width), dtype)
    for added in (None, delta):
        with interpreting():
            total, normed = rms_norm(x, weight, EPS, delta=added, implementation="pallas")
        wanted = np.asarray(x if added is None else x + added, np.float64)
        np.testing.assert_array_equal(np.asarray(total, np.float64), wanted)
        truth = wanted / np.sqrt((wanted**2).mean(-1, keepdims=True) + EPS) * np.asarray(weight, np.float64)
        # The result is rounded, by half the step of a mantissa's last bit, and operations of float32 before it; and the
        # sum of the truth, which XLA does not round where it goes on with it when it interprets a kernel.
        roundings = 1 if added is None else 2
        off = (roundings * 2 * HALF_STEP[dtype] + 2.0**-20) * np.abs(truth) + 2.0**-24
        assert (np.abs(np.asarray(normed, np.float64) - truth) <= off).all()


@pytest.mark.parametrize("kind", ["plain", "int4-g64", "mixed"])
def test_linear_of_few_tokens_needs_no_norm(kind):
    case = Case(3, 2, kind, "float32")
    with interpreting():
        products = linear(case.x, *case.weights, implementation="pallas")
    for product, weight in zip(products, case.weights, strict=True):
        magnitudes = np.abs(np.asarray(case.x, np.float64)) @ np.abs(matrix(weight)).T
        wanted = np.asarray(case.x, np.float64) @ matrix(weight).T
        assert (np.abs(product - wanted) <= 8 * np.sqrt(case.width) * HALF_STEP["float32"] * magnitudes).all()


def test_leading_axes_and_dtypes_are_kept():
    case = Case(1, 3, "plain", "bfloat16")
    x, delta = (array.reshape(3, 1, -1) for array in (case.x, case.delta))
    with on_a_gpu():
        total, products = norm_linear(x, case.norm, *case.weights, eps=EPS, delta=delta)
        alone, (active,) = norm_linear(x, case.norm, case.weights[0], eps=EPS)
        _, gated = norm_swiglu(x, case.norm, case.weights[0], case.weights[0], eps=EPS)
    assert (total.shape, total.dtype) == (x.shape, x.dtype)
    assert alone is x or (np.asarray(alone) == np.asarray(x)).all()
    assert [(p.shape, p.dtype) for p in (*products, active, gated)] == [
        ((3, 1, height), x.dtype) for height in (37, 16, 37, 37)
    ]


def test_what_kernels_can_not_take_is_refused_if_asked_for_and_left_to_xla_if_not():
    case = Case(0, MOST_SOME_TOKENS + 1, "plain", "bfloat16")
    with interpreting():
        with pytest.raises(ImplementationError, match=r"of which it takes up to 4 tokens, got 17 \(it takes up to 16"):
            norm_linear(case.x, case.norm, *case.weights, eps=EPS, implementation="pallas")
        with pytest.raises(ImplementationError, match="it takes plain weights in bfloat16, got float32"):
            linear(case.x[:1], jnp.ones((4, case.width)), implementation="pallas")
    with on_a_gpu():
        check_norm_linear(case, None)


@pytest.mark.parametrize("width", [1, 31, 200, 256, 576, 1111, 2048, 3072, 8192, 14336, 28672])
@pytest.mark.parametrize("least", [256, 512])
def test_columns_are_cut_so_that_each_is_read_once(width, least):
    columns = cut(width, least)
    assert [one.begin for one in columns] == list(np.cumsum([0, *(one.count for one in columns[:-1])]))
    assert columns[-1].begin < width <= columns[-1].begin + columns[-1].count
    assert [one.masked for one in columns] == [one.begin + one.count > width for one in columns]
    # Triton's tensors are powers of two; whole groups need every piece to be a multiple of the least.
    assert all(one.count & (one.count - 1) == 0 and one.count >= least and one.begin % least == 0 for one in columns)
    assert sum(one.count for one in columns) < 2 * max(width, least)


@pytest.mark.parametrize("tokens", [1, 2, 4])
@pytest.mark.parametrize("heights", [(2048, 512, 512), (2048,), (128256,), (37,), (1,)])
def test_every_row_has_one_program(tokens, heights):
    for width in (576, 2048, 8192, 28672):
        plan = Plan.of(tokens, [Kind(height, width, 16, None) for height in heights], gated=False)
        assert [part.first for part in plan.parts] == list(np.cumsum([0, *(p.programs for p in plan.parts)]))[:-1]
        for part, height in zip(plan.parts, heights, strict=True):
            assert part.rows * (part.programs - 1) < height <= part.rows * part.programs
        # Enough of them, unless a thread would have too little to do.
        assert plan.programs >= 256 or plan.parts[0].rows * width <= 32 * 32 * 4 or plan.parts[0].rows == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["plain", "int8", "int4-g64", "fp8"])
@pytest.mark.parametrize("platform", ["cuda", "rocm"])
def test_kernels_are_lowered_for_gpus(platform, kind, dtype):
    """To Triton's language; a GPU's compiler is not asked."""
    x, norm = jax.ShapeDtypeStruct((2, 2048), dtype), jax.ShapeDtypeStruct((2048,), dtype)
    weight = jax.ShapeDtypeStruct((8192, 2048), dtype)
    if kind != "plain":
        weight = jax.eval_shape(lambda w: quantize(w, SCHEMES[kind], implementation="xla"), weight)

    def layer(x, norm, delta, weight):
        static = {"eps": EPS, "out_dtype": np.dtype(x.dtype), "interpret": False}
        total, products = products_triton(x, (weight, weight), norm=norm, delta=delta, **static)
        return total, products, products_triton(total, (weight, weight), norm=norm, gated=True, **static)

    program = lowered(jax.jit(layer), x, norm, x, weight, platform=platform)
    assert program.count("__gpu$xla.gpu.triton") == 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("platform", ["cuda", "rocm"])
def test_tiles_and_norms_are_lowered_for_gpus(platform, dtype):
    x, norm = jax.ShapeDtypeStruct((8, 2048), dtype), jax.ShapeDtypeStruct((2048,), dtype)
    weight = jax.ShapeDtypeStruct((8192, 2048), dtype)

    def layer(x, norm, weight):
        total, normed = norm_triton(x, norm, x, eps=EPS, interpret=False)
        static = {"out_dtype": np.dtype(x.dtype), "interpret": False}
        return (
            total,
            tiles_triton(normed, (weight, weight), **static),
            tiles_triton(x, (weight, weight), gated=True, **static),
        )

    assert lowered(jax.jit(layer), x, norm, weight, platform=platform).count("__gpu$xla.gpu.triton") == 3


LAYERS = 3


def calls(jaxpr):
    """The names of the kernels of Pallas in a traced program, those of inner programs among them."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            found.append(str(equation.params["jaxpr"].debug_info))
            continue
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr")
        ):
            body = getattr(inner, "jaxpr", inner)
            if hasattr(body, "eqns"):
                found += calls(body)
    return found


@pytest.mark.parametrize(
    ("scheme", "batch", "norms"),
    [*((scheme, batch, 0) for scheme in (None, "int8", "int4-g64") for batch in (1, 4)), (None, 8, 2)],
)
def test_a_layer_of_a_decode_step_is_few_kernels_beside_its_attention(scheme, batch, norms):
    config = ModelConfig(
        family="llama", vocab_size=512, hidden_size=512, intermediate_size=1024, num_layers=LAYERS, num_heads=4,
        num_kv_heads=2, head_dim=64, max_position=256, tie_embeddings=False, eos_token_ids=(2,),
    )  # fmt: skip
    engine = EngineConfig(max_context=128, page_size=16, prefill_buckets=(16,), batch_buckets=(batch,))

    def weight(spec):
        plain = jax.ShapeDtypeStruct(spec.shape, jnp.bfloat16)
        if scheme is None or len(spec.shape) < 2 or "embed" in spec.name:
            return plain
        return jax.eval_shape(lambda w: quantize(w, SCHEMES[scheme], implementation="xla"), plain)

    params = map_specs(weight, describe(config))
    cache = jax.eval_shape(lambda: empty_cache(config, engine.num_pages, engine.page_size, jnp.bfloat16))
    seats = jax.eval_shape(lambda: empty_seats(config, engine.max_batch, engine.table_entries, 4))
    programs = Programs(config, Plain(), jnp.dtype(jnp.bfloat16))
    shape = jax.ShapeDtypeStruct
    with traced_for("gpu", 9.0):
        traced = jax.jit(functools.partial(programs.decode, most=4)).trace(
            params, cache, seats, shape((batch, 3 + engine.new_pages), jnp.int32), shape((), jnp.int32),
            shape((batch, mask_words(config)), jnp.uint32),
        )  # fmt: skip
    made = " ".join(calls(traced.jaxpr.jaxpr))
    # qkv, o, gate and up, down; and the head. For some tokens norms are kernels of their own.
    kernel = "some_tokens" if norms else "few_tokens"
    assert made.count(f"{kernel} at") == 4 * LAYERS + 1
    # The last norm is one always, but for widths that are too small for a kernel.
    assert made.count("add_and_norm at") == norms * LAYERS + 1


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_gives_the_same(kind):
    for number in range(len(WIDTHS) * len(DTYPES)):
        for tokens in (1, 2, 4, 16, 17):
            check_norm_linear(Case(number, tokens, kind), None)
            if kind != "mixed":
                check_norm_swiglu(Case(number, tokens, kind, heights=(37, 37)), None, number % 2 == 0)
