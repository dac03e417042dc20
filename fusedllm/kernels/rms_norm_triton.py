"""`rms_norm` with Pallas: a program reads a row once, adds, norms, and writes both."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from fusedllm.kernels.triton_tiles import iota, launch

# A program reads a row of so many numbers with four warps, and wider ones with eight. Reasoned, not measured.
NARROW = 4096


@functools.partial(jax.jit, static_argnames=("eps", "interpret"))
def norm_triton(
    x: jax.Array, weight: jax.Array, delta: jax.Array | None, *, eps: float, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """`x + delta` (or `x`), `[tokens, width]`, and its root-mean-square norm, in one launch: a program for each row."""
    tokens, width = x.shape
    count = pl.next_power_of_2(width)

    def add_and_norm(*refs: Any) -> None:
        token, place = pl.program_id(0), iota(count)
        mask = place < width if count != width else None

        def read(ref: Any, *where: Any) -> jax.Array:
            other = None if mask is None else jnp.zeros((), ref.dtype)
            return triton.load(ref.at[(*where, place)], mask=mask, other=other)

        total = read(refs[0], token)
        if delta is not None:
            total = total.astype(jnp.float32) + read(refs[2], token).astype(jnp.float32)
            total = total.astype(x.dtype)
            triton.store(refs[-2].at[token, place], total, mask=mask)
        wide = total.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.sum(wide * wide) / width + eps)
        normed = wide * scale * read(refs[1]).astype(jnp.float32)
        triton.store(refs[-1].at[token, place], normed.astype(x.dtype), mask=mask)

    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    operands = (x, weight) if delta is None else (x, weight, delta)
    out = [shape] if delta is None else [shape, shape]
    warps = 4 if width <= NARROW else 8
    made = launch(add_and_norm, (tokens,), out, *operands, warps=warps, stages=1, interpret=interpret)
    return x if delta is None else made[0], made[-1]
