"""`candidates`: of each row of logits the likeliest tokens, and the sum that makes their probabilities."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from fusedllm.kernels.choose import choose


def candidates(
    logits: Float[Array, "batch vocab"],
    temperature: Float[Array, " batch"],
    count: int,
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "batch count"], Int[Array, "batch count"], Float[Array, " batch"]]:
    """The `count` likeliest tokens of each row, the likeliest first, of equals the one with the lower id.

    A row of temperature 0 is asked for its likeliest token only; in the places of the others stand minus infinities.

    Returns:
      `(logit - largest logit) / temperature` of each, their ids, and the sum of the exponentials of that over the row.

    Raises:
      ImplementationError: `implementation` names one that does not exist, or can't run here.
    """
    return choose("candidates", {"xla": _candidates_xla, "ffi": _candidates_ffi}, implementation)(
        logits, temperature, count
    )


def _candidates_xla(logits: jax.Array, temperature: jax.Array, count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    greedy = (temperature <= 0)[:, None]
    divisor = jnp.where(greedy, 1.0, temperature[:, None])
    # From the largest down, so that the smallest temperature makes an infinity only of what can't be drawn.
    scaled = (logits - logits.max(axis=-1, keepdims=True)) / divisor
    values, ids = lax.top_k(scaled, count)
    unwanted = greedy & (jnp.arange(count) > 0)
    total = jnp.where(greedy[:, 0], 1.0, jnp.sum(jnp.exp(scaled), axis=-1))
    return jnp.where(unwanted, -jnp.inf, values), jnp.where(unwanted, 0, ids), total


def _candidates_ffi(logits: jax.Array, temperature: jax.Array, count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    batch = logits.shape[0]
    outs = (
        jax.ShapeDtypeStruct((batch, count), jnp.float32),
        jax.ShapeDtypeStruct((batch, count), jnp.int32),
        jax.ShapeDtypeStruct((batch,), jnp.float32),
    )
    values, ids, total = jax.ffi.ffi_call("fusedllm_candidates", outs)(
        logits.astype(jnp.float32), temperature.astype(jnp.float32)
    )
    return values, ids, total
