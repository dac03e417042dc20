"""New keys and values in Pallas kernels: rotated, rounded as a KV cache holds them, and put into its pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import triton

from fusedllm.kernels import e4m3
from fusedllm.kernels.attention_tiles import Layout
from fusedllm.kernels.triton_tiles import FLOAT8_NAN, round_to_even, to_float8
from fusedllm.kernels.write_pages import NULL_PAGE

# The largest code of int8.
MOST = 127

# Of more tokens than this XLA makes the products with the weights of q, k and v one, and copies its parts for kernels.
MOST_TOKENS_APART = 16


def together(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
    """The heads of `[batch, seq, heads, head_dim]` as a kernel takes them: apart, or of many tokens side by side.

    Side by side they are one copy instead of three, and none where nothing but XLA's cut lies between the product and
    here. `places` says where they are.
    """
    if q.shape[0] * q.shape[1] <= MOST_TOKENS_APART:
        return q, k, v
    flat = jnp.concatenate([x.reshape(*x.shape[:2], -1) for x in (q, k, v)], axis=-1)
    return (flat.reshape(*q.shape[:2], -1, q.shape[3]),)


def places(refs: tuple[Any, ...], layout: Layout) -> tuple[tuple[Any, Any, Any], tuple[int, int, int], tuple[Any, ...]]:
    """References to the arrays that have q, k and v, the number of the first head of each, and the other references.

    `refs` begin with what `together` returned; cosines, which have an axis less, follow.
    """
    if len(refs[1].shape) == len(refs[0].shape):
        return refs[:3], (0, 0, 0), refs[3:]
    kv_heads = refs[0].shape[-2] // (layout.group + 2)
    heads = kv_heads * layout.group
    return (refs[0],) * 3, (0, heads, heads + kv_heads), refs[1:]


@dataclass(frozen=True, slots=True)
class Rotation:
    """`rotate` at one position or several: of each element the cosine, and the sine as the pair's other half takes it.

    Attributes:
      cos: `[*positions, width]`.
      sin: `[*positions, width]`, negative in the first half.
      layout: of the call.
    """

    cos: jax.Array
    sin: jax.Array
    layout: Layout

    @classmethod
    def of(cls, cos: Any, sin: Any, place: tuple[Any, ...], mask: jax.Array | None, layout: Layout) -> Rotation:
        """That of the positions at `place`; where those are several, it is an array `[positions, 1]`."""
        half = layout.head_dim // 2
        column, _ = layout.columns()
        angle = _beside(place, jax.lax.rem(column, half))
        cosines, sines = (load(x, (*place, angle), mask) for x in (cos, sin))
        return cls(cosines, jnp.where(_beside(place, column) < half, -sines, sines), layout)

    def __call__(self, ref: Any, place: tuple[Any, ...], mask: jax.Array | None) -> jax.Array:
        """The heads at `place` of `ref`, rotated, float32."""
        column, _ = self.layout.columns()
        other = jax.lax.rem(column + self.layout.head_dim // 2, self.layout.head_dim)
        first, second = (load(ref, (*place, _beside(place, x)), mask) for x in (column, other))
        return first * self.cos + second * self.sin


def _beside(place: tuple[Any, ...], column: jax.Array) -> jax.Array:
    """`column`, as the last axis of what is at `place`."""
    return column[None, :] if any(np.ndim(x) == 2 for x in place) else column


def load(ref: Any, place: tuple[Any, ...], mask: jax.Array | None) -> jax.Array:
    """What lies at `place`, float32."""
    other = None if mask is None else jnp.zeros((), ref.dtype)
    return triton.load(ref.at[place], mask=mask, other=other).astype(jnp.float32)


@dataclass(frozen=True, slots=True)
class Held:
    """Keys or values `[*positions, width]` as pages hold them, and their scales `[*positions]` where those have any."""

    numbers: jax.Array
    scale: jax.Array | None

    @classmethod
    def of(cls, x: jax.Array, dtype: Any) -> Held:
        """float32 `x` in pages of `dtype`, rounded as XLA's `cached_attention` does."""
        if dtype == e4m3.CODES:
            sign = (jax.lax.bitcast_convert_type(x, jnp.int32) >> 24) & 0x80
            return cls(jnp.where(x == x, to_float8(x), sign | FLOAT8_NAN).astype(dtype), None)
        if dtype != jnp.int8:
            return cls(x.astype(dtype), None)
        # Triton's maximum passes over what is no number.
        unknown = jnp.max(jnp.where(x == x, 0, 1), axis=-1) > 0
        scale = jnp.where(unknown, np.float32(np.nan), jnp.max(jnp.abs(x), axis=-1) * np.float32(1 / MOST))
        usable = (scale >= np.finfo(np.float32).tiny) & (scale < np.float32(np.inf))
        codes = jnp.where(usable[..., None], round_to_even(x * (1 / scale)[..., None]), 0)
        return cls(jnp.clip(codes, -MOST, MOST).astype(jnp.int8), scale)


def write(
    newest: tuple[Held, Held],
    pages: list[Any],
    page_table: Any,
    row: Any,
    head: Any,
    position: Any,
    writes: Any,
    layout: Layout,
) -> None:
    """Puts keys and values of `position`, one or `[positions]`, where the table says.

    But for those that `writes` says no of, that are past the table's end, or that the table has in the null page.
    """
    inside = writes & (position < layout.positions)
    page = page_table[row, jnp.where(inside, jax.lax.div(position, layout.page_size), 0)]
    # Interpreted, a store that is masked writes what was there, and must not do so where another one writes.
    page = jnp.where(inside, page, NULL_PAGE)
    writes = inside & (page != NULL_PAGE)
    offset = jax.lax.rem(position, layout.page_size)
    column, exists = layout.columns()
    several = np.ndim(position) == 1
    place = (page[:, None], head, offset[:, None], column[None, :]) if several else (page, head, offset, column)
    shape = (*np.shape(position), layout.width)
    mask = jnp.broadcast_to(writes[:, None] if several else writes, shape)
    mask = mask if exists is None else mask & jnp.broadcast_to(exists, shape)
    for of, held in enumerate(newest):
        triton.store(pages[of].at[place], held.numbers, mask=mask)
        if held.scale is not None:
            triton.store(pages[2 + of].at[page, head, offset], held.scale, mask=writes)
