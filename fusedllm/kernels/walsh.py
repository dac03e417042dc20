"""The Walsh-Hadamard transform as both sides compute it, in NumPy or in JAX (`kernels/hadamard.py` says what it is)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

# Of elements that are turned together: as many columns as a product of integers has at most.
MOST_TOGETHER = 65536

# What is smaller counts as zero. Then every sum is a multiple of 2^-111 and every result at least 2^-119, so that
# nothing is denormal on the way, which some processors and XLA's threads take for zero.
SMALLEST = 2.0**-88


def block_of(width: int) -> int:
    """Elements of a row of `width` that are turned together: the largest power of two that divides it, up to 65,536."""
    return min(width & -width, MOST_TOGETHER)


def factor_of(block: int) -> np.float32:
    """One over the root of `block`, a power of two."""
    half, odd = divmod(block.bit_length() - 1, 2)
    return np.float32(math.sqrt(0.5) ** odd * 0.5**half)


def turn(xp: Any, x: Any) -> Any:
    """`x`, float32 `[..., width]`, turned; `xp` is `numpy` or `jax.numpy`."""
    size = block_of(x.shape[-1])
    half = size // 2
    blocks = xp.where(xp.abs(x) < np.float32(SMALLEST), np.float32(0), x).reshape(*x.shape[:-1], -1, size)
    for _ in range(size.bit_length() - 1):
        # A stage leaves its results where the next one finds those that it adds half a block apart again, and the last
        # stage leaves them in their order (Pease, 1968): one form for every distance.
        first, second = blocks[..., :half], blocks[..., half:]
        blocks = xp.stack([first + second, first - second], axis=-1).reshape(blocks.shape)
    return blocks.reshape(x.shape) * factor_of(size)
