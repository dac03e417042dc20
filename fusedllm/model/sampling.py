"""Sampling inside the program: penalties, filters and the draw, without a sort of the vocabulary.

Every filter is a threshold on the scaled logits, so a token stays exactly when its logit reaches all of them:

- top-k: the k-th largest logit; ties with it stay.
- top-p: a token stays while all strictly likelier tokens together hold less than `top_p` of what top-k left.
- min-p: `log(min_p)` below the largest.

The most likely `CANDIDATES` tokens decide that alone unless the least of them stays too; then, and for requests without
a filter, the thresholds are found exactly by bisection over the whole row.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from fusedllm.kernels.candidates import candidates

# XLA's CPU top_k of 64 takes 0.1 ms of a 49,152-token row, its sort 9 ms.
CANDIDATES = 64

# The row is summed in stretches of this many tokens before one token inside a stretch is chosen.
STRETCH = 256

# What `candidates` returns: values from zero down, ids, and the sum of the row's exponentials.
Likeliest = tuple[jax.Array, jax.Array, jax.Array]

# Steps of a bisection over the 2^32 ordered float32 values.
FLOAT_BITS = 32


@flax.struct.dataclass
class SamplingState:
    """The parameters of each slot, and what its penalties count. See `SamplingParams` for their meaning."""

    temperature: Float[Array, " batch"]
    top_k: Int[Array, " batch"]
    top_p: Float[Array, " batch"]
    min_p: Float[Array, " batch"]
    repetition_penalty: Float[Array, " batch"]
    presence_penalty: Float[Array, " batch"]
    frequency_penalty: Float[Array, " batch"]
    key: UInt32[Array, "batch 2"]
    # Unused entries carry a bias of 0.
    bias_ids: Int[Array, "batch biases"]
    bias_values: Float[Array, "batch biases"]
    in_prompt: Bool[Array, "batch vocab"]
    output_counts: Int[Array, "batch vocab"]


@flax.struct.dataclass
class Logprobs:
    """Natural logarithms of the model's own probabilities: of the chosen token, and of the most likely ones."""

    chosen: Float[Array, " batch"]
    top_ids: Int[Array, "batch top"]
    top: Float[Array, "batch top"]


def sample(
    logits: Float[Array, "batch vocab"],
    state: SamplingState,
    count: Int[Array, " batch"],
    *,
    implementation: str | None = None,
) -> Int[Array, " batch"]:
    """The next token of each row. `count` is how many tokens the request has generated before: with the request's key
    it alone decides the random number, so a request draws the same in any company.
    """
    adjusted = lax.cond(jnp.any(_has_adjustment(state)), lambda: adjust(logits, state), lambda: logits)
    likeliest = candidates(
        adjusted, state.temperature, min(CANDIDATES, logits.shape[-1]), implementation=implementation
    )
    greedy = likeliest[1][:, 0]
    return lax.cond(
        jnp.any(state.temperature > 0),
        lambda: jnp.where(state.temperature > 0, _draw(adjusted, likeliest, state, count), greedy),
        lambda: greedy,
    )


def adjust(logits: Float[Array, "batch vocab"], state: SamplingState) -> Float[Array, "batch vocab"]:
    """`logits` with the bias and the repetition, presence and frequency penalties of each row."""
    rows = jnp.arange(logits.shape[0])[:, None]
    logits = logits.at[rows, state.bias_ids].add(state.bias_values)
    seen = state.in_prompt | (state.output_counts > 0)
    penalty = state.repetition_penalty[:, None]
    penalized = jnp.where(logits > 0, logits / penalty, logits * penalty)
    logits = jnp.where(seen, penalized, logits)
    logits -= state.presence_penalty[:, None] * (state.output_counts > 0)
    return logits - state.frequency_penalty[:, None] * state.output_counts


def logprobs(logits: Float[Array, "batch vocab"], tokens: Int[Array, " batch"], top: int) -> Logprobs:
    """Log-probabilities of `tokens` and of the `top` most likely tokens under softmax of `logits`."""
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    values, ids = lax.top_k(logits, min(top, logits.shape[-1]))
    return Logprobs(chosen=chosen - normalizer, top_ids=ids, top=values - normalizer[:, None])


def _has_adjustment(state: SamplingState) -> Bool[Array, " batch"]:
    penalized = (state.repetition_penalty != 1) | (state.presence_penalty != 0) | (state.frequency_penalty != 0)
    return penalized | jnp.any(state.bias_values != 0, axis=-1)


def _draw(logits: jax.Array, likeliest: Likeliest, state: SamplingState, count: jax.Array) -> jax.Array:
    uniform = jax.vmap(_uniform)(state.key, count)
    token, complete = _draw_from_candidates(likeliest, logits.shape[-1], state, uniform)
    complete |= state.temperature <= 0
    rest = lax.cond(jnp.all(complete), lambda: token, lambda: _draw_from_row(_scaled(logits, state), state, uniform))
    return jnp.where(complete, token, rest)


def _scaled(logits: jax.Array, state: SamplingState) -> jax.Array:
    temperature = jnp.where(state.temperature > 0, state.temperature, 1.0)
    # From the largest down, so that the smallest temperature makes an infinity only of what can't be drawn.
    return (logits - logits.max(axis=-1, keepdims=True)) / temperature[:, None]


def _uniform(key: jax.Array, count: jax.Array) -> jax.Array:
    # Named, so that a seed means the same whatever generator jax is configured to use by default.
    return jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), count))


def _draw_from_candidates(
    likeliest: Likeliest, vocab: int, state: SamplingState, uniform: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The token drawn among the likeliest `CANDIDATES`, and whether no token beyond them would have stayed."""
    values, ids, whole = likeliest
    count = values.shape[-1]
    mass = jnp.exp(values - values[:, :1])
    in_top_k = (state.top_k > 0) & (state.top_k <= count)
    least = jnp.take_along_axis(values, jnp.clip(state.top_k - 1, 0, count - 1)[:, None], axis=-1)
    keep = ~in_top_k[:, None] | (values >= least)
    total = jnp.where(in_top_k, jnp.sum(mass * keep, axis=-1), whole)
    # Not a running sum: equal logits must share one fate.
    likelier = values[:, None, :] > values[:, :, None]
    mass_before = jnp.sum(likelier * mass[:, None, :], axis=-1)
    keep &= (state.top_p[:, None] >= 1) | (mass_before < (state.top_p * total)[:, None])
    keep &= values >= values[:, :1] + jnp.log(state.min_p)[:, None]
    # However small top_p is, the likeliest token stays.
    keep = keep.at[:, 0].set(True)
    outside_top_k = (state.top_k > count) & (state.top_k < vocab)
    complete = (vocab <= count) | (~keep[:, -1] & ~outside_top_k)
    cumulative = jnp.cumsum(mass * keep, axis=-1)
    chosen = jnp.sum(cumulative <= (uniform * cumulative[:, -1])[:, None], axis=-1)
    chosen = jnp.minimum(chosen, jnp.sum(keep, axis=-1) - 1)
    return jnp.take_along_axis(ids, chosen[:, None], axis=-1)[:, 0], complete


def _draw_from_row(scaled: jax.Array, state: SamplingState, uniform: jax.Array) -> jax.Array:
    """The token drawn from the whole row, its thresholds found by bisection where the request has a filter."""
    vocab = scaled.shape[-1]
    ordered = _ordered(scaled)
    highest = scaled.max(axis=-1, keepdims=True)
    mass = jnp.exp(scaled - highest)
    has_top_k = (state.top_k > 0) & (state.top_k < vocab)
    has_top_p = state.top_p < 1

    def reaches_k(threshold: jax.Array) -> jax.Array:
        return jnp.sum(ordered >= threshold[:, None], axis=-1) >= state.top_k

    by_k = jnp.where(has_top_k, _bisect(reaches_k, jnp.any(has_top_k), scaled.shape[0]), np.iinfo(np.int32).min)
    mass = jnp.where(ordered >= by_k[:, None], mass, 0.0)
    goal = state.top_p * mass.sum(axis=-1)

    def reaches_p(threshold: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(ordered >= threshold[:, None], mass, 0.0), axis=-1) >= goal

    by_p = jnp.where(has_top_p, _bisect(reaches_p, jnp.any(has_top_p), scaled.shape[0]), np.iinfo(np.int32).min)
    by_p = jnp.minimum(by_p, ordered.max(axis=-1))
    keep = (ordered >= by_p[:, None]) & (scaled >= highest + jnp.log(state.min_p)[:, None])
    return _inverse_cdf(jnp.where(keep, mass, 0.0), uniform)


def _bisect(reaches: Callable[[jax.Array], jax.Array], wanted: jax.Array, batch: int) -> jax.Array:
    """The largest int32 of each row that `reaches` accepts, which accepts the smallest; no work unless wanted."""

    def halve(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        # Half of the difference, without the overflow that `high - low` would have.
        middle = (low & high) + ((low ^ high) >> 1)
        middle = jnp.where(middle == low, high, middle)
        accepted = reaches(middle)
        return jnp.where(accepted, middle, low), jnp.where(accepted, high, middle - 1)

    smallest, largest = np.iinfo(np.int32).min, np.iinfo(np.int32).max
    initial = (jnp.full(batch, smallest, jnp.int32), jnp.full(batch, largest, jnp.int32))
    return lax.fori_loop(0, jnp.where(wanted, FLOAT_BITS + 1, 0), halve, initial)[0]


def _ordered(x: jax.Array) -> jax.Array:
    """int32 that orders as the float32 values of `x` do (the two zeros apart)."""
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def _inverse_cdf(mass: Float[Array, "batch vocab"], uniform: Float[Array, " batch"]) -> Int[Array, " batch"]:
    """The token at which the running sum of `mass` passes `uniform` of the whole; stretch first, then token."""
    batch, vocab = mass.shape
    stretches = jnp.pad(mass, ((0, 0), (0, -vocab % STRETCH))).reshape(batch, -1, STRETCH)
    sums = jnp.cumsum(stretches.sum(axis=-1), axis=-1)
    target = uniform * sums[:, -1]
    stretch = _first(sums > target[:, None], stretches.max(axis=-1) > 0)
    inside = jnp.take_along_axis(stretches, stretch[:, None, None], axis=1)[:, 0]
    before = jnp.where(stretch > 0, jnp.take_along_axis(sums, jnp.maximum(stretch - 1, 0)[:, None], axis=1)[:, 0], 0.0)
    token = _first(before[:, None] + jnp.cumsum(inside, axis=-1) > target[:, None], inside > 0)
    return (stretch * STRETCH + token).astype(jnp.int32)


def _first(passed: jax.Array, possible: jax.Array) -> jax.Array:
    """The first index that is passed and possible; where rounding leaves none, the last possible one."""
    size = possible.shape[-1]
    both = passed & possible
    last = size - 1 - jnp.argmax(possible[..., ::-1], axis=-1)
    return jnp.where(both.any(axis=-1), jnp.argmax(both, axis=-1), last).astype(jnp.int32)
