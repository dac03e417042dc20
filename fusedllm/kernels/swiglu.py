"""`swiglu`: the gated activation between the two products of the feed-forward part."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fusedllm.kernels.choose import choose


def swiglu(
    gate: Float[Array, "*rows width"], up: Float[Array, "*rows width"], *, implementation: str | None = None
) -> Float[Array, "*rows width"]:
    """`silu(gate) * up` (arXiv:2002.05202). The native implementation (`"ffi"`) takes float32; XLA the others.

    Raises:
      ImplementationError: `implementation` names one that does not exist, or can't run here.
    """
    return choose("swiglu", {"xla": _swiglu_xla, "ffi": _swiglu_ffi}, implementation)(gate, up)


def _swiglu_xla(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(gate) * up


def _swiglu_ffi(gate: jax.Array, up: jax.Array) -> jax.Array:
    # Shapes that broadcast, and errors, are XLA's.
    if gate.dtype != jnp.float32 or up.dtype != jnp.float32 or gate.shape != up.shape:
        return _swiglu_xla(gate, up)
    active: jax.Array = jax.ffi.ffi_call("fusedllm_swiglu", jax.ShapeDtypeStruct(gate.shape, jnp.float32))(gate, up)
    return active
