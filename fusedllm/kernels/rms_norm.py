"""`rms_norm`: the root-mean-square norm, and the residual that is added before it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fusedllm.kernels.choose import choose


def rms_norm(
    x: Float[Array, "*rows width"],
    weight: Float[Array, " width"],
    eps: float,
    *,
    delta: Float[Array, "*rows width"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "*rows width"], Float[Array, "*rows width"]]:
    """`x + delta` (or `x`), and its root-mean-square norm (arXiv:1910.07467), computed in float32.

    The native implementation (`"ffi"`) takes float32; other dtypes are left to XLA.

    Raises:
      ImplementationError: `implementation` names one that does not exist, or can't run here.
    """
    return choose("rms_norm", {"xla": _rms_norm_xla, "ffi": _rms_norm_ffi}, implementation)(x, weight, eps, delta)


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
