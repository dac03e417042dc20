"""Sampling inside the program: penalties, the random number of each token, and log-probabilities.

`kernels/draw.py` has the filters and the draw itself.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from fusedllm.config import Sampler
from fusedllm.kernels.draw import Work, draw

# Below all logits, biases and penalties; finite, as draws scale it by the temperature and compare.
FORBIDDEN = -1e30


# What `draw` has to do for each.
_WORK: dict[Sampler, Work] = {Sampler.UNFILTERED: "unfiltered", Sampler.FILTERED: "drawn", Sampler.FULL: "any"}


@flax.struct.dataclass
class SamplingState:
    """The parameters of each slot. See `SamplingParams` for their meaning."""

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


@flax.struct.dataclass
class Seen:
    """What penalties count: whether a token is in the prompt of the request in a seat, and how often in its output."""

    in_prompt: Bool[Array, "seats vocab"]
    output_counts: Int[Array, "seats vocab"]

    def of(self, rows: Int[Array, " batch"]) -> Seen:
        """Those of the seats `rows`."""
        return jax.tree.map(lambda x: x[rows], self)


@flax.struct.dataclass
class Logprobs:
    """Natural logarithms of the model's own probabilities: of the chosen token, and of the most likely ones."""

    chosen: Float[Array, " batch"]
    top_ids: Int[Array, "batch top"]
    top: Float[Array, "batch top"]


def sample(
    logits: Float[Array, "batch vocab"],
    state: SamplingState,
    seen: Seen,
    rows: Int[Array, " batch"],
    count: Int[Array, " batch"],
    allowed: UInt32[Array, "batch words"],
    constrained: Bool[Array, " batch"],
    *,
    sampler: Sampler = Sampler.FULL,
    implementation: str | None = None,
) -> Int[Array, " batch"]:
    """The next token of each row, none of which asks for more than `sampler` has.

    `rows` are the seats of `seen` that belong to the rows. `count` is how many tokens the request has generated before:
    with the request's key it alone decides the random number, so a request draws the same in any company. Of a row
    that is `constrained`, only tokens whose bit is set in `allowed` (bit `t % 32` of word `t // 32`) are drawn.
    """
    if sampler < Sampler.FULL:
        uniform = jax.vmap(_uniform)(state.key, count)
        return _drawn(logits, state, uniform, sampler, implementation)
    adjusted = lax.cond(jnp.any(_has_adjustment(state)), lambda: adjust(logits, state, seen.of(rows)), lambda: logits)
    adjusted = lax.cond(jnp.any(constrained), lambda: forbid(adjusted, allowed, constrained), lambda: adjusted)
    uniform = lax.cond(
        jnp.any(state.temperature > 0),
        lambda: jax.vmap(_uniform)(state.key, count),
        lambda: jnp.zeros(logits.shape[0], jnp.float32),
    )
    return _drawn(adjusted, state, uniform, sampler, implementation)


def _drawn(
    logits: jax.Array, state: SamplingState, uniform: jax.Array, sampler: Sampler, implementation: str | None
) -> jax.Array:
    filters = (state.temperature, state.top_k, state.top_p, state.min_p)
    return draw(logits, *filters, uniform, work=_WORK[sampler], implementation=implementation)


def forbid(
    logits: Float[Array, "batch vocab"], allowed: UInt32[Array, "batch words"], constrained: Bool[Array, " batch"]
) -> Float[Array, "batch vocab"]:
    """`logits`, and `FORBIDDEN` where a constrained row does not allow the token."""
    tokens = jnp.arange(logits.shape[-1])
    bits = (allowed[:, tokens // 32] >> (tokens % 32).astype(jnp.uint32)) & 1
    return jnp.where(constrained[:, None] & (bits == 0), FORBIDDEN, logits)


def adjust(logits: Float[Array, "batch vocab"], state: SamplingState, seen: Seen) -> Float[Array, "batch vocab"]:
    """`logits` with the bias and the repetition, presence and frequency penalties of each row, `seen` being theirs."""
    rows = jnp.arange(logits.shape[0])[:, None]
    logits = logits.at[rows, state.bias_ids].add(state.bias_values)
    anywhere = seen.in_prompt | (seen.output_counts > 0)
    penalty = state.repetition_penalty[:, None]
    penalized = jnp.where(logits > 0, logits / penalty, logits * penalty)
    logits = jnp.where(anywhere, penalized, logits)
    logits -= state.presence_penalty[:, None] * (seen.output_counts > 0)
    return logits - state.frequency_penalty[:, None] * seen.output_counts


def logprobs(logits: Float[Array, "batch vocab"], tokens: Int[Array, " batch"], top: int) -> Logprobs:
    """Log-probabilities of `tokens` and of the `top` most likely tokens under softmax of `logits`."""
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    values, ids = lax.top_k(logits, min(top, logits.shape[-1]))
    return Logprobs(chosen=chosen - normalizer, top_ids=ids, top=values - normalizer[:, None])


def _has_adjustment(state: SamplingState) -> Bool[Array, " batch"]:
    penalized = (state.repetition_penalty != 1) | (state.presence_penalty != 0) | (state.frequency_penalty != 0)
    return penalized | jnp.any(state.bias_values != 0, axis=-1)


def _uniform(key: jax.Array, count: jax.Array) -> jax.Array:
    # Named, so that a seed means the same whatever generator jax is configured to use by default.
    return jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), count))
