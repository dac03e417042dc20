"""`draw`: the next token of each row of logits, by temperature, top-k, top-p and min-p, without a sort of the row.

Every filter is a threshold on the scaled logits, so a token stays exactly when its logit reaches all of them:

- top-k: the k-th largest logit; ties with it stay.
- top-p: a token stays while all strictly likelier tokens together hold less than `top_p` of what top-k left.
- min-p: `log(min_p)` below the largest.

The most likely `CANDIDATES` tokens decide that alone unless the least of them stays too; then, and for requests without
a filter, the thresholds are found exactly in the whole row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from fusedllm.kernels.choose import choose

# XLA's CPU top_k of 64 takes 0.1 ms of a 49,152-token row, its sort 9 ms.
CANDIDATES = 64

# The row is summed in stretches of this many tokens before one token inside a stretch is chosen.
STRETCH = 256

# Steps of a bisection over the 2^32 ordered float32 values.
FLOAT_BITS = 32


# What is known of the rows when a program is made: nothing; that most of them draw; or that they draw without filters.
# A GPU asks the host which way a branch goes, so that one is worth more there than what it saves.
Work = Literal["any", "drawn", "unfiltered"]


class Filters(NamedTuple):
    """What each row is drawn with; see `fusedllm.config.SamplingParams`."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array


def draw(
    logits: Float[Array, "batch vocab"],
    temperature: Float[Array, " batch"],
    top_k: Int[Array, " batch"],
    top_p: Float[Array, " batch"],
    min_p: Float[Array, " batch"],
    uniform: Float[Array, " batch"],
    *,
    work: Work = "any",
    implementation: str | None = None,
) -> Int[Array, " batch"]:
    """The token that `uniform`, in [0, 1), picks from what the filters leave; with temperature 0 the likeliest.

    Of equal logits the lower id is the likelier one. Where the candidates decide, tokens are passed from the likeliest
    down, otherwise by id; the native implementation (`"ffi"`) does the same, with sums that may round differently.
    `work` is what the caller knows of the rows; the tokens are the same.

    Raises:
      ImplementationError: `implementation` names one that does not exist, or can't run here.
    """
    function = choose("draw", {"xla": _draw_xla, "ffi": _draw_ffi}, implementation)
    return function(logits, Filters(temperature, top_k, top_p, min_p), uniform, work)


def _draw_ffi(logits: jax.Array, filters: Filters, uniform: jax.Array, work: Work) -> jax.Array:
    del work
    call = jax.ffi.ffi_call("fusedllm_draw", jax.ShapeDtypeStruct((logits.shape[0],), jnp.int32))
    tokens: jax.Array = call(
        logits.astype(jnp.float32),
        filters.temperature.astype(jnp.float32),
        filters.top_k.astype(jnp.int32),
        filters.top_p.astype(jnp.float32),
        filters.min_p.astype(jnp.float32),
        uniform.astype(jnp.float32),
    )
    return tokens


def _draw_xla(logits: jax.Array, filters: Filters, uniform: jax.Array, work: Work) -> jax.Array:
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    is_greedy = filters.temperature <= 0

    def drawn() -> jax.Array:
        return jnp.where(is_greedy, greedy, _draw(logits, filters, uniform, work))

    return lax.cond(jnp.all(is_greedy), lambda: greedy, drawn) if work == "any" else drawn()


def _draw(logits: jax.Array, filters: Filters, uniform: jax.Array, work: Work) -> jax.Array:
    temperature = jnp.where(filters.temperature > 0, filters.temperature, 1.0)
    # From the largest down, so that the smallest temperature makes an infinity only of what can't be drawn.
    scaled = (logits - logits.max(axis=-1, keepdims=True)) / temperature[:, None]
    if work == "unfiltered" and scaled.shape[-1] > CANDIDATES:
        # No token is left out, so that the candidates would decide nothing; and the largest is 0.
        return _inverse_cdf(jnp.exp(scaled), uniform)
    token, complete = _draw_from_candidates(scaled, filters, uniform)
    complete |= filters.temperature <= 0
    rest = lax.cond(jnp.all(complete), lambda: token, lambda: _draw_from_row(scaled, filters, uniform))
    return jnp.where(complete, token, rest)


def _draw_from_candidates(scaled: jax.Array, filters: Filters, uniform: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The token drawn among the likeliest `CANDIDATES`, and whether no token beyond them would have stayed."""
    vocab = scaled.shape[-1]
    count = min(CANDIDATES, vocab)
    values, ids = lax.top_k(scaled, count)
    mass = jnp.exp(values - values[:, :1])
    whole = jnp.exp(jax.nn.logsumexp(scaled, axis=-1) - values[:, 0])
    in_top_k = (filters.top_k > 0) & (filters.top_k <= count)
    least = jnp.take_along_axis(values, jnp.clip(filters.top_k - 1, 0, count - 1)[:, None], axis=-1)
    keep = ~in_top_k[:, None] | (values >= least)
    total = jnp.where(in_top_k, jnp.sum(mass * keep, axis=-1), whole)
    # Not a running sum: equal logits must share one fate.
    likelier = values[:, None, :] > values[:, :, None]
    mass_before = jnp.sum(likelier * mass[:, None, :], axis=-1)
    keep &= (filters.top_p[:, None] >= 1) | (mass_before < (filters.top_p * total)[:, None])
    keep &= values >= values[:, :1] + jnp.log(filters.min_p)[:, None]
    # However small top_p is, the likeliest token stays.
    keep = keep.at[:, 0].set(True)
    outside_top_k = (filters.top_k > count) & (filters.top_k < vocab)
    complete = (vocab <= count) | (~keep[:, -1] & ~outside_top_k)
    cumulative = jnp.cumsum(mass * keep, axis=-1)
    chosen = jnp.sum(cumulative <= (uniform * cumulative[:, -1])[:, None], axis=-1)
    chosen = jnp.minimum(chosen, jnp.sum(keep, axis=-1) - 1)
    return jnp.take_along_axis(ids, chosen[:, None], axis=-1)[:, 0], complete


def _draw_from_row(scaled: jax.Array, filters: Filters, uniform: jax.Array) -> jax.Array:
    """The token drawn from the whole row, its thresholds found by bisection where the request has a filter."""
    vocab = scaled.shape[-1]
    ordered = _ordered(scaled)
    highest = scaled.max(axis=-1, keepdims=True)
    mass = jnp.exp(scaled - highest)
    has_top_k = (filters.top_k > 0) & (filters.top_k < vocab)
    has_top_p = filters.top_p < 1

    def reaches_k(threshold: jax.Array) -> jax.Array:
        return jnp.sum(ordered >= threshold[:, None], axis=-1) >= filters.top_k

    by_k = jnp.where(has_top_k, _bisect(reaches_k, jnp.any(has_top_k), scaled.shape[0]), np.iinfo(np.int32).min)
    mass = jnp.where(ordered >= by_k[:, None], mass, 0.0)
    goal = filters.top_p * mass.sum(axis=-1)

    def reaches_p(threshold: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(ordered >= threshold[:, None], mass, 0.0), axis=-1) >= goal

    by_p = jnp.where(has_top_p, _bisect(reaches_p, jnp.any(has_top_p), scaled.shape[0]), np.iinfo(np.int32).min)
    by_p = jnp.minimum(by_p, ordered.max(axis=-1))
    keep = (ordered >= by_p[:, None]) & (scaled >= highest + jnp.log(filters.min_p)[:, None])
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
    # Where logits are no numbers, nothing is passed or possible.
    return jnp.minimum(stretch * STRETCH + token, vocab - 1).astype(jnp.int32)


def _first(passed: jax.Array, possible: jax.Array) -> jax.Array:
    """The first index that is passed and possible; where rounding leaves none, the last possible one."""
    size = possible.shape[-1]
    both = passed & possible
    last = size - 1 - jnp.argmax(possible[..., ::-1], axis=-1)
    return jnp.where(both.any(axis=-1), jnp.argmax(both, axis=-1), last).astype(jnp.int32)
