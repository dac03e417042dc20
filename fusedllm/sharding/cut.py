"""`piece`: the part of a quantized matrix in the host's memory that one device multiplies with."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from fusedllm.errors import ShardingError
from fusedllm.kernels.grouped import CODES_TOGETHER, GroupedScheme
from fusedllm.kernels.walsh import block_of
from fusedllm.qarray import QuantArray
from fusedllm.quant.blocks import BlockScheme


def piece(array: QuantArray, at: Sequence[int], counts: Sequence[int], *, what: str = "a matrix") -> QuantArray:
    """Part `at = (i, j)` of `array`, whose rows are cut into `counts[0]` and columns into `counts[1]` equal parts.

    Rows can be cut everywhere, columns between groups of weights that share a scale. The buffers are views.

    Raises:
      ShardingError: the parts would not be equal, or cut through a group.
    """
    check(array, counts, what=what)
    rows, width = (size // count for size, count in zip(array.shape, counts, strict=True))
    down = slice(at[0] * rows, (at[0] + 1) * rows)

    def part(numbers: Any, columns: int) -> Any:
        if numbers is None:
            return None
        step = numbers.shape[1] // columns
        first = at[1] * step if columns > 1 else 0
        return numbers[down, first : first + step]

    # One scale for the whole row is the scale of each of its parts.
    grouped = counts[1] if not isinstance(array.scheme, GroupedScheme) or array.scheme.group_size else 1
    return dataclasses.replace(
        array,
        values=part(array.values, counts[1]),
        scales=part(array.scales, grouped),
        zeros=part(array.zeros, grouped),
        shape=(rows, width),
    )


def check(array: QuantArray, counts: Sequence[int], *, what: str) -> None:
    """Whether `array` can be cut so; raises as `piece` does."""
    scheme = array.scheme
    for size, count, words in zip(array.shape, counts, ("rows", "columns"), strict=True):
        if size % count:
            raise ShardingError(f"the {size} {words} of {what} can't be cut into {count} equal parts.")
    if counts[1] == 1:
        return
    width = array.shape[1]
    if isinstance(scheme, BlockScheme):
        unit = scheme.block_size
    elif isinstance(scheme, GroupedScheme):
        unit = scheme.group_size or (1 if scheme.bits == 8 else CODES_TOGETHER)
        if scheme.turned and block_of(width // counts[1]) != block_of(width):
            raise ShardingError(
                f"{what} is quantized as {scheme.name}, which turns {block_of(width)} columns together, and tp="
                f"{counts[1]} would cut through them; quantize it as w8a8."
            )
    else:
        raise ShardingError(f"{what} is quantized as {scheme.name}, whose columns can't be cut.")
    if width % (unit * counts[1]):
        raise ShardingError(
            f"{what} has {width} columns, quantized as {scheme.name} in groups of {unit}, and tp={counts[1]} would cut "
            "through one; choose another tp, smaller groups, or dtype float32 or bfloat16, which decodes the weights."
        )
