"""`clip_grid`: each group's range is narrowed as far as that lowers its squared error."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from fusedllm.kernels.grouped import GroupedScheme
from fusedllm.quant.grid import Grid, as_groups, codes_on, nearest_grid, stored, values_of

# Ranges are tried down to this part of the whole one. Of normal weights in three bits the best keeps about 0.6.
SMALLEST = 0.4
CANDIDATES = 31
# Of what is found first, scale and zero point are fitted to the codes, and codes to them, so many times.
REFITS = 4


@functools.partial(jax.jit, static_argnums=(1, 3))
def clip_grid(weights: jax.Array, scheme: GroupedScheme, importance: jax.Array | None, scale_dtype: DTypeLike) -> Grid:
    """The grid of least squared error of `weights`, `[out, in]`, each column's error weighted by `importance`, `[in]`.

    Ranges from the whole one down to `SMALLEST` of it are tried, of scale and zero point together. Scale and zero point
    of the best are then the least-squares fit to its codes, alternating with the codes nearest to them. A group
    keeps what had the lowest error, as stored, which is never more than that of rounding to the nearest.
    """
    groups = as_groups(weights, scheme)
    weight = group_weights(importance, scheme, weights.shape[1])
    whole = nearest_grid(weights, scheme, scale_dtype)

    def error(grid: Grid) -> jax.Array:
        return (weight * jnp.square(values_of(grid, codes_on(grid, groups, scheme)) - groups)).sum(-1)

    def better(best: tuple[Grid, jax.Array], grid: Grid) -> tuple[Grid, jax.Array]:
        found = error(grid)
        less = found < best[1]
        return jax.tree.map(lambda new, old: jnp.where(less, new, old), grid, best[0]), jnp.minimum(found, best[1])

    def narrow(index: jax.Array, best: tuple[Grid, jax.Array]) -> tuple[Grid, jax.Array]:
        part = 1 - (index + 1) * ((1 - SMALLEST) / CANDIDATES)
        scale = stored(whole.scale * part, scale_dtype)
        # The middle of the range stays where it is.
        middle = (scheme.lowest + scheme.highest) / 2
        zero = whole.zero if scheme.symmetric else stored(middle + (whole.zero - middle) / part, scale_dtype)
        return better(best, Grid(scale, zero))

    def refit(_: jax.Array, best: tuple[Grid, jax.Array]) -> tuple[Grid, jax.Array]:
        return better(best, fitted(best[0], codes_on(best[0], groups, scheme), groups, weight, scheme, scale_dtype))

    best = lax.fori_loop(0, CANDIDATES, narrow, (whole, error(whole)))
    return lax.fori_loop(0, REFITS, refit, best)[0]


def fitted(
    grid: Grid,
    codes: jax.Array,
    groups: jax.Array,
    weight: jax.Array,
    scheme: GroupedScheme,
    scale_dtype: DTypeLike,
) -> Grid:
    """The weighted least-squares scale, and zero point, of `groups` given their `codes`; `grid` where there is none."""
    if scheme.symmetric:
        centered = codes - grid.zero[..., None]
        square = (weight * centered * centered).sum(-1)
        scale = (weight * centered * groups).sum(-1) / jnp.where(square > 0, square, 1)
        zero = grid.zero
    else:
        # About their means, for the difference of two large sums would have few digits left.
        total = weight.sum(-1)
        code_mean = (weight * codes).sum(-1) / total
        group_mean = (weight * groups).sum(-1) / total
        code_off, group_off = codes - code_mean[..., None], groups - group_mean[..., None]
        square = (weight * code_off * code_off).sum(-1)
        scale = (weight * code_off * group_off).sum(-1) / jnp.where(square > 0, square, 1)
        zero = code_mean - group_mean / jnp.where(scale > 0, scale, 1)
        # A zero point far outside of the codes would have no digits left for them.
        zero = jnp.clip(zero, scheme.lowest - scheme.highest, 2 * scheme.highest)
    scale, zero = stored(scale, scale_dtype), stored(zero, scale_dtype)
    usable = (square > 0) & (scale > 0) & jnp.isfinite(scale)
    return Grid(jnp.where(usable, scale, grid.scale), jnp.where(usable, zero, grid.zero))


def group_weights(importance: jax.Array | None, scheme: GroupedScheme, width: int) -> jax.Array:
    """`importance` as `[1, groups, size]`, positive even where it is zero; what fills a row counts nothing."""
    ones = as_groups(jnp.ones(width), scheme)
    if importance is None:
        return ones
    weight = as_groups(importance, scheme)
    # A group of columns that were never used is rounded as if they all counted.
    return jnp.where(weight.max(-1, keepdims=True) > 0, weight, ones) + TINY * ones


# Added to importances, so that sums of them are not zero.
TINY = 1e-30
