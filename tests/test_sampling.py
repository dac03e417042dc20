"""The draw: filters against a plain NumPy definition, frequencies against probabilities, penalties by hand."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedllm.config import ModelConfig, Sampler, SamplingParams, sampling_from_keywords
from fusedllm.engine.slots import empty_seats
from fusedllm.errors import RequestError
from fusedllm.kernels import draw
from fusedllm.model import sampling
from fusedllm.model.sampling import SamplingState, Seen, adjust, logprobs


@jax.jit
def sample(logits, parameters, count, seen=None):
    """`sampling.sample` of rows in seats of the same number, without a grammar. Not traced anew for every example."""
    batch, vocab = logits.shape
    anything = jnp.zeros((batch, -(-vocab // 32)), jnp.uint32)
    return sampling.sample(
        logits, parameters, seen or unseen(vocab, batch), jnp.arange(batch), count, anything, jnp.zeros(batch, bool)
    )


@functools.partial(jax.jit, static_argnames="sampler")
def sample_by(logits, parameters, count, *, sampler):
    """`sample` by one of the samplers, and by XLA, whose work they change."""
    batch, vocab = logits.shape
    anything = jnp.zeros((batch, -(-vocab // 32)), jnp.uint32)
    return sampling.sample(
        logits, parameters, unseen(vocab, batch), jnp.arange(batch), count, anything, jnp.zeros(batch, bool),
        sampler=sampler, implementation="xla",
    )  # fmt: skip


draw_from_row = jax.jit(draw._draw_from_row)
draw_from_candidates = jax.jit(draw._draw_from_candidates)


def state(vocab, batch=1, **values) -> SamplingState:
    config = ModelConfig("llama", vocab, 8, 8, 1, 1, 1, 8, 16)
    made = empty_seats(config, batch, 1, 1).slots.sampling
    changes = {name: jnp.asarray(value, getattr(made, name).dtype) for name, value in values.items()}
    return made.replace(**changes)


def unseen(vocab, batch=1, **values) -> Seen:
    made = Seen(jnp.zeros((batch, vocab), bool), jnp.zeros((batch, vocab), jnp.int32))
    return made.replace(**{name: jnp.asarray(value, getattr(made, name).dtype) for name, value in values.items()})


def allowed(logits, temperature, top_k, top_p, min_p):
    """The tokens that may be drawn, in float64 and by sorting."""
    scaled = logits.astype(np.float64) / temperature
    keep = np.ones(len(logits), bool)
    if top_k:
        keep &= logits >= np.sort(logits)[::-1][min(top_k, len(logits)) - 1]
    mass = np.exp(scaled - scaled.max()) * keep
    before = np.asarray([mass[logits > own].sum() for own in logits])
    if top_p < 1:
        keep &= before < top_p * mass.sum()
    keep &= scaled >= scaled.max() + (np.log(min_p) if min_p else -np.inf)
    return keep


@settings(max_examples=60)
@given(
    vocab=st.sampled_from([5, 64, 65, 300, 1500]),
    spread=st.sampled_from([0.0, 0.01, 1.0, 8.0]),
    ties=st.booleans(),
    temperature=st.sampled_from([0.3, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 3, 63, 64, 65, 200]),
    top_p=st.sampled_from([1.0, 0.99, 0.9, 0.5, 1e-6]),
    min_p=st.sampled_from([0.0, 0.05, 0.9]),
    seed=st.integers(0, 2**16),
)
def test_only_tokens_that_pass_every_filter_are_drawn(vocab, spread, ties, temperature, top_k, top_p, min_p, seed):
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal(vocab) * spread).astype(np.float32)
    if ties:
        logits = np.round(logits)
    draws = 64
    parameters = state(
        vocab, draws,
        temperature=[temperature] * draws, top_k=[top_k] * draws, top_p=[top_p] * draws, min_p=[min_p] * draws,
        key=rng.integers(0, 2**32, (draws, 2), dtype=np.uint32),
    )  # fmt: skip
    tokens = np.asarray(sample(jnp.tile(logits, (draws, 1)), parameters, jnp.arange(draws)))
    # A token whose mass lies within rounding of the limit may fall to either side.
    generous = allowed(logits, temperature, top_k, min(top_p * (1 + 1e-4), 1), min_p * (1 - 1e-4))
    assert generous[tokens].all()


@pytest.mark.parametrize(
    "filters",
    [{}, {"top_k": 5}, {"top_p": 0.6}, {"top_k": 100}, {"top_p": 0.97}, {"min_p": 0.2}, {"top_k": 90, "top_p": 0.9}],
)
def test_frequencies_follow_the_filtered_distribution(filters):
    rng = np.random.default_rng(3)
    vocab, draws = 200, 40_000
    logits = rng.standard_normal(vocab).astype(np.float32)
    values = {name: [value] * draws for name, value in filters.items()}
    parameters = state(vocab, draws, temperature=[1.3] * draws, key=[[0, 7]] * draws, **values)
    tokens = np.asarray(sample(jnp.tile(logits, (draws, 1)), parameters, jnp.arange(draws)))
    keep = allowed(logits, 1.3, filters.get("top_k", 0), filters.get("top_p", 1.0), filters.get("min_p", 0.0))
    expected = np.exp(logits.astype(np.float64) / 1.3) * keep
    expected /= expected.sum()
    counts = np.bincount(tokens, minlength=vocab)
    assert counts[~keep].sum() == 0
    statistic = ((counts - draws * expected)[keep] ** 2 / (draws * expected[keep])).sum()
    freedom = keep.sum() - 1
    # Five standard deviations of a chi-square; the seed is fixed.
    assert statistic < freedom + 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("vocab", [40, 64, 65, 3000])
@given(seed=st.integers(0, 2**31), spread=st.sampled_from([0.1, 3.0, 30.0]))
@settings(max_examples=20)
def test_a_smaller_sampler_draws_what_the_full_one_draws(vocab, seed, spread):
    rng = np.random.default_rng(seed)
    rows = 8
    # With ties, and with rows that are greedy.
    logits = jnp.asarray(np.round(rng.standard_normal((rows, vocab)) * spread, 1), jnp.float32)
    temperature = rng.choice([0.0, 0.3, 1.0, 5.0], rows)
    keys = rng.integers(0, 2**32, (rows, 2))
    count = jnp.asarray(rng.integers(0, 100, rows), jnp.int32)
    plain = state(vocab, rows, temperature=temperature, key=keys)
    filtered = plain.replace(
        top_k=jnp.asarray(rng.choice([0, 1, 5, 70], rows), jnp.int32),
        top_p=jnp.asarray(rng.choice([0.1, 0.9, 1.0], rows), jnp.float32),
        min_p=jnp.asarray(rng.choice([0.0, 0.05], rows), jnp.float32),
    )
    for parameters, sampler in ((plain, Sampler.UNFILTERED), (plain, Sampler.FILTERED), (filtered, Sampler.FILTERED)):
        wanted = sample_by(logits, parameters, count, sampler=Sampler.FULL)
        np.testing.assert_array_equal(sample_by(logits, parameters, count, sampler=sampler), wanted)


@pytest.mark.parametrize(
    ("values", "constrained", "wanted"),
    [
        ({}, False, Sampler.UNFILTERED),
        ({"temperature": 1.0, "seed": 4}, False, Sampler.UNFILTERED),
        # Filters that no draw meets.
        ({"top_p": 0.5, "top_k": 3}, False, Sampler.UNFILTERED),
        ({"temperature": 1.0, "top_p": 0.5}, False, Sampler.FILTERED),
        ({"temperature": 1.0, "top_k": 5}, False, Sampler.FILTERED),
        ({"temperature": 1.0, "min_p": 0.5}, False, Sampler.FILTERED),
        ({"logprobs": 0}, False, Sampler.FULL),
        ({"logit_bias": {1: 2.0}}, False, Sampler.FULL),
        ({"frequency_penalty": 0.5}, False, Sampler.FULL),
        ({"repetition_penalty": 1.5}, False, Sampler.FULL),
        ({}, True, Sampler.FULL),
    ],
)
def test_the_sampler_of_a_request_has_what_it_asks_for(values, constrained, wanted):
    assert Sampler.of(SamplingParams(**values), constrained) is wanted


def test_zero_temperature_takes_the_first_of_the_largest():
    logits = jnp.asarray([[0.0, 3.0, 3.0, 1.0]])
    assert sample(logits, state(4), jnp.zeros(1, jnp.int32)).tolist() == [1]


@pytest.mark.parametrize("filters", [{"top_p": [1e-45]}, {"top_p": [1e-38]}, {"temperature": [1e-38]}])
def test_the_narrowest_filter_still_leaves_the_likeliest_token(filters):
    logits = jnp.asarray(np.random.default_rng(7).standard_normal((1, 300)), jnp.float32)
    parameters = state(300, **{"temperature": [1.0], **filters})
    assert sample(logits, parameters, jnp.zeros(1, jnp.int32)).tolist() == [int(logits.argmax())]


def test_a_row_draws_the_same_in_any_company():
    rng = np.random.default_rng(4)
    logits = jnp.asarray(rng.standard_normal((3, 500)), jnp.float32)
    filters = {"temperature": [1.0, 0.0, 1.0], "top_p": [0.5, 1.0, 1.0], "key": [[1, 2], [3, 4], [5, 6]]}
    together = sample(logits, state(500, 3, **filters), jnp.asarray([4, 5, 6]))
    for row in range(3):
        alone = state(500, 1, **{name: [values[row]] for name, values in filters.items()})
        assert sample(logits[row : row + 1], alone, jnp.asarray([4 + row])).tolist() == [int(together[row])]


def test_bisection_agrees_with_the_candidates_where_both_can_decide():
    rng = np.random.default_rng(5)
    logits = jnp.asarray(rng.standard_normal((1, 400)) * 4, jnp.float32)
    filters = {"temperature": [1.0], "top_k": [20], "top_p": [0.8], "min_p": [0.01]}
    made = state(400, **filters)
    filters = draw.Filters(made.temperature, made.top_k, made.top_p, made.min_p)

    def draw_fast(uniform):
        return draw_from_candidates(logits, filters, uniform)

    _, complete = draw_fast(jnp.asarray([0.5]))
    assert bool(complete[0])
    keep = allowed(np.asarray(logits[0]), 1.0, 20, 0.8, 0.01)
    grid = jnp.linspace(0, 1, 500, endpoint=False)
    slow = {int(draw_from_row(logits, filters, u[None])[0]) for u in grid}
    fast = {int(draw_fast(u[None])[0][0]) for u in grid}
    assert fast == slow == set(np.flatnonzero(keep))


def test_penalties_and_bias_are_what_their_definitions_say():
    logits = jnp.asarray([[2.0, -2.0, 1.0, 0.5, 0.0]])
    parameters = state(
        5, repetition_penalty=[2.0], presence_penalty=[0.25], frequency_penalty=[0.5],
        bias_ids=[[4] + [0] * 299], bias_values=[[7.0] + [0.0] * 299],
    )  # fmt: skip
    seen = unseen(5, in_prompt=[[True, True, False, False, False]], output_counts=[[0, 0, 3, 0, 0]])
    expected = [[1.0, -4.0, 0.5 - 0.25 - 1.5, 0.5, 7.0]]
    np.testing.assert_allclose(adjust(logits, parameters, seen), expected)


def test_penalties_are_those_of_the_seat_that_a_row_names():
    logits = jnp.asarray([[3.0, 2.0], [3.0, 2.0]])
    parameters = state(2, 2, repetition_penalty=[4.0, 4.0])
    seen = unseen(2, 3, in_prompt=[[True, False], [False, False], [False, False]])
    nothing = jnp.zeros((2, 1), jnp.uint32)
    drawn = sampling.sample(
        logits, parameters, seen, jnp.asarray([2, 0]), jnp.zeros(2, jnp.int32), nothing, jnp.zeros(2, bool)
    )
    assert drawn.tolist() == [0, 1]


@settings(max_examples=40)
@given(
    vocab=st.sampled_from([5, 32, 33, 700]),
    temperature=st.sampled_from([0.0, 0.01, 1.0, 50.0]),
    bias=st.sampled_from([0.0, 1e6]),
    seed=st.integers(0, 2**16),
)
def test_a_constrained_row_draws_what_its_mask_allows_and_another_as_ever(vocab, temperature, bias, seed):
    rng = np.random.default_rng(seed)
    allows = rng.random(vocab) < 0.2
    allows[rng.integers(vocab)] = True
    padded = np.zeros(-(-vocab // 32) * 32, bool)
    padded[:vocab] = allows
    words = np.packbits(padded, bitorder="little").view(np.uint32)
    logits = jnp.asarray(rng.standard_normal((2, vocab)) * 20, jnp.float32)
    forbidden = int(np.argmin(allows))
    parameters = state(
        vocab, 2, temperature=[temperature] * 2, key=rng.integers(0, 2**32, (2, 2), dtype=np.uint32),
        bias_ids=[[forbidden] + [0] * 299] * 2, bias_values=[[bias] + [0.0] * 299] * 2,
    )  # fmt: skip
    count = jnp.asarray([3, 4])
    drawn = sampling.sample(
        logits, parameters, unseen(vocab, 2), jnp.arange(2), count, jnp.asarray(np.tile(words, (2, 1))),
        jnp.asarray([True, False]),
    )  # fmt: skip
    assert allows[int(drawn[0])]
    assert int(drawn[1]) == int(sample(logits, parameters, count)[1])


def test_a_bias_can_forbid_and_force():
    logits = jnp.zeros((1, 50)).at[0, 3].set(9.0)
    ids = [[3, 8] + [0] * 298]
    forced = state(50, bias_ids=ids, bias_values=[[-100.0, 100.0] + [0.0] * 298])
    assert sample(logits, forced, jnp.zeros(1, jnp.int32)).tolist() == [8]


def test_logprobs_are_those_of_log_softmax():
    rng = np.random.default_rng(6)
    logits = rng.standard_normal((2, 300)).astype(np.float32) * 5
    wide = logits.astype(np.float64)
    expected = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    found = logprobs(jnp.asarray(logits), jnp.asarray([7, 9]), 4)
    # A float32 sum of 300 terms.
    np.testing.assert_allclose(found.chosen, expected[[0, 1], [7, 9]], atol=1e-5)
    np.testing.assert_allclose(found.top, -np.sort(-expected)[:, :4], atol=1e-5)
    np.testing.assert_array_equal(found.top_ids, np.argsort(-expected)[:, :4])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1), ("temperature", float("nan")), ("temperature", "hot"), ("top_p", 0), ("top_p", 1.5),
        ("top_k", -1), ("top_k", 1.5), ("min_p", 2), ("max_tokens", 0), ("max_tokens", True), ("seed", "x"),
        ("logprobs", 21), ("stop", [""]), ("stop", 3), ("stop_token_ids", ["a"]), ("stop_token_ids", range(17)),
        ("logit_bias", {"a": 1}), ("logit_bias", {1: float("inf")}), ("logit_bias", [1]), ("logit_bias", {1: 1e300}),
        ("logit_bias", {1.7: 1}), ("stop_token_ids", [True]),
        ("logit_bias", dict.fromkeys(range(301), 1.0)), ("repetition_penalty", 0), ("presence_penalty", 1e9),
    ],
)  # fmt: skip
def test_a_parameter_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(RequestError, match=name):
        SamplingParams(**{name: value})


def test_an_unknown_keyword_is_refused_with_the_known_ones():
    with pytest.raises(RequestError, match=r"'heat'.*temperature"):
        sampling_from_keywords(None, {"heat": 1})
    merged = sampling_from_keywords(SamplingParams(top_k=3), {"seed": 1})
    assert dataclasses.astuple(merged)[:3] == (0.0, 3, 1.0)
    assert merged.seed == 1
