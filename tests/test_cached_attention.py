"""The native attention over the cache against XLA's, in every variant that this processor runs."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedllm.errors import ImplementationError
from fusedllm.kernels import native
from fusedllm.kernels.attention import paged_attention
from fusedllm.kernels.cached_attention import cached_attention
from fusedllm.kernels.rotate import rotate
from fusedllm.model.cache import empty_cache
from fusedllm.model.transformer import forward, vocabulary_logits
from fusedllm.partition.plain import Plain
from fusedllm.weights.random import random_params

pytestmark = pytest.mark.skipif(native.why_unavailable() is not None, reason="the native kernels are not built")

ISAS = native.isas() if native.why_unavailable() is None else ()
FP8 = "float8_e4m3fn"
DTYPES = ("bfloat16", "float16", "float32", "int8", FP8)

# float32 sums of some hundred products of unit normals.
TOLERANCE = 2e-5
# The relative distance of two neighbours of a dtype, of which the rotation's last bit can make one the other; of int8
# that of its largest.
STEP = {"bfloat16": 2**-7, "float16": 2**-10, "float32": 2**-22, "int8": 2**-6, FP8: 2**-3}
# The absolute distance where numbers are subnormal.
SMALLEST_STEP = {FP8: 2**-9}
# Of a failed launch, depending on who waits for it.
REFUSAL = (jax.errors.JaxRuntimeError, ValueError)

native_attention = jax.jit(
    functools.partial(cached_attention, implementation="ffi"), static_argnames="window", donate_argnames="pages"
)
xla_attention = jax.jit(functools.partial(cached_attention, implementation="xla"), static_argnames="window")
xla_read = jax.jit(functools.partial(paged_attention, implementation="xla"), static_argnames="window")


@dataclass(frozen=True)
class Shape:
    """Each shape compiles programs of its own, so that there are few, chosen to be multiples of nothing."""

    batch: int
    seq: int
    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    table: int
    window: int | None = None


DECODE = (
    Shape(3, 1, 9, 3, 64, 16, 40),
    Shape(2, 1, 6, 2, 8, 4, 24, window=5),
    Shape(1, 1, 14, 2, 40, 6, 100, window=300),
    Shape(2, 1, 5, 5, 130, 7, 40),
)
PREFILL = (
    Shape(1, 100, 9, 3, 64, 16, 20),
    Shape(2, 32, 4, 1, 128, 16, 20, window=20),
    Shape(2, 7, 6, 2, 8, 4, 24, window=9),
    Shape(1, 45, 5, 5, 18, 7, 40),
)


class Call:
    """Random arguments: what lies before each row's start is visible, all behind it is what is no number."""

    def __init__(self, shape: Shape, dtype: str, starts: list[int], seed: int, scale: float = 1.0):
        rng = np.random.default_rng(seed)
        self.shape, self.dtype = shape, dtype
        pages = shape.batch * shape.table + 1
        per_head = (shape.batch, shape.seq, shape.kv_heads, shape.head_dim)
        self.q = scale * rng.standard_normal((*per_head[:2], shape.heads, shape.head_dim)).astype(np.float32)
        self.k, self.v = (rng.standard_normal(per_head).astype(np.float32) for _ in "kv")
        angles = rng.uniform(-3, 3, (*per_head[:2], shape.head_dim // 2)).astype(np.float32)
        self.cos, self.sin = np.cos(angles), np.sin(angles)
        self.table = (rng.permutation(pages - 1) + 1).reshape(shape.batch, shape.table).astype(np.int32)
        self.start = np.asarray(starts, np.int32)
        seen = np.zeros((pages, 1, shape.page_size), np.bool_)
        for row, start in enumerate(starts):
            position = np.arange(start)
            seen[self.table[row, position // shape.page_size], 0, position % shape.page_size] = True
        cache = (pages, shape.kv_heads, shape.page_size)
        if dtype == "int8":
            codes = [rng.integers(-127, 128, (*cache, shape.head_dim)).astype(np.int8) for _ in "kv"]
            scales = [np.where(seen, rng.uniform(0, 0.02, cache), np.nan).astype(np.float32) for _ in "kv"]
            self.pages = tuple(map(jnp.asarray, (*codes, *scales)))
        else:
            numbers = [rng.standard_normal((*cache, shape.head_dim)) for _ in "kv"]
            arrays = [np.asarray(np.where(seen[..., None], x, np.nan), dtype) for x in numbers]
            self.pages = tuple(jnp.asarray(x.view(np.uint8) if dtype == FP8 else x) for x in arrays)

    def run(self, attention=native_attention, **changed):
        arguments = ("q", "k", "v", "cos", "sin", "pages", "table", "start")
        values = [changed.get(name, getattr(self, name)) for name in arguments]
        # A copy, as the native call takes its cache with it.
        values[5] = tuple(jnp.array(x) for x in values[5])
        return attention(*values[:5], values[5], *map(jnp.asarray, values[6:]), window=self.shape.window)


def as_floats(held) -> np.ndarray:
    """What pages hold; of int8 the codes."""
    held = np.asarray(held)
    return (held.view(FP8) if held.dtype == np.uint8 else held).astype(np.float32)


def starts_of(shape: Shape, fractions: list[float]) -> list[int]:
    most = shape.table * shape.page_size - shape.seq
    # XLA writes whole pages where it can, from whole pages on.
    unit = shape.page_size if shape.seq % shape.page_size == 0 else 1
    return [int(most * fraction) // unit * unit for fraction in fractions[: shape.batch]]


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=30)
@given(
    shape=st.sampled_from(DECODE + PREFILL),
    dtype=st.sampled_from(DTYPES),
    fractions=st.lists(st.sampled_from([0.0, 0.01, 0.3, 0.62, 1.0]), min_size=3, max_size=3),
    seed=st.integers(0, 2**16),
)
def test_native_equals_xla(isa, shape, dtype, fractions, seed):
    call = Call(shape, dtype, starts_of(shape, fractions), seed)
    expected, expected_pages = call.run(xla_attention)
    with native.using_isa(isa):
        mixed, pages = call.run()
    np.testing.assert_allclose(mixed, expected, atol=max(TOLERANCE, STEP[dtype]), rtol=TOLERANCE)
    k, v, *scales = map(as_floats, pages)
    expected_k, expected_v, *expected_scales = map(as_floats, expected_pages)
    np.testing.assert_array_equal(v, expected_v)
    if dtype == "int8":
        np.testing.assert_allclose(k, expected_k, atol=1)
        np.testing.assert_array_equal(scales[1], expected_scales[1])
        np.testing.assert_allclose(scales[0], expected_scales[0], rtol=1e-6)
    else:
        np.testing.assert_allclose(k, expected_k, rtol=STEP[dtype], atol=SMALLEST_STEP.get(dtype, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [DECODE[0], PREFILL[0]], ids=["decode", "prefill"])
def test_of_the_same_cache_the_same_comes_out(shape, dtype):
    """What `test_native_equals_xla` can't see where a key's last bit differs: sums are those of float32."""
    call = Call(shape, dtype, starts_of(shape, [0.5, 0.1, 1.0]), seed=1)
    q, cos, sin, table, start = map(jnp.asarray, (call.q, call.cos, call.sin, call.table, call.start))
    for isa in ISAS:
        with native.using_isa(isa):
            mixed, pages = call.run()
        expected = xla_read(rotate(q, cos, sin), *pages[:2], table, start, scales=pages[2:] or None)
        np.testing.assert_allclose(mixed, expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", [DECODE[0], PREFILL[0]], ids=["decode", "prefill"])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8", FP8])
def test_scores_of_ten_thousand_choose_one_key(isa, shape, dtype):
    """The query's own key is the only one that points its way."""
    call = Call(shape, dtype, starts_of(shape, [0.5] * 3), seed=3)
    group = shape.heads // shape.kv_heads
    call.k = 4 * np.sign(call.k)
    call.q = np.repeat(call.k, group, axis=2) * 1e4 / (16 * np.sqrt(shape.head_dim))
    with native.using_isa(isa):
        mixed, pages = call.run()
    first = call.start[0]
    for i in (0, shape.seq - 1):
        page, offset = call.table[0, (first + i) // shape.page_size], (first + i) % shape.page_size
        value = as_floats(pages[1][page, :, offset])
        if dtype == "int8":
            value *= np.asarray(pages[3][page, :, offset])[:, None]
        np.testing.assert_allclose(mixed[0, i], np.repeat(value, group, axis=0), rtol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", [DECODE[0], PREFILL[0]], ids=["decode", "prefill"])
def test_equal_keys_of_large_scores_weigh_the_same(isa, shape):
    call = Call(shape, "float32", [0] * shape.batch, seed=4, scale=1e4)
    call.k[:] = 1
    call.cos[:], call.sin[:] = 1, 0
    call.start[:] = 0
    with native.using_isa(isa):
        mixed, _ = call.run()
    group = shape.heads // shape.kv_heads
    counts = np.arange(1, shape.seq + 1)[:, None, None]
    expected = np.repeat(np.cumsum(call.v, axis=1) / counts, group, axis=2)
    np.testing.assert_allclose(mixed, expected, atol=TOLERANCE)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", [DECODE[0], PREFILL[0]], ids=["decode", "prefill"])
@pytest.mark.parametrize("which", ["k", "v"])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8", FP8])
def test_what_is_no_number_is_not_dropped(isa, shape, which, dtype):
    call = Call(shape, dtype, starts_of(shape, [0.5] * 3), seed=5)
    getattr(call, which)[0, 0, 0, 3] = np.nan
    with native.using_isa(isa):
        mixed, _ = call.run()
    group = shape.heads // shape.kv_heads
    assert np.isnan(mixed[0, -1, :group]).any(axis=-1).all()
    assert not np.isnan(mixed[0, :, group:]).any()
    assert not np.isnan(mixed[1:]).any()


@pytest.mark.parametrize("value", [0.0, 1e-40, 1e-30, 3e38, np.inf])
def test_int8_of_numbers_at_the_ends_of_float32(value):
    call = Call(PREFILL[0], "int8", [5], seed=6)
    call.v[0, 50] = value
    call.v[0, 50, 0, :3] = 0
    (_, v, _, scales), (_, expected, _, expected_scales) = (call.run(f)[1] for f in (native_attention, xla_attention))
    np.testing.assert_array_equal(v, expected)
    # XLA may treat a subnormal number as zero.
    np.testing.assert_allclose(scales, expected_scales, atol=1e-38)


ALONE = (Shape(3, 1, 9, 3, 64, 16, 4, window=1), Shape(1, 45, 5, 5, 18, 7, 40, window=1))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", ALONE, ids=["decode", "prefill"])
@settings(max_examples=10)
@given(seed=st.integers(0, 2**32), spread=st.sampled_from([None, 1e-3, 1.0, 300.0]))
def test_fp8_has_the_codes_of_ml_dtypes_and_they_are_read_as_they_are(isa, shape, seed, spread):
    """A position that sees itself alone gives back its own value: random bits, or normal numbers, and all ties."""
    call = Call(shape, FP8, [0] * shape.batch, seed % 2**16)
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**32, call.v.shape, dtype=np.uint32)
    call.v = bits.view(np.float32) if spread is None else (spread * call.v).astype(np.float32)
    magnitudes = np.arange(127, dtype=np.uint8).view(FP8).astype(np.float32)
    special = np.concatenate([magnitudes, (magnitudes[1:] + magnitudes[:-1]) / 2, [0.0, 464.0, 1e-40, np.inf]])
    call.v.reshape(-1)[: special.size] = special * rng.choice([-1, 1], special.size)
    if shape.seq > 1:
        # Queries that are met together share a block of values, and what is no number is not silenced by a weight of 0.
        call.v[np.isnan(call.v)] = 1
    with native.using_isa(isa):
        mixed, pages = call.run()
    with np.errstate(invalid="ignore"):  # of what is no number
        expected = np.clip(call.v, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    position = np.arange(shape.seq)
    codes = np.asarray(pages[1])[call.table[:, position // shape.page_size], :, position % shape.page_size]
    np.testing.assert_array_equal(codes, expected.view(np.uint8))
    group = shape.heads // shape.kv_heads
    # A weight of about one, and its inverse.
    np.testing.assert_allclose(mixed, np.repeat(expected.astype(np.float32), group, axis=2), rtol=1e-6)


def test_company_and_threads_change_no_bit():
    shape = DECODE[0]
    call = Call(shape, "bfloat16", starts_of(shape, [0.1, 1.0, 0.7]), seed=7)
    long, _ = call.run()
    short, _ = call.run(start=np.asarray([call.start[0], 3, 0]))
    np.testing.assert_array_equal(long[0], short[0])
    prefill = Call(PREFILL[0], "bfloat16", [70], seed=8)
    many, _ = prefill.run()
    before = native.threads()
    native.set_threads(1)
    try:
        np.testing.assert_array_equal(call.run()[0], long)
        np.testing.assert_array_equal(prefill.run()[0], many)
    finally:
        native.set_threads(before)


def test_the_cache_is_updated_where_it_is():
    call = Call(DECODE[0], "bfloat16", [1, 2, 3], seed=9)
    pages = tuple(jnp.array(x) for x in call.pages)
    before = [x.unsafe_buffer_pointer() for x in pages]
    rest = map(jnp.asarray, (call.table, call.start))
    _, updated = native_attention(call.q, call.k, call.v, call.cos, call.sin, pages, *rest)
    assert [x.unsafe_buffer_pointer() for x in updated] == before


@pytest.mark.parametrize("shape", [DECODE[0], PREFILL[0]], ids=["decode", "prefill"])
def test_nothing_is_written_to_the_null_page_or_past_the_table(shape):
    call = Call(shape, "float32", [0] * shape.batch, seed=10)
    end = shape.table * shape.page_size
    call.start[:] = end - 1
    call.table[0] = 0
    pages = tuple(jnp.nan_to_num(x) for x in call.pages)
    mixed, updated = call.run(pages=pages)
    assert np.isfinite(mixed).all()
    changed = np.flatnonzero((np.asarray(updated[1]) != np.asarray(pages[1])).any(axis=(1, 2, 3)))
    assert changed.tolist() == sorted(call.table[1:, -1].tolist())
    mixed, updated = call.run(pages=pages, start=np.full(shape.batch, end + 1000))
    assert np.isfinite(mixed).all()
    for old, new in zip(pages, updated, strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"start": np.asarray([4, -3, 0])}, "row 1 starts at position -3; positions begin at 0"),
        ({"table": np.full((3, 40), 121)}, "row 0 of the page table names page 121; the cache has 121 pages"),
        ({"table": np.full((3, 40), -1)}, "names page -1"),
    ],
)
def test_positions_and_pages_that_do_not_exist_are_refused(changed, sentence):
    with pytest.raises(REFUSAL, match=sentence):
        jax.block_until_ready(Call(DECODE[0], "bfloat16", [0, 1, 2], seed=11).run(**changed))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("page", [-1, 2**31 - 1])
def test_pages_before_the_window_are_not_read(isa, page):
    """A scheduler may give them to somebody else, and leave whatever it likes in the table."""
    shape = Shape(batch=1, seq=16, heads=4, kv_heads=2, head_dim=8, page_size=16, table=15, window=8)
    call = Call(shape, "bfloat16", [208], seed=13)
    table = call.table.copy()
    table[0, : (208 - 8 + 1) // 16] = page
    with native.using_isa(isa):
        expected, _ = call.run()
        mixed, _ = call.run(table=table)
    np.testing.assert_array_equal(mixed, expected)
    assert np.isfinite(mixed).all()


@pytest.mark.parametrize("window", [0, -3, 5.0, True, 2**31])
def test_a_window_that_is_none_is_refused(window):
    call = Call(DECODE[0], "bfloat16", [0, 1, 2], seed=11)
    with pytest.raises((ValueError, TypeError), match="window"):
        cached_attention(
            *map(jnp.asarray, (call.q, call.k, call.v, call.cos, call.sin)), call.pages,
            jnp.asarray(call.table), jnp.asarray(call.start), window=window,
        )  # fmt: skip


def operands(**changed) -> list[np.ndarray]:
    """Of the FFI call itself, all right but for what is changed."""
    right = {
        "q": np.zeros((2, 3, 4, 8), np.float32),
        "k": np.zeros((2, 3, 2, 8), np.float32),
        "v": np.zeros((2, 3, 2, 8), np.float32),
        "cos": np.zeros((2, 3, 4), np.float32),
        "sin": np.zeros((2, 3, 4), np.float32),
        "page_table": np.zeros((2, 5), np.int32),
        "start": np.zeros(2, np.int32),
        "k_pages": np.zeros((9, 2, 4, 8), np.float32),
        "v_pages": np.zeros((9, 2, 4, 8), np.float32),
    }
    return [*{**right, **changed}.values()]


def call_directly(arrays: list[np.ndarray], aliased: bool = True, window: int = 0, out: tuple[int, ...] = (2, 3, 4, 8)):
    cache = range(7, len(arrays))
    results = [jax.ShapeDtypeStruct(out, np.float32)] + [
        jax.ShapeDtypeStruct(arrays[i].shape, arrays[i].dtype) for i in cache
    ]
    aliases = {i: i - 6 for i in cache} if aliased else {}
    call = jax.ffi.ffi_call("fusedllm_attention", results, input_output_aliases=aliases)
    return jax.block_until_ready(jax.jit(lambda *x: call(*x, window=np.int64(window)))(*arrays))


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"q": np.zeros((2, 3, 4, 8), np.float16)}, "must be float32"),
        ({"page_table": np.zeros((2, 5), np.int8)}, "must be int32"),
        ({"q": np.zeros((6, 4, 8), np.float32)}, "have four axes"),
        ({"q": np.zeros((2, 3, 4, 7), np.float32)}, "head_dim must be even"),
        ({"q": np.zeros((2, 3, 3, 8), np.float32)}, "heads must be a multiple of kv_heads"),
        ({"k": np.zeros((2, 3, 0, 8), np.float32)}, "heads must be a multiple of kv_heads"),
        ({"v": np.zeros((2, 3, 4, 8), np.float32)}, "k and v must be"),
        ({"cos": np.zeros((2, 3, 8), np.float32)}, "cos and sin must be"),
        ({"start": np.zeros(3, np.int32)}, "must have a row for each"),
        ({"k_pages": np.zeros((9, 2, 4, 8), np.int32)}, "must be bfloat16, float16, float32, int8, or"),
        ({"k_pages": np.zeros((9, 2, 4, 8), np.int8)}, "a cache of int8, and no other, has scales"),
        ({"v_pages": np.zeros((9, 2, 4, 8), np.float16)}, "of one dtype"),
        ({"k_pages": np.zeros((9, 2, 4, 8), np.uint8), "v_pages": np.zeros((9, 2, 4, 8), np.int8)}, "of one dtype"),
        ({"v_pages": np.zeros((9, 2, 8, 4), np.float32)}, "K and V must be"),
        ({"k_pages": np.zeros((9, 16, 4), np.float32)}, "pages have four axes"),
        ({"k_pages": np.zeros((0, 2, 4, 8), np.float32)}, "must have pages"),
        ({"more": np.zeros(1, np.float32)}, "two arrays, or four"),
        ({"k_scales": np.zeros((9, 2, 4), np.float32), "v_scales": np.zeros((9, 2, 4), np.float32)}, "has scales"),
        (
            {f"{x}_pages": np.zeros((9, 2, 4, 8), np.int8) for x in "kv"}
            | {f"{x}_scales": np.zeros((9, 2, 8), np.float32) for x in "kv"},
            "scales must be float32",
        ),
    ],
)
def test_the_binding_refuses_what_it_can_not_read(changed, sentence):
    with pytest.raises(REFUSAL, match=sentence):
        call_directly(operands(**changed))


def test_the_binding_refuses_results_that_do_not_fit():
    with pytest.raises(REFUSAL, match="the result must have q's shape"):
        call_directly(operands(), out=(2, 3, 4, 4))
    with pytest.raises(REFUSAL, match="updated in place"):
        call_directly(operands(), aliased=False)
    with pytest.raises(REFUSAL, match="a window is positive"):
        call_directly(operands(), window=-1)
    mixed, *_ = call_directly(operands())
    assert np.isfinite(mixed).all()


def test_an_empty_batch_is_no_error():
    empty = operands(
        q=np.zeros((0, 3, 4, 8), np.float32),
        **{name: np.zeros((0, 3, 2, 8), np.float32) for name in "kv"},
        **{name: np.zeros((0, 3, 4), np.float32) for name in ("cos", "sin")},
        page_table=np.zeros((0, 5), np.int32),
        start=np.zeros(0, np.int32),
    )
    mixed, *_ = call_directly(empty, out=(0, 3, 4, 8))
    assert mixed.shape == (0, 3, 4, 8)


def test_a_cache_that_native_can_not_read_is_left_to_xla_unless_asked_for():
    call = Call(DECODE[1], "float32", [3, 1], seed=12)
    pages = tuple(jnp.zeros(x.shape, "float8_e5m2") for x in call.pages)
    mixed, _ = call.run(jax.jit(cached_attention, static_argnames="window"), pages=pages)
    assert np.isfinite(mixed).all()
    with pytest.raises(ImplementationError, match=r"'ffi' reads caches of .*, int8, uint8; got float8_e5m2"):
        call.run(pages=pages)


@pytest.mark.parametrize("cache_dtype", DTYPES)
def test_a_model_runs_on_every_kind_of_cache(cache_dtype):
    params = random_params(TINY, "float32", seed=2)
    tokens = jnp.asarray([[5, 9, 17, 3, 88, 41, 7]])
    table = jnp.asarray([[3, 1]])

    def logits(dtype):
        cache = empty_cache(TINY, 4, 16, dtype)
        rows = []
        for part in (tokens[:, :5], tokens[:, 5:6], tokens[:, 6:]):
            start = jnp.asarray([sum(row.shape[1] for row in rows)])
            hidden, cache = forward(TINY, Plain(), params, cache, part, start, table, dtype="float32")
            rows.append(vocabulary_logits(Plain(), params, hidden))
        return np.concatenate(rows, axis=1)

    exact, rounded = logits("float32"), logits(cache_dtype)
    # Two layers, keys and values of about one rounded to 1/256 of it; of fp8 to 1/16.
    np.testing.assert_allclose(rounded, exact, atol=(0.1 if cache_dtype == FP8 else 0.02) * np.abs(exact).max())
