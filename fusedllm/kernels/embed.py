"""`embed`: rows of the embedding, plain or quantized, by token id."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from fusedllm.kernels.choose import choose
from fusedllm.qarray import QuantArray


def embed(
    table: Float[Array, "vocab hidden"] | QuantArray,
    tokens: Int[Array, "*rows"],
    dtype: DTypeLike,
    *,
    implementation: str | None = None,
) -> Float[Array, "*rows hidden"]:
    """The rows of `table` for `tokens`, in `dtype`; of a quantized table only those rows are decoded.

    Raises:
      ImplementationError: `implementation` names one that does not exist.
    """
    return choose("embed", {"xla": _embed_xla}, implementation)(table, tokens, dtype)


def _embed_xla(table: jax.Array | QuantArray, tokens: jax.Array, dtype: DTypeLike) -> jax.Array:
    if not isinstance(table, QuantArray):
        return jnp.take(table, tokens, axis=0, mode="clip").astype(dtype)
    flat = tokens.reshape(-1)
    rows = jax.tree.map(lambda buffer: jnp.take(buffer, flat, axis=0, mode="clip"), table)
    hidden = table.shape[-1]
    return rows.replace(shape=(flat.shape[0], hidden)).dequantize(dtype).reshape(*tokens.shape, hidden)
