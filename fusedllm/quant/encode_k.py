"""K-quants: super-blocks of 256 weights whose sub-blocks share float16 scales for their integer scales.

After the search of each sub-block's own scale (`encode_search.py`) come three steps that see the rounding of scales:
the shared float16 scales are chosen so that the largest integer is used; around the nearest integers each sub-block
takes those that lose least with codes rounded anew; and the shared scales are refitted, by least squares over the whole
super-block, to the integers and codes that were found.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from fusedllm.quant.encode_search import (
    SINGULAR,
    Block,
    affine,
    affine_codes,
    as_half,
    better,
    largest,
    reciprocal,
    round_codes,
    symmetric,
)

AFFINE_GROUPS, SYMMETRIC_GROUPS = 8, 16  # sub-blocks in a super-block
_LARGEST_SIX_BIT, _LARGEST_INT8 = 63, 127
_SMALLEST_HALF = 2.0**-24
# What a scale may lose to rounding: four times what a float16 above 2^-14 loses at most, and half a part in 256.
_NEARLY = 1 - 2.0**-9
# What the integers of a sub-block are moved by when the best ones are looked for.
_AROUND = 3


@functools.partial(jax.jit, static_argnames="levels")
def affine_super_blocks(x: jax.Array, weight: jax.Array | None, unit: jax.Array, levels: int) -> Any:
    """`x ~ scale * scales * code - minimum * minimums`, codes 0 to `levels`, eight sub-blocks (Q4_K, Q5_K).

    Args:
      x: weights, float32 `[blocks, 256]`, in units of `unit`: about 1 at most.
      weight: how much each one's squared error counts, `[blocks, 256]`; `None` weighs by the weights themselves.
      unit: a power of two for each block, `[blocks]`.
      levels: the largest code.

    Returns:
      float16 scale and minimum `[blocks]`, uint8 scales and minimums `[blocks, 8]`, uint8 codes `[blocks, 256]`.
    """
    block = _block(x, weight, AFFINE_GROUPS)
    scale, minimum = affine(block, levels, positive_minimum=False)
    minimum = -minimum
    half = functools.partial(_half, unit=unit)

    def error(shared: jax.Array, scales: jax.Array, shared_minimum: jax.Array, minimums: jax.Array) -> jax.Array:
        step, offset = shared * scales, shared_minimum * minimums
        codes = affine_codes(block.x, step, -offset, levels)
        return block.error(step[..., None, :] * codes - offset[..., None, :])

    def around(shared: jax.Array, shared_minimum: jax.Array, scales: jax.Array, minimums: jax.Array) -> Any:
        """The total error and the best integers near `scales` and `minimums`."""

        def move(number: jax.Array, best: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            one = round_codes(scales + number // _AROUND - _AROUND // 2, 0, _LARGEST_SIX_BIT)
            other = round_codes(minimums + number % _AROUND - _AROUND // 2, 0, _LARGEST_SIX_BIT)
            found = error(shared, one, shared_minimum, other), one, other
            return better(best, found)

        start = (jnp.full_like(scales, jnp.inf), scales, minimums)
        errors, scales, minimums = jax.lax.fori_loop(0, _AROUND**2, move, start)
        return errors.sum(0), shared, shared_minimum, scales, minimums

    shared, shared_minimum = half(scale.max(0) / _LARGEST_SIX_BIT), half(minimum.max(0) / _LARGEST_SIX_BIT)
    scales = round_codes(scale * reciprocal(shared), 0, _LARGEST_SIX_BIT)
    minimums = round_codes(minimum * reciprocal(shared_minimum), 0, _LARGEST_SIX_BIT)
    best = around(shared, shared_minimum, scales, minimums)

    _, shared, shared_minimum, scales, minimums = best
    codes = affine_codes(block.x, shared * scales, -shared_minimum * minimums, levels)
    fitted, fitted_minimum = _refit(block, scales[:, None, :] * codes, minimums[:, None, :])
    refitted = jnp.where(fitted > 0, half(fitted), shared)
    refitted_minimum = jnp.where(fitted_minimum > 0, half(fitted_minimum), shared_minimum)
    found = around(refitted, refitted_minimum, scales, minimums)
    _, shared, shared_minimum, scales, minimums = better(best, found)

    codes = affine_codes(block.x, shared * scales, -shared_minimum * minimums, levels)
    return (
        (shared * unit).astype(jnp.float16),
        (shared_minimum * unit).astype(jnp.float16),
        scales.T.astype(jnp.uint8),
        minimums.T.astype(jnp.uint8),
        _rows(codes).astype(jnp.uint8),
    )


@functools.partial(jax.jit, static_argnames="levels")
def symmetric_super_blocks(x: jax.Array, weight: jax.Array | None, unit: jax.Array, levels: int) -> Any:
    """`x ~ scale * scales * code`, codes `-levels` to `levels - 1`, sixteen sub-blocks (Q6_K).

    The arguments are those of `affine_super_blocks`.

    Returns:
      float16 scale `[blocks]`, int8 scales `[blocks, 16]`, int8 codes `[blocks, 256]`.
    """
    block = _block(x, weight, SYMMETRIC_GROUPS)
    scale = symmetric(block, levels)
    half = functools.partial(_half, unit=unit)

    def rounded(step: jax.Array) -> jax.Array:
        return round_codes(block.x * reciprocal(step)[..., None, :], -levels, levels - 1)

    def around(shared: jax.Array, scales: jax.Array) -> Any:
        """The total error and the best integers near `scales`."""

        def move(number: jax.Array, best: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            one = round_codes(scales + number - _AROUND // 2, -_LARGEST_INT8 - 1, _LARGEST_INT8)
            found = block.error((shared * one)[..., None, :] * rounded(shared * one)), one
            return better(best, found)

        errors, best = jax.lax.fori_loop(0, _AROUND, move, (jnp.full_like(scales, jnp.inf), scales))
        return errors.sum(0), shared, best

    # The largest scale becomes -128, whose magnitude no positive integer of eight bits has.
    shared = half(largest(scale, 0) / (-_LARGEST_INT8 - 1))
    best = around(shared, round_codes(scale * reciprocal(shared), -_LARGEST_INT8 - 1, _LARGEST_INT8))
    _, shared, scales = best
    terms = scales[:, None, :] * rounded(shared * scales)
    refitted = _total(block, terms, block.x) * reciprocal(_total(block, terms, terms))
    found = around(jnp.where(refitted != 0, half(refitted), shared), scales)
    _, shared, scales = better(best, found)
    return (
        (shared * unit).astype(jnp.float16),
        scales.T.astype(jnp.int8),
        _rows(rounded(shared * scales)).astype(jnp.int8),
    )


@functools.partial(jax.jit, static_argnames="levels")
def affine_blocks(x: jax.Array, weight: jax.Array, unit: jax.Array, levels: int) -> Any:
    """`x ~ scale * code + minimum` for blocks `[blocks, 32]` on their own (Q4_1, Q5_1): float16, float16, codes."""
    block, unit = _side_by_side(x, weight, unit)
    scale, minimum = (_half(found, unit) for found in affine(block, levels, positive_minimum=True))
    codes = affine_codes(block.x, scale, minimum, levels)
    return _apart(scale * unit), _apart(minimum * unit), _rows(codes).reshape(x.shape).astype(jnp.uint8)


@functools.partial(jax.jit, static_argnames="levels")
def symmetric_blocks(x: jax.Array, weight: jax.Array, unit: jax.Array, levels: int) -> Any:
    """`x ~ scale * code` for blocks `[blocks, 32]` on their own (Q4_0, Q5_0): float16, int8 codes."""
    block, unit = _side_by_side(x, weight, unit)
    scale = _half(symmetric(block, levels), unit)
    codes = round_codes(block.x * reciprocal(scale)[..., None, :], -levels, levels - 1)
    return _apart(scale * unit), _rows(codes).reshape(x.shape).astype(jnp.int8)


def _side_by_side(x: jax.Array, weight: jax.Array, unit: jax.Array) -> tuple[Block, jax.Array]:
    """Blocks of 32 as if eight were a super-block, a shape for which XLA makes fast loops; units `[8, blocks / 8]`."""
    together = (len(x) // AFFINE_GROUPS, -1)
    return _block(x.reshape(together), weight.reshape(together), AFFINE_GROUPS), unit.reshape(together).T


def _apart(groups: jax.Array) -> jax.Array:
    """`[8, blocks / 8]` as float16 `[blocks]`."""
    return groups.T.reshape(-1).astype(jnp.float16)


def _block(x: jax.Array, weight: jax.Array | None, groups: int) -> Block:
    """`[blocks, weights]` as `[groups, elements, blocks]`.

    Where nothing is known of what the weights are multiplied with, a larger one counts more, and a small one no less
    than the typical weight beside it.
    """

    def split(rows: jax.Array) -> jax.Array:
        return rows.reshape(len(rows), groups, -1).transpose(1, 2, 0)

    x = split(x)
    own = jnp.sqrt(x * x + (x * x).mean(-2, keepdims=True)) if weight is None else split(weight)
    return Block(x, own)


def _rows(groups: jax.Array) -> jax.Array:
    return groups.transpose(2, 0, 1).reshape(groups.shape[-1], -1)


def _half(values: jax.Array, unit: jax.Array) -> jax.Array:
    """`values`, which are in units of `unit`, rounded to float16 as the file holds them.

    Below 2^-14 the numbers of float16 are far apart, and with a scale that is rounded down the largest weights are out
    of reach; there it is rounded up.
    """
    wanted = jnp.abs(values) * unit
    held = as_half(wanted)
    return jnp.sign(values) * jnp.where(held < _NEARLY * wanted, held + _SMALLEST_HALF, held) / unit


def _total(block: Block, one: jax.Array, other: jax.Array) -> jax.Array:
    return (block.weight * one * other).sum((0, 1))


def _refit(block: Block, codes: jax.Array, offsets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The regression `x ~ first * codes - second * offsets` over whole super-blocks; 0 where it is not determined."""
    cc, co, oo = _total(block, codes, codes), _total(block, codes, offsets), _total(block, offsets, offsets)
    cx, ox = _total(block, codes, block.x), _total(block, offsets, block.x)
    determinant = cc * oo - co * co
    inverse = jnp.where(determinant > SINGULAR * cc * oo, reciprocal(determinant), 0)
    return (oo * cx - co * ox) * inverse, (co * cx - cc * ox) * inverse
