"""Pallas kernels of attention: interpreted on the CPU, lowered for GPUs, and run on one where it is."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from kernel_cases import HALF_STEP, lowered

from fusedllm.errors import ImplementationError
from fusedllm.kernels.attention import paged_attention
from fusedllm.kernels.attention_support import multiplied_in
from fusedllm.kernels.attention_tiles import Layout
from fusedllm.kernels.attention_triton import TILES, WIDE_TILES, attention_triton
from fusedllm.kernels.attention_triton import Plan as PrefillPlan
from fusedllm.kernels.cached_attention import cached_attention
from fusedllm.kernels.choose import traced_for
from fusedllm.kernels.decode_attention_triton import BLOCKS, WIDE_BLOCKS, decode_attention_triton
from fusedllm.kernels.decode_attention_triton import Plan as DecodePlan
from fusedllm.kernels.pallas_support import interpreting
from fusedllm.kernels.rotate import rotate
from fusedllm.kernels.rotate_and_write_triton import rotate_and_write_triton
from fusedllm.kernels.rotation_tiles import MOST_TOKENS_APART
from fusedllm.model.cache import empty_cache
from fusedllm.model.transformer import forward, vocabulary_logits
from fusedllm.partition.plain import Plain
from fusedllm.weights.random import random_params

# jax says so from 0.11 on, whatever the kernel.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")

FP8 = "float8_e4m3fn"
CACHES = ("bfloat16", "int8", FP8, "float16", "float32")
QUERIES = ("bfloat16", "float32", "float16")

# The relative distance of neighbours, of which a rotation's last bit can make one the other where a compiler fuses a
# product with a sum.
STEP = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "float32": 2.0**-22, "int8": 0, FP8: 2.0**-3}

attention = jax.jit(cached_attention, static_argnames=("window", "implementation"))


@dataclass(frozen=True)
class Case:
    """A call; tests need few shapes, as each compiles programs of its own."""

    starts: tuple[int, ...]
    seq: int = 1
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    page_size: int = 16
    table: int = 6
    window: int | None = None
    cache: str = "bfloat16"
    queries: str = "bfloat16"

    @property
    def batch(self):
        return len(self.starts)


# Starts at 0, inside of a page and at the table's end; groups of 1, 3, 4 and 8; heads and pages that are no power of
# two, and pages larger than a block of keys; one program for the keys of a head, and several; few tokens, and many.
DECODE = (
    Case((0, 37, 95), heads=8, kv_heads=8),
    Case((70, 5, 33), heads=6, kv_heads=2, head_dim=64, window=20),
    Case((2111, 300, 0, 1024), heads=4, kv_heads=1, page_size=64, table=33),
    Case((1400, 9), heads=8, kv_heads=1, head_dim=80, page_size=48, table=30),
    Case((2000, 1100), heads=2, kv_heads=1, page_size=16, table=140, window=1500),
    Case(tuple(range(0, 85, 5)), heads=3, kv_heads=1),
    Case((130, 128), heads=4, kv_heads=1, head_dim=128, page_size=128, table=2),
)
PREFILL = (
    Case((0, 37), seq=33, heads=8, kv_heads=2),
    Case((16, 0, 48), seq=16, heads=3, kv_heads=1, head_dim=64, window=20),
    Case((0,), seq=160, heads=4, kv_heads=4, head_dim=96, page_size=32, table=5),
    Case((60, 100), seq=75, heads=6, kv_heads=2, page_size=48, table=5, window=90),
    Case((3, 200), seq=5, heads=8, kv_heads=1, head_dim=128, page_size=8, table=30),
)


def with_dtypes(cases, queries=QUERIES):
    """Every cache and dtype of queries in turn, so that no two neighbours share one."""
    return [
        replace(case, cache=CACHES[(i + j) % len(CACHES)], queries=queries[(i + j) % len(queries)])
        for i, case in enumerate(cases)
        for j in ((0, 2) if i < 2 else (0,))
    ]


def name(case):
    shape = f"{case.starts}x{case.seq}-{case.heads}.{case.kv_heads}x{case.head_dim}-{case.window}"
    return f"{shape}-{case.cache}-{case.queries}".replace(" ", "")


class Call:
    """Random operands: what lies before each row's start is visible, all behind it is what is no number."""

    def __init__(self, case: Case, seed: int = 0, shared: int = 0):
        """The first `shared` pages of all rows are those of the first row."""
        rng = np.random.default_rng(seed)
        self.case = case
        per_head = (case.batch, case.seq, case.kv_heads, case.head_dim)
        shape = (*per_head[:2], case.heads, case.head_dim)
        self.q = jnp.asarray(2 * rng.standard_normal(shape), case.queries)
        self.k, self.v = (jnp.asarray(rng.standard_normal(per_head), case.queries) for _ in "kv")
        angles = rng.uniform(-3, 3, (*per_head[:2], case.head_dim // 2))
        self.cos, self.sin = (jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin))
        count = case.batch * case.table + 1
        self.table = (rng.permutation(count - 1) + 1).reshape(case.batch, case.table).astype(np.int32)
        self.table[:, :shared] = self.table[0, :shared]
        self.start = np.asarray(case.starts, np.int32)
        seen = np.zeros((count, 1, case.page_size), np.bool_)
        for row, start in enumerate(case.starts):
            position = np.arange(start)
            seen[self.table[row, position // case.page_size], 0, position % case.page_size] = True
        cache = (count, case.kv_heads, case.page_size)
        if case.cache == "int8":
            codes = [rng.integers(-127, 128, (*cache, case.head_dim)).astype(np.int8) for _ in "kv"]
            scales = [np.where(seen, rng.uniform(0, 0.02, cache), np.nan).astype(np.float32) for _ in "kv"]
            self.pages = tuple(map(jnp.asarray, (*codes, *scales)))
        else:
            numbers = [rng.standard_normal((*cache, case.head_dim)) for _ in "kv"]
            arrays = [np.asarray(np.where(seen[..., None], x, np.nan), case.cache) for x in numbers]
            self.pages = tuple(jnp.asarray(x.view(np.uint8) if case.cache == FP8 else x) for x in arrays)

    def operands(self):
        token = (self.q, self.k, self.v, self.cos, self.sin)
        return *token, self.pages, jnp.asarray(self.table), jnp.asarray(self.start)

    def run(self, implementation="triton"):
        mixed, pages = attention(*self.operands(), window=self.case.window, implementation=implementation)
        return np.asarray(mixed), [np.asarray(x) for x in pages]


def numbers(pages):
    """Keys and values that pages hold, float64."""
    k, v, *scales = pages
    held = [np.asarray(x.view(FP8) if x.dtype == np.uint8 else x, np.float64) for x in (k, v)]
    return [x * scale[..., None] for x, scale in zip(held, scales, strict=True)] if scales else held


def truth(call, q, pages):
    """Attention of rotated queries over `pages` in float64, and what it would be of the values' magnitudes."""
    case, (keys, values) = call.case, numbers(pages)
    mixed, sizes = np.zeros((2, case.batch, case.seq, case.heads, case.head_dim))
    group = case.heads // case.kv_heads
    for row, start in enumerate(call.start):
        for i in range(case.seq):
            end = start + i + 1
            position = np.arange(0 if case.window is None else max(0, end - case.window), end)
            page, offset = call.table[row, position // case.page_size], position % case.page_size
            for head in range(case.heads):
                scores = keys[page, head // group, offset] @ np.asarray(q[row, i, head], np.float64)
                weights = np.exp((scores - scores.max()) / np.sqrt(case.head_dim))
                weights /= weights.sum()
                seen = values[page, head // group, offset]
                mixed[row, i, head], sizes[row, i, head] = weights @ seen, weights @ np.abs(seen)
    return mixed, sizes


def check(call):
    """The kernels against XLA's, and both against the truth of what lies in the pages."""
    case = call.case
    mixed, pages = call.run()
    beside, beside_pages = call.run("xla")
    check_pages(case, pages, beside_pages)
    wanted, sizes = truth(call, rotate(call.q, call.cos, call.sin), pages)
    # Weights are rounded to the dtype of products, and the result to that of queries, of which a rotated element may
    # have another last bit. float32's scores are sums of as many products as a head has elements.
    wide = multiplied_in(case.queries, call.pages[0].dtype).name
    step = max(2 * HALF_STEP[case.queries] + HALF_STEP[wide], 2.0**-16)
    np.testing.assert_array_less(np.abs(mixed - wanted), step * sizes + 1e-9)
    # XLA rounds what pages of int8 hold to the dtype of products as well.
    np.testing.assert_array_less(np.abs(np.asarray(mixed, np.float64) - beside), 4 * step * sizes + 1e-9)


def check_pages(case, pages, wanted):
    """Everywhere but in the null page, where XLA writes too: values to the bit, rotated keys but for their last bit.

    Of int8 a GPU may divide by the scale in another last bit, which moves what lies between two codes.
    """
    for of, (found, other) in enumerate(zip(pages, wanted, strict=True)):
        if of % 2 == 1 and (found.dtype != np.int8 or jax.default_backend() == "cpu"):
            np.testing.assert_array_equal(raw(found)[1:], raw(other)[1:])
            continue
        step = STEP[case.cache if of < 2 else "float32"]
        numbers, others = (np.asarray(x.view(FP8) if x.dtype == np.uint8 else x, np.float32) for x in (found, other))
        # float8's step where numbers are subnormal, and what float32's last bit is of a difference of ones.
        atol = {"int8": 1, "uint8": 2.0**-9}.get(found.dtype.name, 1e-6)
        np.testing.assert_allclose(numbers[1:], others[1:], rtol=step, atol=atol)


def raw(array):
    return array.view(f"u{array.dtype.itemsize}")


@pytest.mark.parametrize("case", with_dtypes(DECODE), ids=name)
def test_a_new_token_is_written_and_attends_as_the_truth_says(case):
    with interpreting():
        check(Call(case))


@pytest.mark.parametrize("case", with_dtypes(PREFILL), ids=name)
def test_a_chunk_attends_as_the_truth_says(case):
    with interpreting():
        check(Call(case))


@pytest.mark.parametrize("case", [replace(DECODE[0], starts=(40, 37, 95)), replace(PREFILL[0], starts=(32, 47))])
def test_rows_share_the_pages_of_a_common_beginning(case):
    with interpreting():
        check(Call(case, shared=2))


def test_every_cache_is_read_with_every_dtype_of_queries():
    chosen = {(case.cache, case.queries) for case in with_dtypes(DECODE) + with_dtypes(PREFILL)}
    assert {cache for cache, _ in chosen} == set(CACHES)
    assert {queries for _, queries in chosen} == set(QUERIES)
    plans = [DecodePlan.of(case.batch, case.kv_heads, layout_of(Call(case))) for case in with_dtypes(DECODE)]
    assert {plan.splits == 1 for plan in plans} == {False, True}
    assert {case.batch * case.seq > MOST_TOKENS_APART for case in DECODE} == {False, True}
    assert {case.batch * case.seq > MOST_TOKENS_APART for case in PREFILL} == {False, True}


def layout_of(call):
    return Layout.of(call.q, call.pages, jnp.asarray(call.table), call.case.window)


@pytest.mark.parametrize("case", [DECODE[0], replace(PREFILL[0], table=6)], ids=["decode", "prefill"])
def test_rows_that_do_not_run_leave_no_trace(case):
    """Their table names the null page; and positions past a table's end belong to nobody."""
    call = Call(case)
    call.table[0] = 0
    call.start[0] = 0
    call.pages = tuple(jnp.nan_to_num(x) for x in call.pages)
    with interpreting():
        mixed, pages = call.run()
        beside, wanted = call.run("xla")
        check_pages(case, pages, wanted)
        assert np.isfinite(mixed.astype(np.float32)).all()
        np.testing.assert_allclose(mixed[1:], beside[1:], atol=2.0**-6)
        call.start[:] = case.table * case.page_size + 40
        mixed, pages = call.run()
    assert np.isfinite(mixed.astype(np.float32)).all()
    for old, new in zip(call.pages, pages, strict=True):
        np.testing.assert_array_equal(np.asarray(old), new)


@pytest.mark.parametrize("case", [DECODE[4], replace(PREFILL[3], page_size=16, table=15)], ids=["decode", "prefill"])
@pytest.mark.parametrize("page", [-1, 2**31 - 1])
def test_pages_before_the_window_are_not_read(case, page):
    """A scheduler may give them to somebody else, and leave whatever it likes in the table."""
    call = Call(case)
    with interpreting():
        wanted, _ = call.run()
        for row, start in enumerate(case.starts):
            call.table[row, : max(start - case.window + 1, 0) // case.page_size] = page
        mixed, _ = call.run()
    np.testing.assert_array_equal(raw(mixed), raw(wanted))


def test_company_changes_no_bit():
    case = DECODE[2]
    call, short = Call(case), Call(case)
    short.start[1:] = 3
    with interpreting():
        np.testing.assert_array_equal(raw(call.run()[0])[0], raw(short.run()[0])[0])


@pytest.mark.parametrize("case", [DECODE[1], PREFILL[1]], ids=["decode", "prefill"])
@pytest.mark.parametrize(("which", "cache"), [("k", "bfloat16"), ("v", "int8"), ("v", FP8)])
def test_what_is_no_number_is_not_dropped(case, which, cache):
    call = Call(replace(case, cache=cache, queries="float32"))
    setattr(call, which, getattr(call, which).at[0, 0, 0, 3].set(np.nan))
    with interpreting():
        mixed, pages = call.run()
        _, wanted = call.run("xla")
    group = case.heads // case.kv_heads
    assert np.isnan(mixed[0, 0, :group]).any(axis=-1).all()
    assert not np.isnan(mixed[0, :, group:]).any()
    assert not np.isnan(mixed[1:]).any()
    # A number's not being one has many bit patterns.
    for found, other in zip(numbers(pages), numbers(wanted), strict=True):
        np.testing.assert_array_equal(found[1:], other[1:])


@pytest.mark.parametrize("value", [0.0, 1e-40, 1e-30, 3e38, np.inf])
def test_int8_of_numbers_at_the_ends_of_float32(value):
    call = Call(replace(DECODE[0], cache="int8", queries="float32"))
    call.v = call.v.at[0].set(value).at[0, 0, 0, :3].set(0)
    with interpreting():
        _, (_, v, _, scales) = call.run()
        _, (_, wanted, _, wanted_scales) = call.run("xla")
    np.testing.assert_array_equal(v[1:], wanted[1:])
    # XLA may treat a subnormal number as zero.
    np.testing.assert_allclose(scales[1:], wanted_scales[1:], atol=1e-38)


@pytest.mark.parametrize("case", [DECODE[1], PREFILL[1]], ids=["decode", "prefill"])
def test_scores_of_ten_thousand_choose_one_key(case):
    """The query's own key is the only one that points its way."""
    call = Call(replace(case, window=None, cache="float32", queries="float32"))
    call.pages = tuple(jnp.nan_to_num(x) for x in call.pages)
    group = case.heads // case.kv_heads
    call.k = 4 * jnp.sign(call.k)
    call.q = jnp.repeat(call.k, group, axis=2) * 1e4 / (16 * np.sqrt(case.head_dim))
    with interpreting():
        mixed, _ = call.run()
    for i in (0, case.seq - 1):
        np.testing.assert_allclose(mixed[:, i], np.repeat(call.v[:, i], group, axis=1), rtol=1e-6)


def test_attention_alone_reads_one_query_and_many():
    for case in (replace(DECODE[0], cache="int8"), PREFILL[0]):
        call = Call(case)
        _, pages = call.run("xla")
        k, v, *scales = map(jnp.asarray, pages)
        operands = (call.q, k, v, jnp.asarray(call.table), jnp.asarray(call.start))
        with interpreting():
            mixed = paged_attention(*operands, scales=tuple(scales) or None, implementation="pallas")
        wanted, sizes = truth(call, call.q, pages)
        np.testing.assert_array_less(np.abs(mixed - wanted), 3 * HALF_STEP["bfloat16"] * sizes + 1e-9)


@pytest.mark.parametrize("window", [None, 5, 700, 3000])
@pytest.mark.parametrize("batch", [1, 8, 200])
@pytest.mark.parametrize("wide", ["bfloat16", "float32"])
def test_the_keys_of_a_row_are_divided_so_that_each_is_read_once(window, batch, wide):
    layout = Layout(4, 64, 16, 500, window, np.dtype(wide), scaled=False, native_float8=False)
    plan = DecodePlan.of(batch, 8, layout)
    for start in (0, 1, 15, 63, 64, 255, 256, 257, 5000, 7999, 8000):
        begin = int(layout.first_seen(start))
        ranges = [plan.range_of(split, begin, start) for split in range(plan.splits)]
        (used,) = {int(used) for *_, used in ranges}
        assert 1 <= used <= plan.splits
        blocks = [block for first, behind, _ in ranges[:used] for block in range(int(first), int(behind))]
        assert blocks == list(range(begin // plan.blocks.keys, -(-start // plan.blocks.keys)))
        # Nobody works who has nothing to do, but for the one that has the newest position.
        assert all(first < behind for first, behind, _ in ranges[1:used])


def test_every_row_of_the_tables_is_used_and_fits():
    plans = [
        (DecodePlan.of(1, 2, layout), PrefillPlan.of(1, seq, 2, layout))
        for head_dim in (16, 64, 80, 128, 256)
        for wide in ("bfloat16", "float32")
        for seq in (1, 3, 40, 1000)
        for group in (1, 3, 4, 8)
        for layout in [Layout(group, head_dim, 16, 9, None, np.dtype(wide), scaled=False, native_float8=False)]
        for prefill in [PrefillPlan.of(1, seq, 2, layout)]
        if prefill.queries * group <= prefill.rows and prefill.queries * prefill.grid[2] >= seq
    ]
    assert len(plans) == 5 * 2 * 4 * 4, "a plan that leaves queries out"
    assert {plan.blocks for plan, _ in plans} == {*BLOCKS, *WIDE_BLOCKS}
    assert {plan.tiles for _, plan in plans} == {*TILES, *WIDE_TILES}


REFUSED = (
    (replace(DECODE[0], head_dim=512), {}, "heads of 512 elements, where an even number up to 256"),
    (replace(DECODE[0], heads=128, kv_heads=1, head_dim=128), {}, "128 query heads of 128 elements share a KV head"),
    (
        DECODE[0],
        {"pages": "float8_e5m2"},
        "it reads caches of bfloat16, float16, float32, int8, uint8, got float8_e5m2",
    ),
    (
        replace(DECODE[0], cache=FP8),
        {"q": "float8_e4m3fn"},
        "it takes queries in bfloat16, float16, float32, got float8_e4m3fn",
    ),
)


@pytest.mark.parametrize(("case", "dtypes", "reason"), REFUSED, ids=[reason for *_, reason in REFUSED])
def test_what_the_kernels_can_not_take_is_refused_if_asked_for_and_left_to_xla_if_not(case, dtypes, reason):
    call = Call(replace(case, starts=(0,)))
    operands = list(call.operands())
    if "pages" in dtypes:
        operands[5] = tuple(x.astype(dtypes["pages"]) for x in operands[5])
    if "q" in dtypes:
        operands[0] = operands[0].astype(dtypes["q"])
    q, pages, table, start = operands[0], *operands[5:]
    with interpreting():
        for which, ask in (
            ("cached", lambda: cached_attention(*operands, implementation="pallas")),
            ("paged", lambda: paged_attention(q, *pages, table, start, implementation="triton")),
        ):
            with pytest.raises(ImplementationError, match=rf"{which}_attention: the .* can't run: {reason}"):
                ask()
    with traced_for("gpu", 8.0):
        assert "pallas_call" not in str(jax.make_jaxpr(lambda *x: cached_attention(*x))(*operands))


def test_a_byte_cache_that_offsets_do_not_reach_is_left_to_xla():
    def program(count, dtype):
        pages = (jax.ShapeDtypeStruct((count, 8, 16, 64), dtype),) * 2
        operands = [
            jax.ShapeDtypeStruct(x.shape, x.dtype)
            for x in Call(Case((0,), heads=8, kv_heads=8, head_dim=64)).operands()
            if not isinstance(x, tuple)
        ]
        with traced_for("gpu", 8.0):
            return str(jax.make_jaxpr(lambda *x: cached_attention(*x))(*operands[:5], pages, *operands[5:]))

    per_page = 8 * 16 * 64
    for size, reached in ((2**31, True), (2**31 + per_page, False), (2**32 + per_page, True)):
        assert ("pallas_call" in program(size // per_page, "uint8")) == reached
    assert "pallas_call" in program((2**31 + per_page) // per_page, "bfloat16")


@pytest.mark.parametrize("case", [DECODE[0], PREFILL[0]], ids=["decode", "prefill"])
def test_the_automatic_choice_on_a_gpu_is_a_kernel(case):
    operands = Call(case).operands()

    def program(capability):
        with traced_for("gpu", capability):
            return str(jax.make_jaxpr(lambda *x: cached_attention(*x))(*operands))

    # A chunk's keys and values are written by a kernel of their own.
    assert program(8.0).count("pallas_call") == (1 if case.seq == 1 else 2)
    assert "pallas_call" not in program(7.5)
    assert "pallas_call" not in str(jax.make_jaxpr(lambda *x: cached_attention(*x))(*operands))


def test_a_model_says_the_same_by_kernels():
    """Prefill and decode through the layers, with what a GPU would choose."""
    params = random_params(TINY, "float32", seed=2)
    tokens, table = jnp.asarray([[5, 9, 17, 3, 88, 41, 7]]), jnp.asarray([[3, 1]])

    def logits(placement):
        cache, rows = empty_cache(TINY, 4, 16, "float32"), []
        for part in (tokens[:, :5], tokens[:, 5:6], tokens[:, 6:]):
            start = jnp.asarray([sum(row.shape[1] for row in rows)])
            hidden, cache = forward(TINY, placement, params, cache, part, start, table, dtype="float32")
            rows.append(vocabulary_logits(placement, params, hidden))
        return np.concatenate(rows, axis=1)

    wanted = logits(Plain())
    with interpreting():
        found = logits(Plain(platform="gpu"))
    assert not np.array_equal(found, wanted), "the kernels did not run"
    # Two layers of float32's sums.
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("platform", ["cuda", "rocm"])
@pytest.mark.parametrize("case", with_dtypes(DECODE)[1:] + with_dtypes(PREFILL)[1:], ids=name)
def test_kernels_are_lowered_for_gpus(case, platform):
    """To Triton's language; a GPU's compiler is not asked."""
    call = Call(case)
    layout = replace(layout_of(call), native_float8=platform == "cuda")
    if case.seq == 1:
        plan = DecodePlan.of(case.batch, case.kv_heads, layout)
        operands, function, kernels = call.operands(), decode_attention_triton, 1 if plan.splits == 1 else 2
    else:
        q, *_, pages, table, start = call.operands()
        operands, function, kernels = (q, pages, table, start), attention_triton, 1
        writing = lowered(rotate_and_write_triton, *call.operands(), layout=layout, interpret=False, platform=platform)
        assert writing.count("__gpu$xla.gpu.triton") == 1
    program = lowered(function, *operands, layout=layout, interpret=False, platform=platform)
    assert program.count("__gpu$xla.gpu.triton") == kernels


EVERY_CACHE = [replace(case, cache=cache) for case in (DECODE[2], PREFILL[3]) for cache in CACHES]


@pytest.mark.gpu
@pytest.mark.parametrize("case", with_dtypes(DECODE) + with_dtypes(PREFILL) + EVERY_CACHE, ids=name)
def test_a_gpu_gives_the_same(case):
    check(Call(case))


@pytest.mark.gpu
def test_a_gpu_updates_the_cache_where_it_is():
    call = Call(DECODE[2])
    pages = tuple(jnp.array(x) for x in call.pages)
    before = [x.unsafe_buffer_pointer() for x in pages]
    step = jax.jit(functools.partial(cached_attention, implementation="triton"), donate_argnums=5)
    *token, _, table, start = call.operands()
    _, updated = step(*token, pages, table, start)
    assert [x.unsafe_buffer_pointer() for x in updated] == before
