"""The paged attention against float64 truth written the long way."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedllm.errors import ImplementationError
from fusedllm.kernels import attention
from fusedllm.kernels.write_pages import write_pages

paged_attention = jax.jit(attention.paged_attention, static_argnames=("window", "implementation"))

# float32 sums of some hundred products of unit normals.
TOLERANCE = 2e-5


def truth(q, k, v, start, window):
    """Softmax attention of one row in float64; `k` and `v` are [context, kv_heads, head_dim]."""
    seq, heads, head_dim = q.shape
    group = heads // k.shape[1]
    out = np.zeros((seq, heads, head_dim))
    for i in range(seq):
        position = start + i
        first = 0 if window is None else max(0, position - window + 1)
        for h in range(heads):
            keys = k[first : position + 1, h // group].astype(np.float64)
            scores = keys @ q[i, h].astype(np.float64) / np.sqrt(head_dim)
            weights = np.exp(scores - scores.max())
            out[i, h] = weights / weights.sum() @ v[first : position + 1, h // group].astype(np.float64)
    return out


def paged(rng, starts, seq, kv_heads, head_dim, page_size, table_entries):
    """Pages in random order, filled up to each row's last query, and rubbish elsewhere."""
    batch = len(starts)
    pages = batch * table_entries + 1
    table = (rng.permutation(pages - 1) + 1).reshape(batch, table_entries).astype(np.int32)
    k, v = (rng.standard_normal((pages, kv_heads, page_size, head_dim)).astype(np.float32) * 9 for _ in "kv")
    contexts = []
    for row, start in enumerate(starts):
        context = [rng.standard_normal((start + seq, kv_heads, head_dim)).astype(np.float32) for _ in "kv"]
        for position in range(start + seq):
            page, offset = table[row, position // page_size], position % page_size
            k[page, :, offset], v[page, :, offset] = context[0][position], context[1][position]
        contexts.append(context)
    return k, v, table, contexts


@settings(max_examples=40)
@given(
    starts=st.lists(st.integers(0, 60), min_size=1, max_size=3),
    seq=st.sampled_from([1, 3, 8, 33]),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 2), (3, 3)]),
    head_dim=st.sampled_from([2, 8, 16]),
    page_size=st.sampled_from([4, 16]),
    window=st.sampled_from([None, 1, 5, 40, 1000]),
    seed=st.integers(0, 2**16),
)
def test_attention_equals_float64_truth(starts, seq, heads, head_dim, page_size, window, seed):
    rng = np.random.default_rng(seed)
    heads, kv_heads = heads
    k, v, table, contexts = paged(rng, starts, seq, kv_heads, head_dim, page_size, 96 // page_size)
    q = rng.standard_normal((len(starts), seq, heads, head_dim)).astype(np.float32)
    out = paged_attention(*map(jnp.asarray, (q, k, v, table, np.asarray(starts, np.int32))), window=window)
    for row, start in enumerate(starts):
        expected = truth(q[row], *contexts[row], start, window)
        np.testing.assert_allclose(out[row], expected, atol=TOLERANCE)


def test_blocks_of_queries_and_keys_join_without_a_seam(monkeypatch):
    rng = np.random.default_rng(0)
    k, v, table, contexts = paged(rng, [21, 0], 50, 2, 8, 4, 24)
    q = rng.standard_normal((2, 50, 4, 8)).astype(np.float32)
    monkeypatch.setattr(attention, "QUERY_BLOCK", 16)
    monkeypatch.setattr(attention, "KEY_BLOCK", 12)
    out = attention.paged_attention(*map(jnp.asarray, (q, k, v, table, np.asarray([21, 0], np.int32))), window=17)
    for row, start in enumerate([21, 0]):
        np.testing.assert_allclose(out[row], truth(q[row], *contexts[row], start, 17), atol=TOLERANCE)


def test_a_longer_neighbour_changes_no_bit():
    rng = np.random.default_rng(1)
    k, v, table, _ = paged(rng, [5, 700], 1, 2, 8, 16, 64)
    q = rng.standard_normal((2, 1, 4, 8)).astype(np.float32)
    together = paged_attention(*map(jnp.asarray, (q, k, v, table, np.asarray([5, 700], np.int32))))
    with_short = paged_attention(*map(jnp.asarray, (q, k, v, table, np.asarray([5, 9], np.int32))))
    np.testing.assert_array_equal(together[0], with_short[0])


@pytest.mark.parametrize(("start", "seq"), [(0, 16), (32, 16), (5, 3), (30, 7), (0, 1)])
def test_written_values_lie_where_the_table_says(start, seq):
    rng = np.random.default_rng(2)
    pages = np.zeros((9, 2, 16, 4), np.float32)
    table = np.asarray([[3, 7, 1, 8]], np.int32)
    values = rng.standard_normal((1, seq, 2, 4)).astype(np.float32)
    out = np.asarray(write_pages(*map(jnp.asarray, (pages, values, table, np.asarray([start], np.int32)))))
    for i in range(seq):
        np.testing.assert_array_equal(out[table[0, (start + i) // 16], :, (start + i) % 16], values[0, i])
    assert np.count_nonzero(out) == values.size


def test_positions_past_the_table_reach_only_the_null_page():
    pages = np.zeros((5, 1, 16, 2), np.float32)
    values = np.ones((1, 32, 1, 2), np.float32)
    out = write_pages(*map(jnp.asarray, (pages, values, np.asarray([[4, 2]], np.int32), np.asarray([16], np.int32))))
    assert np.asarray(out).sum(axis=(1, 2, 3)).tolist() == [32, 0, 32, 0, 0]


def test_an_implementation_that_does_not_exist_is_refused_by_name():
    with pytest.raises(ImplementationError, match=r"has no implementation 'ffi'; it has: .*triton, xla"):
        paged_attention(
            jnp.zeros((1, 1, 1, 2)), jnp.zeros((2, 1, 4, 2)), jnp.zeros((2, 1, 4, 2)),
            jnp.zeros((1, 1), int), jnp.zeros(1, int), implementation="ffi",
        )  # fmt: skip
