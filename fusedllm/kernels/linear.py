"""`linear`: the product of activations with a weight matrix `[out, in]`, plain or quantized."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from fusedllm.kernels.choose import choose
from fusedllm.qarray import QuantArray

# Up to here the rows go to the right-hand side on the CPU: `W @ x.T` reads W along its rows at twice to four times the
# rate of `x @ W.T` (2 to 8 rows of a 2048 x 8192 float32 product: 31 to 25 GB/s against 16 to 6).
FEW_ROWS = 32


def linear(
    x: Float[Array, "*rows in"],
    weight: Float[Array, "out in"] | QuantArray,
    *,
    out_dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> Float[Array, "*rows out"]:
    """`x @ weight.T`, accumulated in float32, in `out_dtype` (by default that of `x`).

    Raises:
      ImplementationError: `implementation` names one that does not exist.
    """
    return choose("linear", {"xla": _linear_xla}, implementation)(x, weight, out_dtype or x.dtype)


def _linear_xla(x: jax.Array, weight: jax.Array | QuantArray, out_dtype: DTypeLike) -> jax.Array:
    matrix = weight.dequantize(x.dtype) if isinstance(weight, QuantArray) else weight.astype(x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    # The default lets a GPU round float32 operands to TF32.
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    if rows.shape[0] <= FEW_ROWS and jax.default_backend() == "cpu":
        product = jnp.dot(matrix, rows.T, precision=precision, preferred_element_type=jnp.float32).T
    else:
        product = jnp.dot(rows, matrix.T, precision=precision, preferred_element_type=jnp.float32)
    return product.astype(out_dtype).reshape(*x.shape[:-1], matrix.shape[0])
