"""`hadamard`: rows turned by Walsh-Hadamard matrices, which spread what is large in one element over many."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from fusedllm.kernels.choose import choose
from fusedllm.kernels.walsh import block_of, turn


def hadamard(x: Float[Array, "*rows width"], *, implementation: str | None = None) -> Float32[Array, "*rows width"]:
    """Each block of a row of `x` times the normalised Walsh-Hadamard matrix (Sylvester's, in natural order), float32.

    A block is as many elements as the largest power of two that divides the width (`walsh.block_of`): 512 of 1,536,
    and all of 8,192. The matrix is orthogonal and symmetric, so that this is its own inverse but for rounding, and

        x W^T = (x H) (W H)^T

    That is what turning is for: an element that is much larger than all others of a token, for which one scale of the
    token has to make room, becomes many of its size over the root of the block (QuaRot, arXiv:2404.00456).

    The order of additions is part of the definition, so that XLA, NumPy and native code give the same bits. Of a block
    of n = 2^k elements, in float32, where what is below 2^-88 counts as zero:

        for each distance n/2, n/4, ..., 1:  elements a and b that far apart become a + b and a - b
        each times 2^(-k/2), rounded to float32

    To count the smallest as zeros is a choice between an element and zero, which also keeps compilers from contracting
    an addition and the product that made `x` into one operation of another rounding. A sum that overflows is infinite
    or no number, as is what a block with such an element becomes.

    Raises:
      ImplementationError: `implementation` names one that does not exist or can't run here.
    """
    return choose("hadamard", {"xla": _hadamard_xla, "ffi": _hadamard_ffi}, implementation)(x)


def hadamard_numpy(x: Float[np.ndarray, "*rows width"]) -> Float32[np.ndarray, "*rows width"]:
    """The same on the host without JAX, bit for bit."""
    with np.errstate(over="ignore", invalid="ignore"):
        turned: np.ndarray = turn(np, np.asarray(x, np.float32))
    return turned


@jax.jit
def _hadamard_xla(x: jax.Array) -> jax.Array:
    turned: jax.Array = turn(jnp, x.astype(jnp.float32))
    return turned


@jax.jit
def _hadamard_ffi(x: jax.Array) -> jax.Array:
    call = jax.ffi.ffi_call("fusedllm_hadamard", jax.ShapeDtypeStruct(x.shape, jnp.float32))
    turned: jax.Array = call(x.astype(jnp.float32), block=np.int64(block_of(x.shape[-1])))
    return turned
