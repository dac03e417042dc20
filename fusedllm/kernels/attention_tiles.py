"""What the attention kernels of Pallas share: keys and values gathered through a page table, and the online softmax.

A tile has a row for each pair of a query and a head that shares its keys, so that keys and values are read once for all
of them. Products are those of matrix units, sums and the softmax float32 (online softmax, arXiv:1805.02867;
FlashAttention-2, arXiv:2307.08691; paged attention, arXiv:2309.06180).
"""

from __future__ import annotations

import functools
import math
import operator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import triton

from fusedllm.kernels import e4m3
from fusedllm.kernels.attention import MASKED
from fusedllm.kernels.attention_support import multiplied_in, power_of_two
from fusedllm.kernels.linear_triton import as_terms
from fusedllm.kernels.pallas_support import casts_float8, interprets
from fusedllm.kernels.triton_tiles import from_float8, iota

# Total, sum of weights, and largest score, of each row of a tile.
State = tuple[jax.Array, jax.Array, jax.Array]

# That, and the pages of the block that is next.
Carry = tuple[State, jax.Array]


@dataclass(frozen=True, slots=True)
class Layout:
    """What a kernel knows of its operands before it runs.

    Attributes:
      group: query heads that share a KV head.
      head_dim: elements of a head.
      page_size: positions in a page.
      table: pages in a row of the page table.
      window: the latest positions that a query sees, or `None` for all.
      wide: the dtype in which numbers are multiplied.
      scaled: whether what the pages hold is multiplied by its position's scale.
      native_float8: whether codes of e4m3 are read by an instruction.
    """

    group: int
    head_dim: int
    page_size: int
    table: int
    window: int | None
    wide: np.dtype
    scaled: bool
    native_float8: bool

    @classmethod
    def of(cls, q: jax.Array, pages: tuple[jax.Array, ...], page_table: jax.Array, window: int | None) -> Layout:
        """That of a call."""
        return cls(
            group=q.shape[2] // pages[0].shape[1],
            head_dim=q.shape[3],
            page_size=pages[0].shape[2],
            table=page_table.shape[1],
            window=window,
            wide=multiplied_in(q.dtype, pages[0].dtype),
            scaled=len(pages) == 4,
            native_float8=not interprets() and casts_float8(),
        )

    @property
    def positions(self) -> int:
        """That the table has pages for."""
        return self.table * self.page_size

    @property
    def width(self) -> int:
        """Columns of a tile: elements of a head, up to a power of two."""
        return power_of_two(self.head_dim)

    @property
    def scale(self) -> np.float32:
        """By which products of queries and keys are multiplied, to be exponents of two."""
        return np.float32(math.log2(math.e) / math.sqrt(self.head_dim))

    def columns(self) -> tuple[jax.Array, jax.Array | None]:
        """The elements of a head `[width]`, and which of them there are; `None` if all."""
        column = iota(self.width)
        return column, None if self.width == self.head_dim else column < self.head_dim

    def first_seen(self, position: Any) -> Any:
        """The first position that a query at `position` sees."""
        return 0 if self.window is None else jnp.maximum(position - self.window + 1, 0)


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys and values of one KV head of one row, that a program reads block after block.

    Attributes:
      layout: of the call.
      pages: references to K and V and, where these are scaled, to the scales of both.
      page_table: a reference.
      row: of the batch.
      head: of K and V.
      count: positions in a block.
      bounds: the first position that is read, and the one behind the last; no number that lies elsewhere matters.
    """

    layout: Layout
    pages: tuple[Any, ...]
    page_table: Any
    row: Any
    head: Any
    count: int
    bounds: tuple[Any, Any]

    def loop(self, q: jax.Array, carry: Carry, blocks: tuple[Any, Any], visible: Any) -> Carry:
        """`carry` after the blocks from the first of `blocks` to the one before the second.

        `visible` says which of the keys at positions `[1, count]` rows see; `None` stands for all, and that all are
        within `bounds`.
        """

        def visit(index: Any, carry: Carry) -> Carry:
            state, pages = carry
            # Asked for a turn ahead: with a load that waits for another one's answer Triton keeps fewer under way.
            following = self.pages_of(index + 1)
            return self._visit(q, state, pages, index, visible), following

        return jax.lax.fori_loop(*blocks, visit, carry)

    def pages_of(self, index: Any) -> jax.Array:
        """The pages that hold the positions of block `index`, int32 `[count]`."""
        position = index * self.count + iota(self.count)
        return _load(self.page_table, (self.row, jax.lax.div(position, self.layout.page_size)), self._there(position))

    def _there(self, position: jax.Array) -> jax.Array:
        return (position >= self.bounds[0]) & (position < self.bounds[1])

    def _visit(self, q: jax.Array, state: State, pages: jax.Array, index: Any, visible: Any) -> State:
        layout = self.layout
        position = index * self.count + iota(self.count)
        there = None if visible is None else self._there(position)
        place = (pages, self.head, jax.lax.rem(position, layout.page_size))
        scales = [_load(held, place, there) for held in self.pages[2:]]
        scores = product(q, self._numbers(0, place, there), layout.wide, 1)
        if scales:
            scores = scores * scales[0][None, :]
        if visible is not None:
            scores = jnp.where(visible(position[None, :]), scores, np.float32(MASKED))
        total, weight_sum, highest = state
        new_highest = jnp.maximum(highest, scores.max(axis=1) * layout.scale)
        weights = jnp.exp2(scores * layout.scale - new_highest[:, None])
        rescale = jnp.exp2(highest - new_highest)
        weight_sum = weight_sum * rescale + weights.sum(axis=1)
        values = self._numbers(1, place, there)
        if scales and layout.wide == jnp.float16:
            # A weight times a scale may be less than float16 can tell from zero.
            values = (values.astype(jnp.float32) * scales[1][:, None]).astype(layout.wide)
        elif scales:
            weights = weights * scales[1][None, :]
        return total * rescale[:, None] + product(weights, values, layout.wide, 0), weight_sum, new_highest

    def _numbers(self, of: int, place: tuple[Any, Any, Any], there: jax.Array | None) -> jax.Array:
        """Keys or values `[count, width]`, with zeros for what there is not."""
        column, inside = self.layout.columns()
        page, head, offset = place
        shape = (page.shape[0], self.layout.width)
        masks = [] if there is None else [there[:, None]]
        masks += [] if inside is None else [inside[None, :]]
        mask = jnp.broadcast_to(functools.reduce(operator.and_, masks), shape) if masks else None
        held = _load(self.pages[of], (page[:, None], head, offset[:, None], column[None, :]), mask)
        return from_held(held, self.layout)


def _load(ref: Any, place: tuple[Any, ...], mask: jax.Array | None) -> jax.Array:
    return triton.load(ref.at[place], mask=mask, other=None if mask is None else jnp.zeros((), ref.dtype))


def from_held(held: jax.Array, layout: Layout) -> jax.Array:
    """What pages hold as numbers in a dtype that has them exactly; of int8 the codes."""
    if held.dtype != e4m3.CODES:
        return held
    narrow = jnp.bfloat16 if layout.wide == jnp.float32 else layout.wide
    return from_float8(held, layout.native_float8).astype(narrow)


def product(left: jax.Array, right: jax.Array, wide: np.dtype, contracted: int) -> jax.Array:
    """`left` `[rows, n]` times `right`, summed over the axis `contracted` of that, in `wide`, to float32.

    float32 are three bfloat16 each; of their products those that are as small as its last bit are left out.
    """
    parts = [as_terms(x, wide, 3) for x in (left, right)]
    pairs = [(i, j) for i in range(len(parts[0])) for j in range(len(parts[1])) if i + j < 3]
    products = [
        jax.lax.dot_general(
            parts[0][i], parts[1][j], (((1,), (contracted,)), ((), ())), preferred_element_type=jnp.float32
        )
        for i, j in sorted(pairs, key=sum, reverse=True)
    ]
    return functools.reduce(operator.add, products)


def nothing_seen(rows: int, width: int) -> State:
    """The state before the first key."""
    return (
        jnp.zeros((rows, width), jnp.float32),
        jnp.zeros((rows,), jnp.float32),
        jnp.full((rows,), MASKED, jnp.float32),
    )


def weighted(state: State) -> jax.Array:
    """What the keys of `state` mix; zeros where there was none."""
    total, weight_sum, _ = state
    return total / jnp.where(weight_sum == 0, np.float32(1), weight_sum)[:, None]
