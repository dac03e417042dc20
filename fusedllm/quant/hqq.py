"""`hqq_grid`: half-quadratic quantization (Badri and Shaji 2023, https://mobiusml.github.io/hqq_blog/)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from fusedllm.kernels.grouped import GroupedScheme
from fusedllm.quant.clip import group_weights
from fusedllm.quant.grid import Grid, as_groups, codes_on, nearest_grid, stored, values_of

# The authors' values: the norm, the first weight of the penalty and its growth with each iteration.
NORM = 0.7
FIRST_PENALTY = 10.0
GROWTH = 1.01
ITERATIONS = 20


@functools.partial(jax.jit, static_argnums=(1, 3))
def hqq_grid(weights: jax.Array, scheme: GroupedScheme, importance: jax.Array | None, scale_dtype: DTypeLike) -> Grid:
    """A grid for `weights`, `[out, in]`, whose errors have a small l_p norm, p = 0.7, so that few are large.

    The error is split into a sparse part, found by shrinkage, and the rest, whose squares, weighted by `importance`
    `[in]`, the zero point then minimizes; a symmetric scheme has none, its scale is updated instead. Errors are
    counted in steps of the grid, so that no number here depends on how large the weights are. A group keeps
    the iterate with the lowest norm, as stored; the first is rounding to the nearest.
    """
    groups = as_groups(weights, scheme)
    weight = group_weights(importance, scheme, weights.shape[1])
    total = weight.sum(-1)
    first = nearest_grid(weights, scheme, scale_dtype)

    def norm(grid: Grid) -> jax.Array:
        off = jnp.abs(values_of(grid, codes_on(grid, groups, scheme)) - groups)
        return (weight * off**NORM).sum(-1)

    def iterate(index: jax.Array, carry: tuple[Grid, Grid, jax.Array]) -> tuple[Grid, Grid, jax.Array]:
        grid, best, least = carry
        penalty = FIRST_PENALTY * GROWTH**index
        codes = codes_on(grid, groups, scheme)
        step = jnp.where(grid.scale > 0, grid.scale, 1)[..., None]
        sparse = shrink((groups - values_of(grid, codes)) / step, penalty)
        if scheme.symmetric:
            centered = codes - grid.zero[..., None]
            square = (weight * centered**2).sum(-1)
            scale = (weight * centered * (groups - step * sparse)).sum(-1) / jnp.where(square > 0, square, 1)
            scale = stored(scale, scale_dtype)
            grid = Grid(jnp.where((scale > 0) & jnp.isfinite(scale), scale, grid.scale), grid.zero)
        else:
            zero = (weight * (codes - groups / step + sparse)).sum(-1) / total
            grid = Grid(grid.scale, stored(zero, scale_dtype))
        found = norm(grid)
        less = found < least
        best = jax.tree.map(lambda new, old: jnp.where(less, new, old), grid, best)
        return grid, best, jnp.minimum(found, least)

    return lax.fori_loop(0, ITERATIONS, iterate, (first, first, norm(first)))[1]


def shrink(x: jax.Array, penalty: jax.Array) -> jax.Array:
    """The generalized soft threshold of the l_p norm: near zero what is small, and nearly `x` what is large."""
    size = jnp.abs(x)
    # At zero the power is infinite, and the result zero as it should be.
    return jnp.sign(x) * jnp.maximum(size - jnp.maximum(size, 1e-12) ** (NORM - 1) / penalty, 0)
