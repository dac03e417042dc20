"""Sampling inside the program: penalties, the random number of each token, and log-probabilities.

`kernels/draw.py` has the filters and the draw itself.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from fusedllm.kernels.draw import draw


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
    uniform = lax.cond(
        jnp.any(state.temperature > 0),
        lambda: jax.vmap(_uniform)(state.key, count),
        lambda: jnp.zeros(logits.shape[0], jnp.float32),
    )
    return draw(
        adjusted, state.temperature, state.top_k, state.top_p, state.min_p, uniform, implementation=implementation
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


def _uniform(key: jax.Array, count: jax.Array) -> jax.Array:
    # Named, so that a seed means the same whatever generator jax is configured to use by default.
    return jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), count))
