"""`Statistics`: what is known of a matrix's inputs, which the methods that look at activations take."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fusedllm.errors import QuantizationError
from fusedllm.kernels.hadamard import hadamard


@flax.struct.dataclass
class Statistics:
    """Means over the tokens that went through a matrix `[out, in]`; `x` is one token's input.

    Attributes:
      mean_square: of each element, `E[x^2]`.
      mean_abs: of each element, `E[|x|]`.
      hessian: `E[x x^T]`, half the second derivative of the squared error of a row's output; `None` where only
        diagonal statistics are known.
    """

    mean_square: Float[Array, " in"]
    mean_abs: Float[Array, " in"]
    hessian: Float[Array, "in in"] | None = None

    def of_divided(self, scales: jax.Array) -> Statistics:
        """The statistics of `x / scales`, elementwise; `scales` are positive `[in]`."""
        inverse = 1 / scales
        return Statistics(
            mean_square=self.mean_square * inverse**2,
            mean_abs=self.mean_abs * inverse,
            hessian=None if self.hessian is None else self.hessian * inverse[:, None] * inverse,
        )

    def of_turned(self) -> Statistics:
        """The statistics of `hadamard(x)`; of `mean_abs` only what it can't exceed is known, the root of `mean_square`.

        Raises:
          QuantizationError: there is no Hessian, of which turned elements, which are sums, are made.
        """
        if self.hessian is None:
            raise QuantizationError(
                "the statistics of inputs that a scheme turns are made of their Hessian, and there is none."
            )
        # From both sides; the matrix is symmetric, and so is this but for rounding.
        hessian = hadamard(hadamard(self.hessian).T)
        mean_square = jnp.maximum(jnp.diagonal(hessian), 0)
        return Statistics(mean_square, jnp.sqrt(mean_square), (hessian + hessian.T) / 2)

    @staticmethod
    def of_inputs(x: jax.Array) -> Statistics:
        """The statistics of `x`, float32 `[tokens, in]`."""
        count = x.shape[0]
        products = jnp.matmul(x.T, x, precision=jax.lax.Precision.HIGHEST)
        return Statistics(jnp.square(x).mean(0), jnp.abs(x).mean(0), products / count)
