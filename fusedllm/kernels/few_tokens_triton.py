"""Products of a few tokens with Pallas, and what stands around them in a layer: add and norm before, SwiGLU after.

With few tokens a product is a matter of reading the weights, so that no matrix unit is needed: each program of the grid
reads whole rows of a weight at once, many bytes a thread before the first is used, multiplies them with activations in
float32 and adds up. There are no partial sums, and what comes before (the sum of the residual stream, its norm) every
program does again, on numbers that are in the cache of its processor: it costs a launch less, and no time of its own,
since the weights are asked for first. The scale of the norm is outside of the sum, and multiplies that.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from fusedllm.kernels.few_tokens_plan import Columns, Kind, Part, Plan
from fusedllm.kernels.triton_tiles import from_float8, iota, launch
from fusedllm.qarray import QuantArray


@functools.partial(jax.jit, static_argnames=("eps", "gated", "out_dtype", "interpret", "native_float8"))
def products_triton(
    x: jax.Array,
    weights: tuple[jax.Array | QuantArray, ...],
    *,
    norm: jax.Array | None = None,
    delta: jax.Array | None = None,
    biases: tuple[jax.Array | None, ...] = (),
    eps: float = 0.0,
    gated: bool = False,
    out_dtype: np.dtype,
    interpret: bool,
    native_float8: bool | None = None,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The products of `x` `[tokens, in]`, up to `MOST_FEW_TOKENS` tokens, with `weights` `[out, in]`, in one launch.

    With `norm` they are those of the RMS norm of `x + delta`. If `gated` there are two weights, and the result is one:
    SwiGLU of their products, each with its bias. `native_float8` is what `from_float8` asks.

    Returns:
      `x + delta` (`x` where there is no `delta`), and the products as `out_dtype`.
    """
    tokens = x.shape[0]
    kinds = tuple(Kind.of(weight) for weight in weights)
    plan = Plan.of(tokens, kinds, gated)
    operands = [x, *([] if delta is None else [delta]), *([] if norm is None else [norm])]
    for weight in weights:
        if isinstance(weight, QuantArray):
            assert weight.scales is not None
            operands += [weight.values, weight.scales, *([] if weight.zeros is None else [weight.zeros])]
        else:
            operands.append(weight)
    biases = biases or (None,) * len(weights)
    operands += [bias for bias in biases if bias is not None]
    out = [jax.ShapeDtypeStruct((tokens, part.height), out_dtype) for part in plan.parts]
    if delta is not None:
        out.append(jax.ShapeDtypeStruct(x.shape, x.dtype))
    given = tuple(bias is not None for bias in biases)
    step = _Step(plan, kinds, delta is not None, norm is not None, given, eps, gated, native_float8)

    # What a profile calls it.
    def few_tokens(*refs: Any) -> None:
        step.run(*refs)

    made = launch(few_tokens, (plan.programs,), out, *operands, warps=plan.warps, stages=1, interpret=interpret)
    total = x if delta is None else made[-1]
    return total, tuple(made[: len(plan.parts)])


@dataclass(frozen=True)
class _Step:
    """The kernel: `run` is called with references to all operands and results."""

    plan: Plan
    kinds: tuple[Kind, ...]
    adds: bool
    norms: bool
    biased: tuple[bool, ...]
    eps: float
    gated: bool
    native_float8: bool | None

    def run(self, *refs: Any) -> None:
        left = iter(refs)
        inputs = _Inputs(next(left), next(left) if self.adds else None, next(left) if self.norms else None, self.eps)
        matrices = [_Matrix.of(kind, left) for kind in self.kinds]
        biases = [next(left) if given else None for given in self.biased]
        results = [next(left) for _ in self.plan.parts]
        number = pl.program_id(0)
        if self.adds:
            total = next(left)
            pl.when(number == 0)(lambda: self._write_total(inputs, total))
        for part, result in zip(self.plan.parts, results, strict=True):
            some = [(matrices[weight], biases[weight]) for weight in part.weights]
            multiply = functools.partial(self._multiply, number - part.first, inputs, some, part, result)
            if len(self.plan.parts) == 1:
                multiply()
            else:
                pl.when((number >= part.first) & (number < part.first + part.programs))(multiply)

    def _write_total(self, inputs: _Inputs, total: Any) -> None:
        for columns in self.plan.columns:
            for token in range(inputs.tokens):
                value = inputs.total(token, columns)
                place = columns.begin + iota(columns.count)
                mask = place < inputs.width if columns.masked else None
                triton.store(total.at[token, place], value.astype(total.dtype), mask=mask)

    def _multiply(self, block: Any, inputs: _Inputs, some: list[tuple[_Matrix, Any]], part: Part, result: Any) -> None:
        place = block * part.rows + iota(part.rows)
        there = place < part.height if part.height % part.rows else None
        # All of it before anything waits for any of it.
        raw = [[matrix.read(place, there, columns) for columns in self.plan.columns] for matrix, _ in some]
        squares = [jnp.float32(0)] * inputs.tokens
        sums = [[jnp.zeros(part.rows, jnp.float32)] * inputs.tokens for _ in some]
        for turn, columns in enumerate(self.plan.columns):
            decoded = [matrix.decode(raw[at][turn], self.native_float8) for at, (matrix, _) in enumerate(some)]
            for token in range(inputs.tokens):
                total = inputs.total(token, columns)
                squares[token] += jnp.sum(total * total) if self.norms else 0
                values = inputs.weighted(total, columns)
                for at, (matrix, _) in enumerate(some):
                    sums[at][token] += matrix.dot(decoded[at], values, place, there, columns)
        for token in range(inputs.tokens):
            scale = jax.lax.rsqrt(squares[token] / inputs.width + self.eps) if self.norms else 1
            made = [sums[at][token] * scale for at in range(len(some))]
            for at, (_, bias) in enumerate(some):
                if bias is not None:
                    made[at] += _load(bias.at[place], there).astype(jnp.float32)
            product = made[0] / (1 + jnp.exp(-made[0])) * made[1] if self.gated else made[0]
            triton.store(result.at[token, place], product.astype(result.dtype), mask=there)


class _Inputs(NamedTuple):
    """References to the activations, to what is added to them, and to the weight of their norm."""

    x: Any
    delta: Any
    norm: Any
    eps: float

    @property
    def tokens(self) -> int:
        return int(self.x.shape[0])

    @property
    def width(self) -> int:
        return int(self.x.shape[1])

    def total(self, token: int, columns: Columns) -> jax.Array:
        """`x + delta`, rounded as it is where it is stored, float32 `[count]`; zeros beyond the end."""
        place = columns.begin + iota(columns.count)
        mask = place < self.width if columns.masked else None
        value = _load(self.x.at[token, place], mask).astype(jnp.float32)
        if self.delta is not None:
            value = value + _load(self.delta.at[token, place], mask).astype(jnp.float32)
            value = value.astype(self.x.dtype).astype(jnp.float32)
        return value

    def weighted(self, total: jax.Array, columns: Columns) -> jax.Array:
        """`total` times the weight of the norm."""
        if self.norm is None:
            return total
        place = columns.begin + iota(columns.count)
        return total * _load(self.norm.at[place], place < self.width if columns.masked else None).astype(jnp.float32)


class _Matrix(NamedTuple):
    """References to a weight."""

    kind: Kind
    values: Any
    scales: Any = None
    zeros: Any = None

    @classmethod
    def of(cls, kind: Kind, left: Iterator[Any]) -> _Matrix:
        if kind.scheme is None:
            return cls(kind, next(left))
        return cls(kind, next(left), next(left), None if kind.scheme.symmetric else next(left))

    def read(self, rows: jax.Array, there: jax.Array | None, columns: Columns) -> jax.Array:
        """What memory has of `columns`, `[rows, groups, elements]`; zeros beyond the end."""
        groups = self.kind.groups(columns.count)
        each = columns.count // self.kind.together // groups
        place = columns.begin // self.kind.together + (iota(groups)[:, None] * each + iota(each)[None, :])
        mask = None if there is None else there[:, None, None]
        if columns.masked:
            inside = (place < self.values.shape[1])[None]
            mask = inside if mask is None else mask & inside
        if mask is not None:
            mask = jnp.broadcast_to(mask, (len(rows), groups, each))
        # Nobody reads it again before the next token.
        return _load(self.values.at[rows[:, None, None], place[None]], mask, "evict_first")

    def decode(self, raw: jax.Array, native_float8: bool | None) -> list[jax.Array]:
        """Of each element its codes as float32, without zero points."""
        scheme = self.kind.scheme
        if scheme is None:
            return [raw.astype(jnp.float32)]
        if scheme.bits == 8:
            codes = jax.lax.bitcast_convert_type(raw, jnp.int8)
            return [from_float8(codes, native_float8) if scheme.codes == "float8" else codes.astype(jnp.float32)]
        wide = raw.astype(jnp.int32)
        return [(wide & 15).astype(jnp.float32), (wide >> 4).astype(jnp.float32)]

    def dot(
        self,
        decoded: list[jax.Array],
        values: jax.Array,
        rows: jax.Array,
        there: jax.Array | None,
        columns: Columns,
    ) -> jax.Array:
        """The sum over `columns` of the weights times `values` `[count]`, float32 `[rows]`."""
        groups = self.kind.groups(columns.count)
        planes = _planes(values, groups, len(decoded))
        terms = [jnp.sum(codes * plane[None], axis=2) for codes, plane in zip(decoded, planes, strict=True)]
        sums: jax.Array = functools.reduce(operator.add, terms)
        scheme = self.kind.scheme
        if scheme is None:
            return jnp.sum(sums, axis=1)
        place = iota(groups)[None, :]
        mask = None if there is None else there[:, None]
        if scheme.group_size:
            place = place + columns.begin // scheme.group_size
            if columns.masked:
                inside = place < self.scales.shape[1]
                mask = inside if mask is None else mask & inside
        mask = None if mask is None else jnp.broadcast_to(mask, (len(rows), groups))
        where = (rows[:, None], place)
        # A zero point is the same for all of a group, and so multiplies the sum of what it meets.
        if self.zeros is not None or scheme.center:
            met = functools.reduce(operator.add, [jnp.sum(plane, axis=1) for plane in planes])[None, :]
            zero = np.float32(scheme.center)
            sums = sums - met * (zero if self.zeros is None else _load(self.zeros.at[where], mask).astype(jnp.float32))
        return jnp.sum(sums * _load(self.scales.at[where], mask).astype(jnp.float32), axis=1)


def _planes(values: jax.Array, groups: int, count: int) -> list[jax.Array]:
    """`values` `[columns]` as `[groups, elements]`: those that meet the first code of each element, the second..."""
    if count == 1:
        return [values.reshape(groups, -1)]
    apart = values.reshape(groups, -1, count)
    which = iota(count)[None, None, :]
    return [jnp.sum(jnp.where(which == plane, apart, np.float32(0)), axis=2) for plane in range(count)]


def _load(view: Any, mask: jax.Array | None, eviction: str | None = None) -> jax.Array:
    other = None if mask is None else jnp.zeros((), view.dtype)
    return triton.load(view, mask=mask, other=other, eviction_policy=eviction)
