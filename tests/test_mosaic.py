"""Mosaic GPU kernels: interpreted on the CPU, lowered for a Hopper that is not here, and run on one where it is."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import kernel_cases
import numpy as np
import pytest

from fusedllm.errors import ImplementationError
from fusedllm.kernels import mosaic_limits, pallas_support
from fusedllm.kernels.attention import paged_attention
from fusedllm.kernels.attention_mosaic import KEYS, Plan, _blocks, _visible, _whole_blocks, attention_mosaic
from fusedllm.kernels.cached_attention import cached_attention
from fusedllm.kernels.choose import traced_for
from fusedllm.kernels.dequantize import dequantize
from fusedllm.kernels.grouped import GroupedScheme
from fusedllm.kernels.linear import linear
from fusedllm.kernels.linear_mosaic import Plan as ProductPlan
from fusedllm.kernels.linear_mosaic import product_mosaic
from fusedllm.kernels.pallas_support import interpreting
from fusedllm.model.placement import Site
from fusedllm.partition.plain import Plain
from fusedllm.qarray import QuantArray
from fusedllm.quant.schemes import SCHEMES

# jax says so from 0.11 on, whatever the kernel.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")

# Half of the last bit's step, of a number just above a power of two.
HALF_STEP = {"bfloat16": 2.0**-8, "float16": 2.0**-11}

# How long a kernel may take in a process of its own before it hangs; compiling takes some seconds.
PATIENCE_S = 300

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Case:
    """Operands of an attention: positions that the table has but no query stands at hold what is no number."""

    seq: int
    starts: tuple[int, ...]
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 64
    page_size: int = 16
    table: int = 12
    window: int | None = None
    dtype: str = "bfloat16"


CASES = (
    # Queries of one tile; heads of a pair; a start inside of a page; a table that ends inside of a block.
    Case(64, (5,), table=9),
    # Rows of different lengths, tiles with empty queries, two kv heads.
    Case(70, (5, 100), heads=4, kv_heads=2),
    # More turns than stages, smallest pages.
    Case(65, (511,), page_size=8, table=72, dtype="float16"),
    # A window that begins and ends inside of blocks, and heads that are not divided among workers; one that leaves out
    # blocks.
    Case(130, (300,), heads=1, table=28, window=140),
    Case(64, (400,), table=30, window=40),
    # Pages larger than a block, wide heads, fewer turns than stages.
    Case(100, (200,), head_dim=128, page_size=256, table=2, dtype="float16"),
    # A chunk whose last queries are beyond the table.
    Case(100, (60,), table=8, heads=1),
)
# What interpretation would take too long for: more programs, more turns.
LARGE = (
    Case(1024, (0,), heads=32, kv_heads=8, table=64),
    Case(1000, (3, 77), heads=8, kv_heads=2, head_dim=128, page_size=64, table=20),
    Case(700, (2000,), heads=9, kv_heads=3, table=176, window=333),
    Case(512, (16000,), heads=32, kv_heads=8, page_size=32, table=520, dtype="float16"),
)


def operands(case: Case, seed: int = 0):
    rng = np.random.default_rng(seed)
    batch = len(case.starts)
    pages = batch * case.table + 1
    held = rng.standard_normal((2, pages, case.kv_heads, case.page_size, case.head_dim))
    table = 1 + rng.permutation(pages - 1).reshape(batch, case.table)
    for row, start in enumerate(case.starts):
        unwritten = np.arange(start + case.seq, case.table * case.page_size)
        held[:, table[row, unwritten // case.page_size], :, unwritten % case.page_size] = np.nan
    q = rng.standard_normal((batch, case.seq, case.heads, case.head_dim))
    dtype = jnp.dtype(case.dtype)
    return (
        jnp.asarray(q, dtype),
        *(jnp.asarray(x, dtype) for x in held),
        jnp.asarray(table, jnp.int32),
        jnp.asarray(case.starts, jnp.int32),
    )


def truth(case: Case, q, k_pages, v_pages, table, starts):
    """In float64: what comes out, and the sum of the magnitudes of what is added up for it."""
    q, k_pages, v_pages = (np.asarray(x, np.float64) for x in (q, k_pages, v_pages))
    out, magnitude = np.zeros(q.shape), np.zeros(q.shape)
    for row, start in enumerate(np.asarray(starts)):
        # [table, kv_heads, page_size, head_dim] -> [kv_heads, positions, head_dim]
        k, v = (
            x[np.asarray(table)[row]].swapaxes(0, 1).reshape(case.kv_heads, -1, case.head_dim)
            for x in (k_pages, v_pages)
        )
        for i in range(case.seq):
            position = start + i
            first = 0 if case.window is None else max(0, position - case.window + 1)
            if position >= k.shape[1]:
                continue
            seen = slice(first, position + 1)
            for head in range(case.heads):
                of = head // (case.heads // case.kv_heads)
                scores = k[of, seen] @ q[row, i, head] / np.sqrt(case.head_dim)
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                out[row, i, head] = weights @ v[of, seen]
                magnitude[row, i, head] = weights @ np.abs(v[of, seen])
    return out, magnitude


def check_attention(case: Case) -> None:
    given = operands(case)
    found = np.asarray(paged_attention(*given, window=case.window, implementation="mosaic"), np.float64)
    beside = np.asarray(paged_attention(*given, window=case.window, implementation="xla"), np.float64)
    wanted, magnitude = truth(case, *given)
    # Queries beyond the table belong to nobody, but must be numbers.
    assert np.isfinite(found).all()
    step = HALF_STEP[case.dtype]
    # A weight is rounded once, and the result; exponentials are approximate to a few of float32's last bits, for which
    # a rounding more is much. Scores of float32 are off by less than that too.
    slack = 1.1 * step * magnitude + 1.1 * step * np.abs(wanted)
    known = np.asarray(case.starts)[:, None] + np.arange(case.seq) < case.table * case.page_size
    assert (np.abs(found - wanted) <= slack)[known].all()
    # The twin rounds in the same places.
    assert (np.abs(found - beside) <= 2 * slack)[known].all()


@pytest.fixture(autouse=True)
def warpgroups_are_compiled_once(monkeypatch):
    """jax 0.10 compiles what it interprets again for each warpgroup and each program of the grid, and inside of a
    callback, where a compiler may wait for threads that wait for the callback.
    """
    if jax.__version_info__ >= (0, 11):
        return
    from jax._src.pallas.mosaic.interpret import thread_map

    call, compiled = thread_map._call_threadmap_callback, {}

    def compile_and_call(token, device, jaxpr, *others):
        def run(consts, *arguments):
            jax.core.eval_jaxpr(jaxpr, consts, *arguments)

        consts, arguments = (
            [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in vs] for vs in (jaxpr.constvars, jaxpr.invars)
        )
        program = jax.jit(run).trace(consts, *arguments).lower().compile({"xla_backend_optimization_level": 0})
        # With the jaxpr, whose id would else be another's.
        compiled[id(jaxpr)] = program, jaxpr
        return call(token, device, jaxpr, *others)

    monkeypatch.setattr(thread_map, "_call_threadmap_callback", compile_and_call)
    monkeypatch.setattr(thread_map, "_run_jaxpr", lambda jaxpr, *operands: compiled[id(jaxpr)][0](*operands))
    # What an earlier test traced was compiled for that test.
    jax.clear_caches()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_over_pages_is_that_of_the_truth_and_of_xla(case):
    with interpreting():
        check_attention(case)


def test_blocks_of_keys_hold_all_that_is_seen_and_whole_ones_nothing_else():
    rng = np.random.default_rng(0)
    for number in range(150):
        window = None if number % 3 == 0 else int(rng.integers(1, 500))
        case = Case(
            int(rng.integers(64, 300)), (), int(rng.integers(1, 4)), 1, page_size=16, table=int(rng.integers(1, 60))
        )
        shapes = [
            jax.ShapeDtypeStruct(s, jnp.bfloat16)
            for s in ((1, case.seq, case.heads, 64), (9, 1, 16, 64), (1, case.table))
        ]
        plan = Plan.of(*shapes, window)
        begin, tile = np.int32(rng.integers(0, case.table * 16)), int(rng.integers(plan.tiles))
        first, end = map(int, _blocks(plan, begin, np.int32(tile * plan.queries)))
        queries = begin + tile * plan.queries + np.arange(plan.queries)
        keys = np.arange((2 + max(end, (begin + case.seq) // KEYS)) * KEYS)
        seen = (keys <= queries[:, None]) & (keys < plan.capacity)
        if window is not None:
            seen &= keys > queries[:, None] - window
        real = queries < begin + case.seq
        needed = np.flatnonzero(seen[real].any(0))
        assert needed.size == 0 or first <= needed[0] // KEYS <= needed[-1] // KEYS < end
        # What is cleared, because nobody wrote it, is never followed by another block.
        assert (end - 1) * KEYS < begin + case.seq
        for worker in range(plan.queries // 64):
            rows = slice(worker * 64, worker * 64 + 64)
            whole_from, whole_to = map(int, _whole_blocks(plan, queries[rows][0]))
            for block in range(first, end):
                columns = slice(block * KEYS, (block + 1) * KEYS)
                if whole_from <= block < whole_to:
                    assert seen[rows, columns].all()
                found = np.asarray(_visible(plan, queries[rows][0], np.int32(block * KEYS), True))
                np.testing.assert_array_equal(found, seen[rows, columns])


def test_a_cache_is_written_and_attended_to():
    # A chunk begins with a page.
    case = Case(64, (64,), heads=2, table=9)
    q, k_pages, v_pages, table, starts = operands(case)
    k, v = (operands(case, seed)[0][:, :, :1] for seed in (1, 2))
    angles = np.outer(np.arange(64, 128), 10.0 ** -np.arange(0, 4, 4 / 32))[None]
    given = (q, k, v, jnp.cos(angles), jnp.sin(angles), (k_pages, v_pages), table, starts)
    with interpreting():
        found, pages = cached_attention(*given, implementation="mosaic")
        _, wanted_pages = cached_attention(*given, implementation="triton")
    wanted, _ = cached_attention(*given, implementation="xla")
    for held, beside in zip(pages, wanted_pages, strict=True):
        np.testing.assert_array_equal(np.float32(held), np.float32(beside))
    # Weights and values of magnitudes about one, rounded to bfloat16 on both sides.
    np.testing.assert_allclose(np.float32(found), np.float32(wanted), atol=0.03)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": "float32"}, "takes queries and caches in one of bfloat16, float16, got float32 and float32"),
        ({"head_dim": 96}, "heads of 96 elements, where 64 or 128"),
        ({"page_size": 24}, "pages of 24 positions, where a power of two from 8 on or a multiple of 128"),
        ({"page_size": 4, "table": 40}, "pages of 4 positions"),
        ({"seq": 1}, "for prefills of 64 positions or more, got 1"),
    ],
)
def test_what_mosaic_can_not_take_is_refused_if_asked_for_and_left_to_triton_if_not(change, reason):
    case = Case(**({"seq": 64, "starts": (5,)} | change))
    q, k_pages, v_pages, table, starts = operands(case)
    with interpreting(), pytest.raises(ImplementationError, match=f"paged_attention.* 'mosaic' can't run: .*{reason}"):
        paged_attention(q, k_pages, v_pages, table, starts, implementation="mosaic")
    half = jnp.zeros((1, case.seq, case.head_dim // 2))
    new = q[:, :, :1]
    with interpreting(), pytest.raises(ImplementationError, match=f"cached_attention.* 'mosaic' can't run: .*{reason}"):
        cached_attention(q, new, new, half, half, (k_pages, v_pages), table, starts, implementation="mosaic")
    with pallas_support.automatic_mosaic("paged_attention"):
        program = lowered(lambda *x: paged_attention(*x), q, k_pages, v_pages, table, starts)
    assert "gpu.triton" in program
    assert "@mosaic_gpu" not in program


# One of each way to multiply: a scale a row or a group, one or two codes a byte, zero points or none, turns of 64 and
# of 128 columns, groups of several turns.
MULTIPLIED = (
    (GroupedScheme("int8", 8), 512, "bfloat16"),
    (GroupedScheme("int8-g64-asym", 8, 64, symmetric=False), 384, "float16"),
    (GroupedScheme("int4-g64", 4, 64, symmetric=False), 384, "bfloat16"),
    (GroupedScheme("int4-g128-sym", 4, 128), 512, "float16"),
    (GroupedScheme("int4-g256", 4, 256, symmetric=False), 896, "float16"),
)
SCHEME_NAMES = ("int8", "int8-g64", "int8-g128", "int4-g64", "int4-g128", "int4-g64-sym", "int4-g128-sym")
# Of llama-1b: k and v, q and o, gate and up, down.
WEIGHTS = ((512, 2048), (2048, 2048), (8192, 2048), (2048, 8192))


def random_codes(scheme, shape, seed):
    """Any bytes, as a quantizer need not make them, with scales of both signs and zero points between codes."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 256, (shape[0], scheme.row_bytes(shape[1]))).astype(np.uint8)
    grid = (shape[0], scheme.groups(shape[1]))
    scales = (rng.uniform(0.5, 1, grid) * rng.choice([-0.01, 0.01], grid)).astype(np.float16)
    zeros = None if scheme.symmetric else jnp.asarray(rng.uniform(0, scheme.highest, grid).astype(np.float16))
    return QuantArray(jnp.asarray(values), jnp.asarray(scales), zeros, scheme, shape)


def check_product(scheme, shape, tokens, dtype):
    weight = random_codes(scheme, shape, shape[1])
    x = jnp.asarray(np.random.default_rng(tokens).standard_normal((tokens, shape[1])), dtype)
    found, beside = (np.float64(linear(x, weight, implementation=how)[0]) for how in ("mosaic", "xla"))
    activations, decoded = np.float64(x), np.float64(dequantize(weight, implementation="xla"))
    wanted, magnitudes = activations @ decoded.T, np.abs(activations) @ np.abs(decoded).T
    # float32 sums round as often as there are columns, in random directions; the result is rounded once.
    step = HALF_STEP[dtype]
    slack = 2 * np.sqrt(shape[1]) * 2.0**-24 * magnitudes + 1.01 * step * np.abs(wanted)
    if not scheme.symmetric:
        # A code less a zero point between codes is rounded, as in XLA's product the weight is.
        slack = slack + step * magnitudes
    assert (np.abs(found - wanted) <= slack).all()
    assert (np.abs(found - beside) <= 2 * slack + step * magnitudes).all()


@pytest.mark.parametrize(("scheme", "width", "dtype"), MULTIPLIED, ids=str)
def test_products_are_those_of_the_decoded_weights(scheme, width, dtype):
    with interpreting():
        check_product(scheme, (128, width), 130, dtype)


def test_a_program_of_many_rows_multiplies_two_blocks_of_them(monkeypatch):
    monkeypatch.setattr("fusedllm.kernels.linear_mosaic.PROGRAMS", 1)
    with interpreting():
        check_product(GroupedScheme("int4-g64", 4, 64, symmetric=False), (256, 128), 128, "bfloat16")
    jax.clear_caches()


def test_a_product_is_cut_so_that_every_column_is_multiplied_once():
    for name in SCHEME_NAMES:
        for tokens in (128, 129, 1024, 5000):
            for shape in WEIGHTS:
                plan = ProductPlan.of(tokens, shape, SCHEMES[name])
                assert plan.turns * plan.depth == shape[1]
                assert plan.rows * plan.height == shape[0]
                assert plan.tokens * 128 >= tokens
                assert plan.each * plan.depth == SCHEMES[name].group_size
                assert 2 <= plan.stages <= plan.turns
                assert plan.parts == 1 or plan.rows * plan.tokens >= 132


@pytest.mark.parametrize(
    ("scheme", "shape", "tokens", "dtype", "out", "reason"),
    [
        ("int3-g64", (128, 128), 128, "bfloat16", None, "integers of four or eight bits, got int3-g64"),
        ("w8a8", (128, 128), 128, "bfloat16", None, "integers of four or eight bits, got w8a8"),
        ("fp8", (128, 128), 128, "bfloat16", None, "integers of four or eight bits, got fp8"),
        ("int8", (128, 128), 128, "float32", None, "in bfloat16, float16, got float32 and float32"),
        ("int8", (128, 128), 128, "bfloat16", "float32", "in bfloat16, float16, got bfloat16 and float32"),
        ("int4-g32", (128, 128), 128, "bfloat16", None, "groups of 32 weights, where 64 or a multiple of 128"),
        ("int8", (96, 128), 128, "bfloat16", None, "a weight of 96 x 128, where multiples of 128 and of 128"),
        ("int4-g64", (128, 96), 128, "bfloat16", None, "a weight of 128 x 96, where multiples of 128 and of 64"),
        ("int8", (128, 128), 127, "bfloat16", None, "for 128 tokens or more, got 127"),
    ],
)
def test_products_that_mosaic_can_not_make_are_refused_or_left_to_triton(scheme, shape, tokens, dtype, out, reason):
    weight = random_codes(SCHEMES[scheme], shape, 0)
    x = jnp.ones((tokens, shape[1]), dtype)
    with interpreting(), pytest.raises(ImplementationError, match=f"linear: the implementation 'mosaic'.*{reason}"):
        linear(x, weight, out_dtype=out, implementation="mosaic")
    with pallas_support.automatic_mosaic("linear"):
        program = lowered(lambda x, weight: linear(x, weight, out_dtype=out)[0], x, weight)
    assert "gpu.triton" in program
    assert "@mosaic_gpu" not in program


def test_weights_of_one_call_go_to_the_kernels_that_take_them():
    weights = [random_codes(SCHEMES[name], (128, 128), 0) for name in ("int8", "int3-g64")]
    with pallas_support.automatic_mosaic("linear"):
        program = lowered(lambda x, *weights: linear(x, *weights), jnp.ones((1, 128, 128), jnp.bfloat16), *weights)
    assert program.count("custom_call @mosaic_gpu") == program.count("gpu.triton") == 1


@pytest.mark.parametrize(
    ("name", "shape"),
    [("int8", shape) for shape in WEIGHTS] + [(name, WEIGHTS[2]) for name in SCHEME_NAMES if name != "int8"],
    ids=str,
)
def test_products_are_lowered_for_a_hopper(name, shape):
    weight = jax.eval_shape(lambda: random_codes(SCHEMES[name], shape, 0))
    x = jax.ShapeDtypeStruct((1024, shape[1]), jnp.bfloat16)
    program = lowered(lambda x, weight: product_mosaic(x, weight, np.dtype(jnp.bfloat16), False), x, weight)
    assert program.count("custom_call @mosaic_gpu") == 1


def lowered(function, *arguments):
    """The program for an H200 that is not here."""
    with traced_for("gpu", 9.0):
        return kernel_cases.lowered(jax.jit(function), *arguments)


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_attention_is_lowered_for_a_hopper(case):
    """To instructions of NVIDIA's compiler, which is not asked."""
    given = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands(case)]
    program = lowered(lambda *x: attention_mosaic(*x, case.window, False), *given)
    assert program.count("custom_call @mosaic_gpu") == 1


def test_attention_is_mosaics_where_it_is_automatic_or_asked_for():
    given = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands(LARGE[0])]
    asked = lowered(lambda *x: paged_attention(*x, implementation="mosaic"), *given)
    with pallas_support.automatic_mosaic("paged_attention"):
        automatic = lowered(lambda *x: paged_attention(*x), *given)
    for program in (asked, automatic):
        assert "custom_call @mosaic_gpu" in program
        assert "triton" not in program
    assert "triton" in lowered(lambda *x: paged_attention(*x), *given)


@pytest.mark.parametrize("way", ["triton", "mosaic", "pallas", None])
def test_a_model_prefers_a_way_where_there_are_two(way):
    """Where there is one, or none, it takes what there is."""
    x = jax.ShapeDtypeStruct((256, 512), jnp.bfloat16)
    many = jax.eval_shape(lambda: random_codes(GroupedScheme("int4-g64-sym", 4, 64), (128, 512), 0))
    integers = jax.eval_shape(lambda: random_codes(SCHEMES["w8a8"], (128, 512), 0))
    plain = jax.ShapeDtypeStruct((128, 512), jnp.bfloat16)

    def program(weight):
        return lowered(lambda x, weight: Plain(way=way).linear(Site("o"), x, (weight,)), x, weight)

    assert ("mosaic_gpu" in program(many)) == (way == "mosaic")
    assert ("gpu.triton" in program(many)) == (way != "mosaic")
    assert "gpu.triton" in program(integers)
    assert "stablehlo.dot" in program(plain)
    with pallas_support.automatic_mosaic("linear"):
        assert ("mosaic_gpu" in program(many)) == (way != "triton")


@pytest.mark.parametrize(
    ("version", "refused"), [(12070, False), (12080, True), (12090, True), (12091, False), (13000, False)]
)
def test_a_compiler_that_is_wrong_about_masks_is_refused(monkeypatch, version, refused):
    versions = type("Versions", (), {"cuda_runtime_get_version": staticmethod(lambda: version)})
    monkeypatch.setattr("jax._src.lib.cuda_versions", versions)
    q, k_pages, v_pages, *_ = operands(CASES[0])
    reason = mosaic_limits.why_not_attention_mosaic(q, (k_pages, v_pages))
    assert (reason is not None) == refused
    assert not refused or "12.9.1 is needed" in reason


@pytest.fixture(scope="module")
def hopper():
    """A GPU on which the kernels do not hang: each has run in a process that could be ended."""
    if (reason := pallas_support.why_not_on(jax.default_backend(), "mosaic")) is not None:
        pytest.skip(reason)
    # The package need not be installed.
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONPATH": os.pathsep.join(paths)}
    subprocess.run([sys.executable, __file__], check=True, timeout=PATIENCE_S, env=environment)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES + LARGE, ids=str)
def test_a_hopper_gives_the_same_attention(hopper, case):
    check_attention(case)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(128, 896), *WEIGHTS], ids=str)
@pytest.mark.parametrize("name", SCHEME_NAMES)
def test_a_hopper_gives_the_same_products(hopper, name, shape):
    for tokens, dtype in ((130, "float16"), (1024, "bfloat16")):
        check_product(SCHEMES[name], shape, tokens, dtype)


if __name__ == "__main__":
    check_attention(CASES[0])
    check_product(SCHEMES["int4-g64"], (256, 512), 256, "bfloat16")
    check_product(SCHEMES["int8"], (256, 512), 256, "bfloat16")
