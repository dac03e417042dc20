"""`awq_scales`: factors for a site's input channels under which its matrices lose less when they are quantized.

Activation-aware quantization (arXiv:2306.00978): a column that large inputs meet is multiplied by a factor, and its
input divided by it. Who makes the input takes that division over (`fusedllm.calibrate.fold`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from fusedllm.errors import QuantizationError
from fusedllm.kernels.grouped import GroupedScheme
from fusedllm.quant.grid import as_groups, codes_on, nearest_grid, values_of
from fusedllm.quant.statistics import Statistics

# Exponents tried: 0, which changes nothing, to 0.95.
EXPONENTS = 20
# Rows of a matrix whose errors decide; all rows share the factors, and so many tell as much as all of them.
SAMPLED_ROWS = 512
# The least magnitude of a channel, as a part of the largest.
LEAST_MAGNITUDE = 1e-4


def awq_scales(
    matrices: Sequence[tuple[jax.Array, GroupedScheme]],
    statistics: Statistics,
    scale_dtype: DTypeLike,
    magnitude: jax.Array | None = None,
) -> jax.Array:
    """Positive factors `[in]` for the columns of `matrices` (each `[out, in]`, with its scheme), which share an input.

    They are a power of `magnitude`, by default `E[|x|]`; the power is the one of least squared error of the outputs,
    all matrices together and each rounded to the nearest. Where the statistics have no Hessian, inputs count as
    uncorrelated.

    Raises:
      QuantizationError: a scheme turns the inputs, which leaves no channel larger than the others.
    """
    if turned := next((scheme.name for _, scheme in matrices if scheme.turned), None):
        raise QuantizationError(
            f"the method awq scales the channels of inputs, and {turned} turns them, after which no channel is what it "
            "was: choose another method or another scheme."
        )
    magnitude = statistics.mean_abs if magnitude is None else magnitude
    candidates = _candidates(magnitude)
    errors = jnp.zeros(EXPONENTS)
    for weights, scheme in matrices:
        # Evenly, so that every head is heard.
        rows = weights[:: max(1, weights.shape[0] // SAMPLED_ROWS)]
        # What half of the rows contribute to the error is doubled, so that matrices keep their shares.
        part = weights.shape[0] / rows.shape[0]
        errors += part * _errors(rows, scheme, candidates, statistics, scale_dtype)
    # The first of equals, which for a matrix of zeros is no change.
    return candidates[jnp.argmin(jnp.where(jnp.isfinite(errors), errors, jnp.inf))]


@jax.jit
def _candidates(magnitude: jax.Array) -> jax.Array:
    """`[exponents, in]`, each around one."""
    largest = magnitude.max()
    relative = jnp.where(largest > 0, magnitude / jnp.where(largest > 0, largest, 1), 1)
    logarithm = jnp.log(jnp.maximum(relative, LEAST_MAGNITUDE))
    scaled = (jnp.arange(EXPONENTS) / EXPONENTS)[:, None] * logarithm
    return jnp.exp(scaled - (scaled.max(-1, keepdims=True) + scaled.min(-1, keepdims=True)) / 2)


@functools.partial(jax.jit, static_argnums=(1, 4))
def _errors(
    weights: jax.Array, scheme: GroupedScheme, candidates: jax.Array, statistics: Statistics, scale_dtype: DTypeLike
) -> jax.Array:
    def error(scales: jax.Array) -> jax.Array:
        grid = nearest_grid(weights * scales, scheme, scale_dtype)
        groups = as_groups(weights * scales, scheme)
        values = values_of(grid, codes_on(grid, groups, scheme)).reshape(weights.shape[0], -1)[:, : weights.shape[1]]
        return output_error(values / scales - weights, statistics)

    return lax.map(error, candidates)


def output_error(off: jax.Array, statistics: Statistics) -> jax.Array:
    """`E[|off x|^2]` of inputs `x`: how far outputs move, squared, if the weights move by `off`, `[out, in]`."""
    if statistics.hessian is None:
        return jnp.sum(jnp.square(off) * statistics.mean_square)
    return jnp.sum(jnp.matmul(off, statistics.hessian, precision=lax.Precision.HIGHEST) * off)
