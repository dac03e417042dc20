"""How products of a few tokens are cut into programs: which rows each reads, and in which columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax.experimental.pallas import cdiv, next_power_of_2

from fusedllm.kernels.few_tokens_support import MOST_FEW_TOKENS
from fusedllm.kernels.grouped import GroupedScheme, grouped_scheme
from fusedllm.qarray import QuantArray


@dataclass(frozen=True, slots=True)
class Reading:
    """How the weights are read for some numbers of tokens.

    Attributes:
      up_to: the most tokens that this is for.
      thread_bytes: of weights, that a thread asks for at once.
      thread_weights: that these are at most.
      warps: of a program, the most first: those are taken that leave enough programs.
      programs: that there should be.
    """

    up_to: int
    thread_bytes: int
    thread_weights: int
    warps: tuple[int, ...]
    programs: int


# Reasoned, not measured; that no register is spilled was seen (ptxas for sm_90a). An H200 brings 4.8 TB/s after some
# 700 ns: 25 KB must be under way in each of its 132 processors. A program of 4 warps whose threads ask for 256 bytes
# (64 registers) has 32 KB under way, and two of them fit. Of narrow codes a thread has as many as its registers hold
# decoded, and of all of them fewer where there are activations and sums of more tokens.
READINGS = (
    Reading(up_to=1, thread_bytes=256, thread_weights=256, warps=(8, 4), programs=256),
    Reading(up_to=MOST_FEW_TOKENS, thread_bytes=128, thread_weights=64, warps=(8, 4), programs=256),
)

# How often both are halved where there would be too few programs otherwise.
MOST_HALVINGS = 2

# Columns are cut into powers of two, which need no mask, down to this.
LEAST_COLUMNS = 256

LANES = 32


@dataclass(frozen=True, slots=True)
class Columns:
    """Columns of all rows that are read at once, a power of two of them; `masked` says that some are beyond the end."""

    begin: int
    count: int
    masked: bool


@dataclass(frozen=True, slots=True)
class Part:
    """Programs of the grid that multiply with one weight, or with a pair of gate and up.

    Attributes:
      weights: numbers of them among the operands.
      first: program.
      programs: how many.
      rows: of each weight, of a program.
      height: rows of a weight in all.
    """

    weights: tuple[int, ...]
    first: int
    programs: int
    rows: int
    height: int


@dataclass(frozen=True, slots=True)
class Plan:
    """How the products of one launch are cut."""

    parts: tuple[Part, ...]
    columns: tuple[Columns, ...]
    warps: int

    @property
    def programs(self) -> int:
        """Of the grid."""
        return sum(part.programs for part in self.parts)

    @classmethod
    def of(cls, tokens: int, kinds: Sequence[Kind], gated: bool) -> Plan:
        """For weights of equal width; `gated` if they are those of a gate and of what it multiplies."""
        reading = next(row for row in READINGS if tokens <= row.up_to)
        least = reading.warps[-1]
        choices = [*((warps, 0) for warps in reading.warps), *((least, 1 + half) for half in range(MOST_HALVINGS))]
        columns = cut(kinds[0].width, max(kind.least_columns for kind in kinds))
        for warps, halvings in choices:
            plan = cls(_parts(kinds, gated, reading, warps * LANES >> halvings), columns, warps)
            if plan.programs >= reading.programs:
                break
        return plan


@dataclass(frozen=True, slots=True)
class Kind:
    """What of a weight decides how it is read: its shape, bits, and codes where it has any."""

    height: int
    width: int
    bits: int
    scheme: GroupedScheme | None

    @classmethod
    def of(cls, weight: jax.Array | QuantArray) -> Kind:
        """That of `weight`, one that `why_not_few_tokens` has nothing against."""
        scheme = grouped_scheme(weight)
        height, width = weight.shape
        if scheme is not None:
            return cls(height, width, scheme.bits, scheme)
        assert not isinstance(weight, QuantArray)
        return cls(height, width, 8 * weight.dtype.itemsize, None)

    @property
    def together(self) -> int:
        """Codes of a byte."""
        return 1 if self.scheme is None else 8 // self.bits

    @property
    def least_columns(self) -> int:
        """That columns are cut to: whole groups."""
        return max(LEAST_COLUMNS, 0 if self.scheme is None else self.scheme.group_size)

    def groups(self, count: int) -> int:
        """Groups of `count` columns; 1 where a scale, or none, is that of the whole row."""
        return count // self.scheme.group_size if self.scheme is not None and self.scheme.group_size else 1


def _parts(kinds: Sequence[Kind], gated: bool, reading: Reading, threads: int) -> tuple[Part, ...]:
    together = len(kinds) if gated else 1
    parts: list[Part] = []
    first = 0
    for number in range(0, len(kinds), together):
        some = kinds[number : number + together]
        weights = sum(kind.width for kind in some)
        bytes_ = sum(cdiv(kind.width * kind.bits, 8) for kind in some)
        most = min(threads * reading.thread_weights // weights, threads * reading.thread_bytes // bytes_)
        rows = 1 << max(0, most.bit_length() - 1)
        rows = min(rows, next_power_of_2(some[0].height))
        programs = cdiv(some[0].height, rows)
        parts.append(Part(tuple(range(number, number + together)), first, programs, rows, some[0].height))
        first += programs
    return tuple(parts)


def cut(width: int, least: int) -> tuple[Columns, ...]:
    """`width` columns as falling powers of two; only the last may go beyond the end, and none is below `least`."""
    columns, begin = [], 0
    while begin < width:
        left = width - begin
        fits = 1 << (left.bit_length() - 1)
        # A power of two more costs less than many small ones.
        count = fits if fits >= least and (fits == left or left - fits >= least) else next_power_of_2(left)
        count = max(count, least)
        columns.append(Columns(begin, count, begin + count > width))
        begin += count
    return tuple(columns)
