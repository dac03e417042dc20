"""`embed`: rows of the embedding, plain or quantized, by token id."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from fusedllm.errors import ImplementationError
from fusedllm.kernels.choose import choose
from fusedllm.kernels.hadamard import hadamard
from fusedllm.kernels.packed import PANEL_ROWS, packed_scheme
from fusedllm.qarray import QuantArray


def embed(
    table: Float[Array, "vocab hidden"] | QuantArray,
    tokens: Int[Array, "*rows"],
    dtype: DTypeLike,
    *,
    implementation: str | None = None,
) -> Float[Array, "*rows hidden"]:
    """The rows of `table` for `tokens`, in `dtype`; of a quantized table only those rows are decoded.

    Only packed tables need a native implementation (`"ffi"`); rows of all others XLA gathers as well as anybody.

    Raises:
      ImplementationError: `implementation` names one that does not exist, or can't run here, or can't read `table`.
    """
    if packed_scheme(table) is None:
        if implementation == "ffi":
            raise ImplementationError("embed: the implementation 'ffi' reads packed tables, and this one is not.")
        implementation = "xla" if implementation is None else implementation
    return choose("embed", {"xla": _embed_xla, "ffi": _embed_ffi}, implementation)(table, tokens, dtype)


def _embed_xla(table: jax.Array | QuantArray, tokens: jax.Array, dtype: DTypeLike) -> jax.Array:
    if not isinstance(table, QuantArray):
        # XLA turns a bfloat16 table into float32 as a whole before it gathers on the CPU, and moves that out of a loop
        # over steps: gigabytes of temporaries, half a second a launch. What depends on the tokens is not moved.
        held, tokens = jax.lax.optimization_barrier((table, tokens))
        return jnp.take(jnp.asarray(held), tokens, axis=0, mode="clip").astype(dtype)
    flat = tokens.reshape(-1)
    hidden = table.shape[-1]
    scheme = packed_scheme(table)
    if scheme is not None:
        flat = jnp.clip(flat, 0, table.shape[0] - 1)
        panels = scheme.decode_panels(jnp.take(table.values, flat // PANEL_ROWS, axis=0), hidden)
        rows = jnp.take_along_axis(panels, (flat % PANEL_ROWS)[:, None, None], axis=1)
        return rows.astype(dtype).reshape(*tokens.shape, hidden)
    gathered = jax.tree.map(lambda buffer: jnp.take(buffer, flat, axis=0, mode="clip"), table)
    return gathered.replace(shape=(flat.shape[0], hidden)).dequantize(dtype).reshape(*tokens.shape, hidden)


def _embed_ffi(table: jax.Array | QuantArray, tokens: jax.Array, dtype: DTypeLike) -> jax.Array:
    scheme = packed_scheme(table)
    assert scheme is not None
    assert isinstance(table, QuantArray)
    rows, hidden = table.shape
    flat = tokens.reshape(-1).astype(jnp.int32)
    call = jax.ffi.ffi_call("fusedllm_embed", jax.ShapeDtypeStruct((flat.shape[0], hidden), jnp.float32))
    out = call(flat, table.values, format=np.int32(scheme.number), shared=np.int64(scheme.shared), rows=np.int64(rows))
    return (hadamard(out) if scheme.turned else out).astype(dtype).reshape(*tokens.shape, hidden)
