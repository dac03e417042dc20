"""`gptq_codes`: codes chosen column by column, each one's error made up for in the columns to come.

GPTQ (arXiv:2210.17323), which is Babai's nearest plane in the order of the columns (arXiv:2507.18553).
"""

from __future__ import annotations

import functools

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from fusedllm.kernels.grouped import GroupedScheme
from fusedllm.quant.grid import Grid, inverse, nearest_codes, nearest_grid

# What is added to the Hessian's diagonal, as a part of its mean (the paper's value).
DAMPING = 0.01
# Columns whose errors are applied to all later ones together.
BLOCK = 128
# A damping of this makes any Hessian of finite numbers positive definite.
MOST_DAMPING = 1e3


@flax.struct.dataclass
class Factor:
    """An inverse Hessian `U^T U`, with U upper triangular, of the columns in a certain order.

    Attributes:
      upper: `U`.
      order: the column that is rounded first, second and so on.
      damping: which was needed, as a part of the mean of the diagonal.
    """

    upper: Float[Array, "in in"]
    order: Int[Array, " in"]
    damping: Float[Array, ""]


@functools.partial(jax.jit, static_argnames="act_order")
def factorized(hessian: jax.Array, damping: float = DAMPING, *, act_order: bool = True) -> Factor:
    """The factor of the inverse of `hessian`, `[in, in]`; `damping` is multiplied by ten until there is one.

    With `act_order` the columns with the largest second moments come first, when all others can still make up for
    them. A column that was never used has neither influence nor help: it is rounded to the nearest.
    """
    diagonal = jnp.diagonal(hessian)
    dead = diagonal <= 0
    mean = jnp.where(dead, 0, diagonal).sum() / jnp.maximum((~dead).sum(), 1)
    mean = jnp.where(mean > 0, mean, 1)
    order = jnp.argsort(-diagonal, stable=True) if act_order else jnp.arange(diagonal.shape[0])
    # Of a diagonal around one, whatever the inputs' scale was.
    scaled = (hessian / mean + jnp.diag(jnp.where(dead, 1.0, 0.0)))[order][:, order]
    identity = jnp.eye(diagonal.shape[0], dtype=jnp.float32)

    def attempt(damping: jax.Array) -> jax.Array:
        # If the Hessian with its columns reversed is L L^T, then it is R R^T, with R = L reversed both ways, upper
        # triangular; the inverse of R is U. There is no need to invert the Hessian itself.
        return jnp.linalg.cholesky((scaled + damping * identity)[::-1, ::-1])

    def fails(carry: tuple[jax.Array, jax.Array]) -> jax.Array:
        return ~jnp.isfinite(carry[1]).all() & (carry[0] < MOST_DAMPING)

    def again(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return carry[0] * 10, attempt(carry[0] * 10)

    first = jnp.asarray(damping, jnp.float32)
    used, lower = lax.while_loop(fails, again, (first, attempt(first)))
    upper = jax.scipy.linalg.solve_triangular(lower[::-1, ::-1], identity, lower=False)
    return Factor(upper, order, used)


@functools.partial(jax.jit, static_argnums=(2, 4))
def gptq_codes(
    weights: jax.Array, factor: Factor, scheme: GroupedScheme, grid: Grid | None, scale_dtype: DTypeLike
) -> tuple[Grid, jax.Array]:
    """A grid and codes, float32 `[out, groups, size]`, of `weights`, float32 `[out, in]`.

    `grid` stays as it is. Where it is `None` a group's scales spread what the weights have become when the group's
    first column is reached, as in the paper; the columns must be in their own order for that.
    """
    rows, width = weights.shape
    groups, padded = scheme.groups(width), scheme.padded(width)
    size = padded // groups
    # Whole groups in a block where scales are found on the way; otherwise the last block is filled up.
    block = min(BLOCK, padded) if grid is not None else size
    whole = -(-padded // block) * block
    extra = whole - width
    # Columns that fill the last group or block come last, with no influence on any other.
    upper = jnp.pad(factor.upper, ((0, extra), (0, extra))) + jnp.diag((jnp.arange(whole) >= width).astype(jnp.float32))
    order = jnp.concatenate([factor.order, jnp.arange(width, whole, dtype=factor.order.dtype)])
    # Columns along the first axis, where one of them lies together.
    left = jnp.pad(weights.astype(jnp.float32), ((0, 0), (0, extra))).T[order]
    group_of = jnp.minimum(order // size, groups - 1)
    if grid is None:
        scales, zeros = jnp.ones((groups, rows)), jnp.zeros((groups, rows))
    else:
        scales, zeros = grid.scale.T, grid.zero.T
    at = jnp.arange(block)

    def one_block(
        index: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        left, codes, scales, zeros = carry
        start = index * block
        part = lax.dynamic_slice_in_dim(left, start, block)
        across = lax.dynamic_slice_in_dim(upper, start, block)
        within = lax.dynamic_slice_in_dim(across, start, block, axis=1)
        members = lax.dynamic_slice_in_dim(group_of, start, block)
        if grid is None:
            found = nearest_grid(part.T, scheme, scale_dtype)
            scales = lax.dynamic_update_slice_in_dim(scales, found.scale.T, members[0], 0)
            zeros = lax.dynamic_update_slice_in_dim(zeros, found.zero.T, members[0], 0)

        def column(
            j: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            part, errors, found = carry
            scale, zero = scales[members[j]], zeros[members[j]]
            code = nearest_codes(part[j] * inverse(scale), zero, scheme)
            error = (part[j] - scale * (code - zero)) / within[j, j]
            later = jnp.where(at > j, within[j], 0)
            return part - later[:, None] * error, errors.at[j].set(error), found.at[j].set(code)

        empty = jnp.zeros_like(part)
        _, errors, found = lax.fori_loop(0, block, column, (part, empty, empty))
        after = jnp.where(jnp.arange(whole) >= start + block, across, 0)
        left = left - jnp.matmul(after.T, errors, precision=lax.Precision.HIGHEST)
        return left, lax.dynamic_update_slice_in_dim(codes, found, start, 0), scales, zeros

    initial = (left, jnp.zeros_like(left), scales, zeros)
    _, codes, scales, zeros = lax.fori_loop(0, whole // block, one_block, initial)
    codes = jnp.zeros_like(codes).at[order].set(codes, unique_indices=True)[:padded]
    return Grid(scales.T, zeros.T), codes.T.reshape(rows, groups, size)
