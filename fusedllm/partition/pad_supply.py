"""The rows of pads that wait for their use: how many there may be, what they took, and how they come and go."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

import numpy as np


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """How many pads there are.

    Attributes:
      capacity: rows of a site that wait for their use.
      low_water: a site that has fewer is refilled up to its capacity.
      batch: rows of one product: a weight matrix is read once for as many.
      exhausted: what `take` does where there are too few rows: `wait` for the background, `make` them itself at the
        price of the offline phase, or `raise`.
      seconds: that it waits at most.
    """

    capacity: int = 64
    low_water: int = 16
    batch: int = 64
    exhausted: Literal["wait", "make", "raise"] = "wait"
    seconds: float = 10.0

    def __post_init__(self) -> None:
        if not (0 <= self.low_water <= self.capacity and self.capacity > 0 and self.batch > 0 and self.seconds >= 0):
            raise ValueError(
                f"a pool of pads has a positive capacity and batch, and a low-water mark within the capacity, got "
                f"{self}."
            )


@dataclass(frozen=True, slots=True)
class PadReport:
    """The offline phase of a site so far.

    Attributes:
      rows: that were made.
      waiting: rows that wait for their use.
      row_bytes: storage of a row, r and r W.
      draw_seconds: of the generator.
      product_seconds: of the products r W.
    """

    rows: int
    waiting: int
    row_bytes: int
    draw_seconds: float
    product_seconds: float

    @property
    def rows_per_second(self) -> float:
        """Rows made a second of the offline phase."""
        return self.rows / self.seconds if self.seconds else 0.0

    @property
    def seconds(self) -> float:
        """Of the offline phase."""
        return self.draw_seconds + self.product_seconds

    @property
    def waiting_bytes(self) -> int:
        """Storage of the rows that wait."""
        return self.waiting * self.row_bytes


@dataclass(slots=True)
class Segment:
    """Rows of r and r W in the order of their numbers."""

    first: int
    r: np.ndarray
    product: np.ndarray

    def part(self, begin: int, end: int | None) -> Segment:
        """Some of the rows, in the same memory."""
        return Segment(self.first + begin, self.r[begin:end], self.product[begin:end])

    def overwrite(self) -> None:
        """Leaves zeros."""
        self.r.fill(0)
        self.product.fill(0)


@dataclass(slots=True)
class Supply:
    """The rows of one site that wait for their use, the oldest first, and what they took."""

    weight: np.ndarray
    name: str
    segments: deque[Segment] = field(default_factory=deque)
    waiting: int = 0
    made: int = 0
    filling: bool = True
    draw_seconds: float = 0.0
    product_seconds: float = 0.0

    def report(self) -> PadReport:
        """The offline phase so far."""
        row_bytes = 4 * sum(self.weight.shape)
        return PadReport(self.made, self.waiting, row_bytes, self.draw_seconds, self.product_seconds)

    def put(self, r: np.ndarray, product: np.ndarray) -> None:
        """Adds rows that were made, which get the next numbers."""
        self.segments.append(Segment(self.made, r, product))
        self.made += len(r)
        self.waiting += len(r)

    def pop(self, rows: int) -> list[Segment]:
        """Moves the oldest `rows` out, of as many as wait."""
        pieces = []
        self.waiting -= rows
        while rows:
            segment = self.segments.popleft()
            if len(segment.r) > rows:
                self.segments.appendleft(segment.part(rows, None))
                segment = segment.part(0, rows)
            pieces.append(segment)
            rows -= len(segment.r)
        return pieces

    def clear(self) -> None:
        """Overwrites all rows that wait."""
        for segment in self.segments:
            segment.overwrite()
        self.segments, self.waiting = deque(), 0


def joined(pieces: list[Segment]) -> tuple[np.ndarray, np.ndarray]:
    """One r and r W of rows that have followed each other in the pool."""
    if len(pieces) == 1:
        return pieces[0].r, pieces[0].product
    together = np.concatenate([piece.r for piece in pieces]), np.concatenate([piece.product for piece in pieces])
    for piece in pieces:
        piece.overwrite()
    return together
