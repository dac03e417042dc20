"""`allocate`: a scheme for each tensor, so that all together have so many bits and lose the least."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

from fusedllm.errors import QuantizationError


@dataclass(frozen=True, slots=True)
class Choice:
    """What one tensor could become: a name for it, the bits that it takes, and the loss that is expected of it."""

    name: str
    bits: int
    loss: float


def allocate(choices: Mapping[str, list[Choice]], budget: int) -> dict[str, str]:
    """The name of a choice for each tensor, whose bits are `budget` at most.

    Losses are taken to add up. Each tensor begins with its least bits and goes along the lower convex hull of its
    choices; the step that saves the most loss for a bit is taken next (Shoham and Gersho, "Efficient bit allocation for
    an arbitrary set of quantizers", 1988), and steps that do not fit any more are passed over.

    Raises:
      QuantizationError: even the least bits are more.
    """
    hulls = {tensor: _hull(some) for tensor, some in choices.items()}
    at = dict.fromkeys(hulls, 0)
    left = budget - sum(hull[0].bits for hull in hulls.values())
    if left < 0:
        raise QuantizationError(
            f"the least that these schemes take is {budget - left:,} bits, and {budget:,} were asked for: allow more "
            "bits per weight."
        )
    steps: list[tuple[float, str]] = []

    def offer(tensor: str) -> None:
        hull, index = hulls[tensor], at[tensor]
        if index + 1 < len(hull):
            now, then = hull[index], hull[index + 1]
            heapq.heappush(steps, ((then.loss - now.loss) / (then.bits - now.bits), tensor))

    for tensor in hulls:
        offer(tensor)
    while steps:
        _, tensor = heapq.heappop(steps)
        hull, index = hulls[tensor], at[tensor]
        more = hull[index + 1].bits - hull[index].bits
        if more > left:
            continue
        left -= more
        at[tensor] += 1
        offer(tensor)
    return {tensor: hulls[tensor][index].name for tensor, index in at.items()}


def _hull(choices: list[Choice]) -> list[Choice]:
    """The lower convex hull of losses over bits, from the least bits to the least loss."""
    hull: list[Choice] = []
    for choice in sorted(choices, key=lambda one: (one.bits, one.loss)):
        if hull and choice.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _slope(one: Choice, other: Choice) -> float:
    return (other.loss - one.loss) / max(1, other.bits - one.bits)
