"""Reads tables of weights of any origin: where each layer's numbers lie, without touching them.

A table has one row a layer: `layer_name`, `weights` and, where it can't be derived, `shape`. Weights are a list (of any
kind) of floats, a tensor of fixed shape, or bytes beside a column `dtype`. bfloat16, which Arrow does not have, is a
list of uint16 whose field (or whose schema) says `dtype = bfloat16` in its metadata.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fusedllm.errors import QuantizationError

NAME, WEIGHTS, SHAPE, DTYPE = "layer_name", "weights", "shape", "dtype"

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": BFLOAT16}
# Kernels count elements of one matrix in 32 bits.
MOST_ELEMENTS = 2**31 - 1
# So many columns are named in a message.
_LONGEST_LIST = 12


@dataclass(slots=True)
class Layers:
    """Layers in the order of their rows, a list for each of their properties.

    Attributes:
      names: of the layers.
      shapes: of the weights; a layer without a declared one is a vector.
      declared: whether the shape was given, and not only the number of weights.
      dtypes: float32, float16 or bfloat16.
      addresses: of the first weight, in memory that `owners` keeps alive.
      copied: bytes that had to be copied to get there.
      reasons: why, or `None`.
    """

    names: list[str] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    declared: list[bool] = field(default_factory=list)
    dtypes: list[np.dtype] = field(default_factory=list)
    addresses: list[int] = field(default_factory=list)
    copied: list[int] = field(default_factory=list)
    reasons: list[str | None] = field(default_factory=list)
    owners: list[Any] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.names)

    def add_array(self, name: str, weights: np.ndarray, *, copied: int = 0, reason: str | None = None) -> None:
        """Adds an array; one that is not contiguous, or of float64, is copied.

        Raises:
          QuantizationError: it has no name or is empty, too large, masked, or no array of floats.
        """
        if not isinstance(name, str) or not name:
            raise QuantizationError(f"a layer's name must be a text that is not empty, got {name!r}.")
        if np.ma.is_masked(weights):
            raise QuantizationError(f"layer {name!r} has masked weights; fill them first.")
        found, weights = weights, np.asarray(weights)
        if weights.ndim == 0:
            raise QuantizationError(f"layer {name!r} is no array with an axis, got {type(found).__name__}.")
        if weights.dtype == np.float64 or not weights.flags.c_contiguous or weights.ctypes.data % weights.itemsize:
            reason = "float64 becomes float32" if weights.dtype == np.float64 else "not contiguous"
            with np.errstate(over="ignore"):  # What becomes infinite is refused where it is looked at.
                weights = np.ascontiguousarray(weights, np.float32 if weights.dtype == np.float64 else weights.dtype)
            weights = weights.copy() if weights.ctypes.data % weights.itemsize else weights
            copied += weights.nbytes
        if weights.dtype not in FLOATS.values():
            raise QuantizationError(
                f"layer {name!r} is of {weights.dtype}; weights must be float32, float16 or bfloat16."
            )
        _check_size(name, weights.size)
        self._add(name, weights.shape, True, weights.dtype, weights.ctypes.data, copied, reason)
        self.owners.append((found, weights))

    def view(self, index: int) -> np.ndarray:
        """The weights of a layer as they lie, read-only."""
        dtype, count = self.dtypes[index], math.prod(self.shapes[index])
        memory = pa.foreign_buffer(self.addresses[index], count * dtype.itemsize, self.owners)
        return np.frombuffer(memory, np.uint8).view(dtype).reshape(self.shapes[index])

    def _add(
        self,
        name: str,
        shape: tuple[int, ...],
        declared: bool,
        dtype: np.dtype,
        address: int,
        copied: int = 0,
        reason: str | None = None,
    ) -> None:
        self.names.append(name)
        self.shapes.append(shape)
        self.declared.append(declared)
        self.dtypes.append(dtype)
        self.addresses.append(address)
        self.copied.append(copied)
        self.reasons.append(reason)

    def add_batch(self, batch: pa.RecordBatch) -> None:
        """Adds the rows of a table.

        Raises:
          QuantizationError: a column is missing or of a type that holds no weights, or a row has nulls, no weights, or
            a shape that its weights don't fit; the message names the layer. Or the buffers contradict the columns.
        """
        check_buffers(batch)
        names = _names(batch)
        weights = _column(batch, WEIGHTS, "weights: list<float32>")
        if weights.null_count:
            raise QuantizationError(f"layer {names[_first_null(weights)]!r} has no weights (null).")
        shapes = _shapes(batch, names)
        kind = weights.type
        if isinstance(weights, pa.ExtensionArray):
            if isinstance(kind, pa.FixedShapeTensorType):
                shapes = [tuple(kind.shape)] * len(names)
                _check_order(kind)
            weights, kind = weights.storage, kind.storage_type
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            self._add_bytes(names, weights, shapes, _dtypes(batch, names))
        elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
            self._add_lists(names, weights, shapes, _of_lists(batch, kind, names))
        else:
            raise QuantizationError(
                f"the column {WEIGHTS!r} is {kind}; it must hold lists of floats, tensors of fixed shape, or bytes."
            )
        self.owners.append(batch)

    def _add_lists(self, names: list[str], lists: Any, shapes: list[tuple[int, ...] | None], dtype: np.dtype) -> None:
        values = lists.values
        starts, ends = _ends(lists)
        if values.null_count:
            self._refuse_null(names, values, starts, ends)
        copied_from: np.ndarray | None = None
        if pa.types.is_float64(values.type):
            with np.errstate(over="ignore"):
                copied_from = np.asarray(values).astype(np.float32)
            base, offset = copied_from.ctypes.data, 0
            self.owners.append(copied_from)
        else:
            data = values.buffers()[1]
            base, offset = (0 if data is None else data.address), values.offset
        size = dtype.itemsize
        for name, start, end, shape in zip(names, starts, ends, shapes, strict=True):
            count = end - start
            _check_fit(name, count, shape)
            self._add(
                name,
                (count,) if shape is None else shape,
                shape is not None,
                dtype,
                base + (offset + start) * size,
                0 if copied_from is None else count * size,
                None if copied_from is None else "float64 becomes float32",
            )

    def _add_bytes(
        self, names: list[str], cells: Any, shapes: list[tuple[int, ...] | None], dtypes: list[np.dtype]
    ) -> None:
        starts, ends = _ends(cells)
        data = cells.buffers()[2]
        base = 0 if data is None else data.address
        for name, start, end, shape, dtype in zip(names, starts, ends, shapes, dtypes, strict=True):
            count, rest = divmod(end - start, dtype.itemsize)
            if rest:
                raise QuantizationError(f"layer {name!r} has {end - start} bytes, which is no number of {dtype}.")
            _check_fit(name, count, shape)
            address, copied = base + start, 0
            if address % dtype.itemsize:
                copy = np.frombuffer(data.slice(start, end - start), np.uint8).copy()
                self.owners.append(copy)
                address, copied = copy.ctypes.data, copy.nbytes
            reason = "not aligned" if copied else None
            self._add(name, (count,) if shape is None else shape, shape is not None, dtype, address, copied, reason)

    def _refuse_null(self, names: list[str], values: pa.Array, starts: list[int], ends: list[int]) -> None:
        # Not all values are of these rows: others may have nulls of their own, before and after.
        for name, start, end in zip(names, starts, ends, strict=True):
            some = values.slice(start, end - start)
            if some.null_count:
                raise QuantizationError(f"layer {name!r} has a null at place {_first_null(some)} of its weights.")


def of_arrays(arrays: Iterable[tuple[str, np.ndarray]]) -> Layers:
    """The layers of named arrays; raises as `Layers.add_array`."""
    layers = Layers()
    for name, weights in arrays:
        layers.add_array(name, weights)
    check_names(layers.names)
    return layers


def check_names(names: list[str], seen: set[str] | None = None) -> None:
    """Refuses a name that occurs twice; `seen` are those of earlier batches, and grows."""
    seen = set() if seen is None else seen
    for name in names:
        if name in seen:
            raise QuantizationError(f"layer {name!r} occurs twice; names must differ.")
        seen.add(name)


def check_buffers(batch: pa.RecordBatch) -> None:
    """Refuses a batch whose offsets or texts point beyond its buffers, as a damaged file makes one; reads no weights.

    Raises:
      QuantizationError: it contradicts itself.
    """
    try:
        batch.validate(full=True)
    except pa.ArrowException as error:
        raise QuantizationError(f"the table is damaged: {' '.join(str(error).split())[:200].rstrip('.')}.") from error


def _column(batch: pa.RecordBatch, name: str, wanted: str) -> Any:
    index = batch.schema.get_field_index(name)
    if index < 0:
        found = [f"{one.name}: {one.type}" for one in batch.schema][:_LONGEST_LIST]
        raise QuantizationError(f"a table of weights needs one column {wanted}; found {', '.join(found) or 'none'}.")
    return batch.column(index)


def _names(batch: pa.RecordBatch) -> list[str]:
    column = _column(batch, NAME, "layer_name: string")
    try:
        names: list[str | None] = pc.cast(column, pa.string()).to_pylist()
    except pa.ArrowException as error:
        raise QuantizationError(f"the column {NAME!r} is {column.type}; it must hold strings.") from error
    for row, name in enumerate(names):
        if not name:
            raise QuantizationError(f"row {row} of the table has no {NAME!r}.")
    return [str(name) for name in names]


def _shapes(batch: pa.RecordBatch, names: list[str]) -> list[tuple[int, ...] | None]:
    index = batch.schema.get_field_index(SHAPE)
    if index < 0:
        return [None] * len(names)
    column = batch.column(index)
    shapes = column.to_pylist()
    for name, shape in zip(names, shapes, strict=True):
        if shape is not None and not (
            isinstance(shape, list) and shape and all(isinstance(size, int) and size > 0 for size in shape)
        ):
            raise QuantizationError(f"layer {name!r} has the shape {shape!r}; it must be a list of positive integers.")
    return [None if shape is None else tuple(shape) for shape in shapes]


def _dtypes(batch: pa.RecordBatch, names: list[str]) -> list[np.dtype]:
    found = _column(batch, DTYPE, "dtype: string (as weights are bytes)").to_pylist()
    for name, dtype in zip(names, found, strict=True):
        if dtype not in FLOATS:
            raise QuantizationError(f"layer {name!r} is of {dtype}; weights must be {', '.join(FLOATS)}.")
    return [FLOATS[dtype] for dtype in found]


def _of_lists(batch: pa.RecordBatch, kind: Any, names: list[str]) -> np.dtype:
    of = kind.value_type
    if pa.types.is_float32(of) or pa.types.is_float64(of):
        return FLOATS["float32"]
    if pa.types.is_float16(of):
        return FLOATS["float16"]
    outer = batch.schema.field(WEIGHTS)
    said = [one.metadata or {} for one in (outer, kind.value_field)] + [batch.schema.metadata or {}]
    if pa.types.is_uint16(of) and any(metadata.get(b"dtype") == b"bfloat16" for metadata in said):
        return BFLOAT16
    hint = " (bfloat16 is said by `dtype = bfloat16` in the field's metadata)" if pa.types.is_uint16(of) else ""
    which = names[0] if names else WEIGHTS
    raise QuantizationError(f"layer {which!r} is a list of {of}; weights must be {', '.join(FLOATS)}{hint}.")


def _ends(column: Any) -> tuple[list[int], list[int]]:
    """Where each row begins and ends, in elements of the column's values or bytes."""
    if pa.types.is_fixed_size_list(column.type):
        size = column.type.list_size
        # `values` of such an array do not know of its offset.
        starts = range(column.offset * size, (column.offset + len(column)) * size, size) if size else [0] * len(column)
        return list(starts), [start + size for start in starts]
    offsets = offsets_of(column)
    return offsets[:-1].tolist(), offsets[1:].tolist()


def offsets_of(column: Any) -> np.ndarray:
    """Where the rows of a column of lists or bytes begin, and where the last one ends."""
    if not len(column):
        # No rows may have no buffer either.
        return np.zeros(1, np.int64)
    is_large = pa.types.is_large_list(column.type) or pa.types.is_large_binary(column.type)
    dtype = np.dtype(np.int64 if is_large else np.int32)
    return np.frombuffer(column.buffers()[1], dtype, len(column) + 1, column.offset * dtype.itemsize)


def _check_fit(name: str, count: int, shape: tuple[int, ...] | None) -> None:
    _check_size(name, count)
    if shape is not None and math.prod(shape) != count:
        raise QuantizationError(
            f"layer {name!r} holds {count:,} weights, and its shape {list(shape)} takes {math.prod(shape):,}."
        )


def _check_size(name: str, count: int) -> None:
    if count < 1:
        raise QuantizationError(f"layer {name!r} is empty.")
    if count > MOST_ELEMENTS:
        raise QuantizationError(
            f"layer {name!r} has {count:,} weights; at most {MOST_ELEMENTS:,} can be in one: split it by rows."
        )


def _check_order(kind: Any) -> None:
    if kind.permutation is not None and list(kind.permutation) != sorted(kind.permutation):
        raise QuantizationError(
            f"the column {WEIGHTS!r} holds permuted tensors; store them in the order of their rows."
        )


def _first_null(array: pa.Array) -> int:
    index: int = pc.index(pc.is_null(array), True).as_py()
    return index
