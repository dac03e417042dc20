"""`Spreader`: a checkpoint's tensors onto the devices of a mesh, to each its part, and no more than that."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from fusedllm.kernels import packed
from fusedllm.model.params import ParamSpec
from fusedllm.qarray import QuantArray
from fusedllm.sharding.cut import check, piece
from fusedllm.sharding.layout import Layout
from fusedllm.weights.arena import ALIGNMENT, Arena, aligned_empty

# Rows and columns of a buffer, as jax names a part of it.
Index = tuple[slice, ...]


class Spreader:
    """Puts tensors on a mesh; `count` hears of the bytes that were made for it, and why."""

    def __init__(self, layout: Layout, count: Callable[[str, int], object]) -> None:
        self._layout = layout
        self._count = count
        self._arena = Arena()

    def plain(self, values: np.ndarray, dtype: np.dtype, spec: ParamSpec, reason: str | None = None) -> jax.Array:
        """`values` in `dtype`, cut as the axes of `spec` say."""
        reason = reason or ("cut for a mesh" if values.dtype == dtype else f"cast from {values.dtype} to {dtype}")
        return self._cut(values, dtype, self._layout.sharding(spec.axes, spec.name), reason)

    def codes(self, array: QuantArray, spec: ParamSpec) -> QuantArray:
        """Blocks or grouped codes as they are, cut between groups.

        Raises:
          ShardingError: they can't be.
        """
        check(array, self._counts(spec), what=spec.name)
        return dataclasses.replace(
            array,
            values=self._buffer(array, "values", spec),
            scales=None if array.scales is None else self._buffer(array, "scales", spec),
            zeros=None if array.zeros is None else self._buffer(array, "zeros", spec),
        )

    def packed(self, array: QuantArray, spec: ParamSpec) -> QuantArray | None:
        """Each part in the native kernels' layout, as a matrix of its own; `None` where a part has none.

        Raises:
          ShardingError: a part would begin inside of a group.
        """
        counts = self._counts(spec)
        first = piece(array, (0, 0), counts, what=spec.name)
        # Whether float16 holds the scales is asked of all of them, so that the parts are alike.
        layout = packed.layout_of(first) if packed.layout_of(array) is not None else None
        if layout is None:
            return None
        shape = layout.packed_shape(first.shape)

        def make(index: Index) -> np.ndarray:
            at = [(part.start or 0) // size for part, size in zip(index, shape, strict=True)]
            place = self._arena.take(math.prod(shape)).reshape(shape)
            packed.pack(_contiguous(piece(array, at, counts, what=spec.name)), layout, place)
            place.flags.writeable = False
            self._count(f"packed from {array.scheme.name}", place.nbytes)
            return place

        whole = tuple(size * count for size, count in zip(shape, counts, strict=True))
        values = self._spread(whole, self._layout.sharding(spec.axes, spec.name), make)
        return QuantArray(values, None, None, layout, array.shape)

    def _counts(self, spec: ParamSpec) -> tuple[int, ...]:
        return self._layout.counts(spec.axes, spec.name)

    def _buffer(self, array: QuantArray, name: str, spec: ParamSpec) -> jax.Array:
        counts, buffer = self._counts(spec), getattr(array, name)
        part = getattr(piece(array, (0, 0), counts, what=spec.name), name)
        sharding = self._layout.sharding(spec.axes, spec.name)
        # What its parts share, such as the scales of whole rows, is not cut along the columns.
        cut = [
            axis if of_part < size else None
            for axis, of_part, size in zip(sharding.spec, part.shape, buffer.shape, strict=True)
        ]
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*cut))
        return self._cut(np.asarray(buffer), buffer.dtype, sharding, "cut for a mesh")

    def _cut(self, values: np.ndarray, dtype: np.dtype, sharding: NamedSharding, reason: str) -> jax.Array:
        return self._spread(values.shape, sharding, lambda index: self._held(values[index], dtype, reason))

    def _spread(
        self, shape: tuple[int, ...], sharding: NamedSharding, make: Callable[[Index], np.ndarray]
    ) -> jax.Array:
        """One part for each place in the array: devices of a CPU that have the same share its memory."""
        made: dict[Any, np.ndarray] = {}

        def part(index: Index | None) -> np.ndarray:
            index = index or ()
            key = tuple((one.start, one.stop) for one in index)
            if key not in made:
                made[key] = make(index)
            return made[key]

        array = jax.make_array_from_callback(shape, sharding, part)
        # A transfer is asynchronous and holds the host's copy: waiting bounds how many of them are alive.
        return jax.block_until_ready(array)

    def _held(self, values: np.ndarray, dtype: np.dtype, reason: str) -> np.ndarray:
        """`values` in read-only memory that jax can use as it lies."""
        aligned = values.ctypes.data % ALIGNMENT == 0 and values.flags.c_contiguous and math.prod(values.shape) > 0
        if values.dtype == dtype and aligned and not values.flags.writeable:
            return values
        copy = aligned_empty(values.shape, dtype)
        np.copyto(copy, values, casting="unsafe")
        copy.flags.writeable = False
        self._count(reason, copy.nbytes)
        return copy


def _contiguous(array: QuantArray) -> QuantArray:
    made: QuantArray = jax.tree.map(np.ascontiguousarray, array)
    return made
