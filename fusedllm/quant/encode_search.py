"""The scale (and minimum) with which a block of weights loses least: weighted least squares over many roundings.

For codes that are given, the best scale and minimum are a linear regression with two unknowns. For a scale and minimum
that are given, the best codes are the nearest ones. Neither is known, so several grids are laid over the block, each
rounds the weights to codes, a regression refits the grid to them, and the best of all is kept and rounded once more.
The idea, and that grids which cut off the largest weights are worth trying, is from the discussions of llama.cpp's
k-quants (pull request 1684 and `ggml-quants.c`); the grids here reach further and cut at both ends.

Arrays are `[..., elements, blocks]`: blocks lie along the last axis, so that XLA's loops over it use vector
instructions, and sums over a block run along the one before it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Grids of an affine code (a scale and a minimum): the range of a block is divided into this many steps less, or more,
# than there are. More steps cut off the ends of the range: the upper one only, or the lower one only.
_AFFINE_FIRST, _AFFINE_STEP, _AFFINE_COUNT = -2.0, 0.5, 13
# Grids of a symmetric code (a scale alone), as parts of the largest magnitude's code: below 1 the grid reaches beyond
# it, above 1 it is cut off. The few weights of a block make coarse steps in a wide range better than fine ones.
_SYMMETRIC_FIRST, _SYMMETRIC_LAST, _SYMMETRIC_COUNT = 0.875, 1.25, 25

# Below this part of its terms the determinant of a regression is rounding: (almost) all codes are the same.
SINGULAR = 1e-5


class Block(NamedTuple):
    """Weights `[..., elements, blocks]` and how much the square of each one's error counts."""

    x: Float[Array, "*groups elements blocks"]
    weight: Float[Array, "*groups elements blocks"]

    def error(self, approximation: jax.Array) -> jax.Array:
        """The weighted squared error of each block, `[..., blocks]`."""
        difference = approximation - self.x
        return (self.weight * difference * difference).sum(-2)


def reciprocal(values: jax.Array) -> jax.Array:
    """`1 / values`, and 0 where they are 0: with a scale of 0 every code is 0."""
    return jnp.where(values == 0, 0, 1 / jnp.where(values == 0, 1, values))


def as_half(values: jax.Array) -> jax.Array:
    """The nearest float16, as float32."""
    return values.astype(jnp.float16).astype(jnp.float32)


def round_codes(grid: jax.Array, low: int, high: int) -> jax.Array:
    """The nearest code, as float32."""
    return jnp.clip(jnp.rint(grid), low, high)


def affine_codes(x: jax.Array, scale: jax.Array, minimum: jax.Array, levels: int) -> jax.Array:
    """Codes 0 to `levels` of `x ~ scale * code + minimum`."""
    return round_codes((x - minimum[..., None, :]) * reciprocal(scale)[..., None, :], 0, levels)


def affine(block: Block, levels: int, positive_minimum: bool) -> tuple[jax.Array, jax.Array]:
    """Scale (never negative) and minimum of `x ~ scale * code + minimum`, codes 0 to `levels`, each `[..., blocks]`.

    `positive_minimum` says whether the format can hold a minimum above 0.
    """
    x, weight = block
    low = x.min(-2) if positive_minimum else jnp.minimum(x.min(-2), 0)
    span = reciprocal(x.max(-2) - low)
    # From the low end, lest the sums of a block far from 0 cancel.
    y = x - low[..., None, :]
    w, wy, wyy = weight.sum(-2), (weight * y).sum(-2), (weight * y * y).sum(-2)
    wxx = (weight * x * x).sum(-2)

    def fit(codes: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Error, scale, and minimum above `low`, of the regression on `codes`."""
        weighted = weight * codes
        c, cc, cy = weighted.sum(-2), (weighted * codes).sum(-2), (weighted * y).sum(-2)
        determinant = w * cc - c * c
        singular = determinant < SINGULAR * w * cc
        inverse = reciprocal(determinant)
        scale, minimum = (w * cy - c * wy) * inverse, (cc * wy - c * cy) * inverse
        error = jnp.where(singular, jnp.inf, wyy - scale * cy - minimum * wy)
        if not positive_minimum:
            # The regression through 0, for blocks that would have their minimum above it; 0 where it points downwards.
            cx = jnp.maximum(cy + low * c, 0)
            through = cx * reciprocal(cc)
            instead = singular | (minimum + low > 0)
            scale, minimum = jnp.where(instead, through, scale), jnp.where(instead, -low, minimum)
            error = jnp.where(instead, wxx - through * cx, error)
        return error, jnp.maximum(scale, 0), minimum

    def try_grid(number: jax.Array, best: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        steps = levels + _AFFINE_FIRST + _AFFINE_STEP * (number // 2)
        cut_below = (number % 2) * (levels - steps)
        found = fit(round_codes((steps * span)[..., None, :] * y + cut_below, 0, levels))
        return better(best, found)

    # To begin with: all weights are the lowest one.
    best = jax.lax.fori_loop(0, 2 * _AFFINE_COUNT, try_grid, (wyy, jnp.zeros_like(w), jnp.zeros_like(w)))
    best = better(best, fit(affine_codes(y, best[1], best[2], levels)))
    return best[1], best[2] + low


def symmetric(block: Block, levels: int) -> jax.Array:
    """Scale (of either sign) of `x ~ scale * code`, codes `-levels` to `levels - 1`, `[..., blocks]`."""
    x, weight = block
    wxx = (weight * x * x).sum(-2)

    def fit(codes: jax.Array) -> tuple[jax.Array, jax.Array]:
        weighted = weight * codes
        cc, cx = (weighted * codes).sum(-2), (weighted * x).sum(-2)
        scale = cx * reciprocal(cc)
        return wxx - scale * cx, scale

    # The largest magnitude gets the code -levels, one further from 0 than any positive code.
    unit = -levels * reciprocal(largest(x, -2))

    def try_grid(number: jax.Array, best: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        part = _SYMMETRIC_FIRST + (_SYMMETRIC_LAST - _SYMMETRIC_FIRST) / (_SYMMETRIC_COUNT - 1) * number
        return better(best, fit(round_codes((part * unit)[..., None, :] * x, -levels, levels - 1)))

    best = jax.lax.fori_loop(0, _SYMMETRIC_COUNT, try_grid, (wxx, jnp.zeros_like(wxx)))
    codes = round_codes(x * reciprocal(best[1])[..., None, :], -levels, levels - 1)
    return better(best, fit(codes))[1]


def largest(values: jax.Array, axis: int) -> jax.Array:
    """The value of the largest magnitude along `axis`, with its sign."""
    high, low = values.max(axis), values.min(axis)
    return jnp.where(high >= -low, high, low)


def better(best: tuple[jax.Array, ...], found: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Block by block the one with the smaller error, which is the first of each."""
    wins = found[0] < best[0]
    return tuple(jnp.where(wins, new, old) for new, old in zip(found, best, strict=True))
