"""`rms_norm`: the root-mean-square norm, and the residual that is added before it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fusedllm.kernels.choose import choose
from fusedllm.kernels.packed import PLAIN_NUMBERS
from fusedllm.kernels.pallas_support import interprets

# Widths of a row that is a program's: less is too little for one, and more does not fit its registers.
WIDTHS = (512, 65536)


def rms_norm(
    x: Float[Array, "*rows width"],
    weight: Float[Array, " width"],
    eps: float,
    *,
    delta: Float[Array, "*rows width"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "*rows width"], Float[Array, "*rows width"]]:
    """`x + delta` (or `x`), and its root-mean-square norm (arXiv:1910.07467), computed in float32.

    The native implementation (`"ffi"`) takes float32; other dtypes are left to XLA. Pallas's takes rows of
    512 to 65,536 numbers; others, such as heads, are left to XLA, which has more than one of them in a program.

    Raises:
      ImplementationError: `implementation` names one that does not exist, or can't run here.
    """
    implementations = {"xla": _rms_norm_xla, "ffi": _rms_norm_ffi, "triton": _rms_norm_triton}
    return choose("rms_norm", implementations, implementation)(x, weight, eps, delta)


def _rms_norm_xla(x: jax.Array, weight: jax.Array, eps: float, delta: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    if delta is not None:
        x = x + delta
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return x, ((wide * scale) * weight.astype(jnp.float32)).astype(x.dtype)


def _rms_norm_ffi(x: jax.Array, weight: jax.Array, eps: float, delta: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    # Shapes that broadcast, and errors, are XLA's.
    fits = weight.shape == x.shape[-1:] and (delta is None or delta.shape == x.shape)
    if x.dtype != jnp.float32 or not fits:
        return _rms_norm_xla(x, weight, eps, delta)
    shape = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    wide, epsilon = weight.astype(jnp.float32), np.float32(eps)
    if delta is None:
        (normed,) = jax.ffi.ffi_call("fusedllm_rms_norm", (shape,))(x, wide, epsilon=epsilon)
        return x, normed
    total, normed = jax.ffi.ffi_call("fusedllm_rms_norm", (shape, shape))(
        x, delta.astype(jnp.float32), wide, epsilon=epsilon
    )
    return total, normed


def _rms_norm_triton(
    x: jax.Array, weight: jax.Array, eps: float, delta: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    # Shapes that broadcast, and errors, are XLA's.
    fits = weight.shape == x.shape[-1:] and (delta is None or (delta.shape == x.shape and delta.dtype == x.dtype))
    if not fits or x.size == 0 or x.dtype.name not in PLAIN_NUMBERS or not WIDTHS[0] <= x.shape[-1] <= WIDTHS[1]:
        return _rms_norm_xla(x, weight, eps, delta)
    from fusedllm.kernels.rms_norm_triton import norm_triton  # Imports Pallas: see `pallas_support`.

    rows = x.reshape(-1, x.shape[-1])
    added = None if delta is None else delta.reshape(rows.shape)
    total, normed = norm_triton(rows, weight, added, eps=float(eps), interpret=interprets())
    return total.reshape(x.shape), normed.reshape(x.shape)
