"""The quantized table: its columns (`docs/arrow-format.md`), rows written into Arrow's memory, and rows read back."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from fusedllm.errors import QuantizationError
from fusedllm.kernels.grouped import GroupedScheme
from fusedllm.quant.layers import FLOATS, check_buffers, offsets_of
from fusedllm.quant.schemes import SCHEMES, scheme_of

FORMAT_VERSION = 1
VERSION_KEY, SCHEME_KEY, METHOD_KEY, REPORT_KEY = (
    f"fusedllm.{key}".encode() for key in ("quantized_version", "scheme", "method", "report")
)
SCALE_DTYPES: dict[str, np.dtype] = {"float16": np.dtype(np.float16), "float32": np.dtype(np.float32)}


def table_schema(scale_dtype: np.dtype, metadata: Mapping[bytes, bytes]) -> pa.Schema:
    """The columns, with scales of `scale_dtype`."""
    numbers = pa.large_list(pa.from_numpy_dtype(scale_dtype))
    return pa.schema(
        [
            ("layer_name", pa.string()),
            ("quantized_data", pa.large_binary()),
            ("scales", numbers),
            ("zero_points", numbers),
            ("shape", pa.list_(pa.int64())),
            ("bit_width", pa.int32()),
            ("group_size", pa.int32()),
            ("method", pa.string()),
            ("scheme", pa.string()),
        ],
        metadata=dict(metadata),
    )


_NUMBERS = ("scales", "zero_points")
COLUMNS = tuple(table_schema(SCALE_DTYPES["float16"], {}).names)


@dataclass(frozen=True, slots=True)
class Place:
    """What a layer takes: a matrix `[rows, width]` in `scheme`, or as it is where that is `None`."""

    scheme: GroupedScheme | None
    rows: int
    width: int
    code_bytes: int
    numbers: int
    zeros: int

    @classmethod
    def of(cls, shape: tuple[int, ...], scheme: GroupedScheme | None, itemsize: int) -> Place:
        """Of weights of `shape` that take `itemsize` bytes each; all axes but the last are rows."""
        width = shape[-1]
        rows = math.prod(shape[:-1])
        if scheme is None:
            return cls(None, rows, width, rows * width * itemsize, 0, 0)
        numbers = rows * scheme.groups(width)
        return cls(scheme, rows, width, rows * scheme.row_bytes(width), numbers, 0 if scheme.symmetric else numbers)


class Memory:
    """The buffers that layers are quantized into: Arrow's own memory, one for the codes of all of them, and so on.

    `alignment` is that of each layer's parts, in bytes; in a table they follow one another without gaps.
    """

    def __init__(self, places: Sequence[Place], scale_dtype: np.dtype, alignment: int = 1) -> None:
        self.dtypes = (np.dtype(np.uint8), scale_dtype, scale_dtype)
        items = np.array([dtype.itemsize for dtype in self.dtypes])
        counts = np.array([(place.code_bytes, place.numbers, place.zeros) for place in places], np.int64).reshape(-1, 3)
        self.sizes = counts * items
        ends = np.zeros((len(places) + 1, 3), np.int64)
        np.cumsum(-(-self.sizes // alignment) * alignment, axis=0, out=ends[1:])
        self.ends = ends // items
        self._buffers = [pa.allocate_buffer(int(size)) for size in ends[-1]]
        # Where each layer's part begins, as the quantizer takes it.
        starts = np.array([buffer.address for buffer in self._buffers], np.uint64)
        self.addresses: np.ndarray = starts + ends[:-1].astype(np.uint64)

    def part(self, kind: int, index: int) -> np.ndarray:
        """A layer's part of the codes (0, uint8), scales (1) or zero points (2), writeable."""
        dtype = self.dtypes[kind]
        begin = int(self.ends[index, kind])
        return np.frombuffer(self._buffers[kind], dtype)[begin : begin + int(self.sizes[index, kind]) // dtype.itemsize]

    def batch(
        self,
        schema: pa.Schema,
        names: list[str],
        shapes: list[tuple[int, ...]],
        schemes: list[str],
        kinds: list[tuple[int, int]],
        methods: list[str],
    ) -> pa.RecordBatch:
        """The columns around the buffers, which are not copied; `kinds` are bit width and group size."""
        count = len(names)
        numbers = pa.from_numpy_dtype(self.dtypes[1])

        def offsets(kind: int) -> pa.Buffer:
            return pa.py_buffer(np.ascontiguousarray(self.ends[:, kind]))

        def lists(kind: int) -> pa.Array:
            values = pa.Array.from_buffers(numbers, int(self.ends[-1, kind]), [None, self._buffers[kind]])
            return pa.Array.from_buffers(pa.large_list(numbers), count, [None, offsets(kind)], children=[values])

        lengths = np.zeros(count + 1, np.int32)
        np.cumsum([len(shape) for shape in shapes], out=lengths[1:])
        sizes = pa.array(np.fromiter((size for shape in shapes for size in shape), np.int64))
        columns = [
            pa.array(names, pa.string()),
            pa.Array.from_buffers(pa.large_binary(), count, [None, offsets(0), self._buffers[0]]),
            lists(1),
            lists(2),
            pa.Array.from_buffers(pa.list_(pa.int64()), count, [None, pa.py_buffer(lengths)], children=[sizes]),
            pa.array([bits for bits, _ in kinds], pa.int32()),
            pa.array([group for _, group in kinds], pa.int32()),
            pa.array(methods, pa.string()),
            pa.array(schemes, pa.string()),
        ]
        return pa.RecordBatch.from_arrays(columns, schema=schema)


@dataclass(frozen=True, slots=True)
class Row:
    """One layer of a quantized table, as views of its memory.

    Attributes:
      name: of the layer.
      shape: of the weights.
      scheme: of the codes, or `None` where the layer was left as it is.
      method: how the codes were chosen.
      values: the codes, uint8 `[rows, bytes of a row]`, or the weights themselves, of `shape`.
      scales: `[rows, groups]`, or `None`.
      zeros: `[rows, groups]`, or `None`.
    """

    name: str
    shape: tuple[int, ...]
    scheme: GroupedScheme | None
    method: str
    values: np.ndarray
    scales: np.ndarray | None
    zeros: np.ndarray | None


def is_quantized(schema: pa.Schema) -> bool:
    """Whether a table of this schema is one that `quantize` made."""
    return "quantized_data" in schema.names and "layer_name" in schema.names


def normalized(batch: pa.RecordBatch) -> pa.RecordBatch:
    """A batch of a quantized table with exactly our columns; what other libraries store otherwise is cast.

    Raises:
      QuantizationError: a column is missing or can't be cast, or the table is damaged or of a newer version.
    """
    check_buffers(batch)
    found = batch.schema
    missing = [name for name in COLUMNS if name not in found.names]
    if missing:
        raise QuantizationError(
            f"this is no quantized table: it has no column {missing[0]!r}; found {', '.join(found.names) or 'none'}."
        )
    version = (found.metadata or {}).get(VERSION_KEY, b"1").decode(errors="replace")
    if not version.isdecimal() or int(version) > FORMAT_VERSION:
        raise QuantizationError(
            f"the quantized table is of version {version!r}, and this fusedllm reads up to {FORMAT_VERSION}; install a "
            "newer one."
        )
    # What a library has widened may have been float32 before.
    is_half = all(getattr(found.field(name).type, "value_type", None) == pa.float16() for name in _NUMBERS)
    wanted = table_schema(SCALE_DTYPES["float16" if is_half else "float32"], found.metadata or {})
    columns = []
    for field in wanted:
        column = batch.column(found.get_field_index(field.name))
        try:
            columns.append(column if column.type == field.type else column.cast(field.type))
        except pa.ArrowException as error:
            raise QuantizationError(
                f"the column {field.name!r} of a quantized table must be {field.type}, found {column.type}."
            ) from error
    return pa.RecordBatch.from_arrays(columns, schema=wanted)


def rows(batch: pa.RecordBatch) -> Iterator[Row]:
    """The layers of a batch of a quantized table, in order.

    Raises:
      QuantizationError: a null, a scheme that is not known, or buffers whose sizes contradict the shape.
    """
    batch = normalized(batch)
    columns = dict(zip(COLUMNS, batch.columns, strict=True))
    for name, column in columns.items():
        if column.null_count or (name in _NUMBERS and column.flatten().null_count):
            raise QuantizationError(f"the quantized table has a null in its column {name!r}.")
    names, shapes, methods, schemes = (
        columns[name].to_pylist() for name in ("layer_name", "shape", "method", "scheme")
    )
    data, scales, zeros = (_Parts(columns[name]) for name in ("quantized_data", "scales", "zero_points"))
    for index, (name, shape, method, scheme_name) in enumerate(zip(names, shapes, methods, schemes, strict=True)):
        if not shape or any(size is None or size < 1 for size in shape):
            raise QuantizationError(f"layer {name!r} has the shape {shape}, whose sizes must be positive.")
        scheme = _scheme(name, scheme_name)
        itemsize = FLOATS[scheme_name].itemsize if scheme is None else 0
        place = Place.of(tuple(shape), scheme, itemsize)
        codes, numbers, points = data.part(index), scales.part(index), zeros.part(index)
        wanted = (place.code_bytes, place.numbers, place.zeros)
        if (found := (codes.size, numbers.size, points.size)) != wanted:
            raise QuantizationError(
                f"layer {name!r} in {scheme_name} of the shape {shape} takes {wanted[0]:,} bytes, {wanted[1]:,} scales "
                f"and {wanted[2]:,} zero points, and holds {found[0]:,}, {found[1]:,} and {found[2]:,}."
            )
        if scheme is None:
            plain = codes if codes.ctypes.data % itemsize == 0 else codes.copy()
            weights = plain.view(FLOATS[scheme_name]).reshape(shape)
            yield Row(name, tuple(shape), None, method, weights, None, None)
            continue
        yield Row(
            name,
            tuple(shape),
            scheme,
            method,
            codes.reshape(place.rows, -1),
            numbers.reshape(place.rows, -1),
            None if scheme.symmetric else points.reshape(place.rows, -1),
        )


class _Parts:
    """Views of the parts of a binary or list column."""

    def __init__(self, column: pa.Array) -> None:
        is_binary = pa.types.is_large_binary(column.type)
        self.offsets = offsets_of(column)
        if is_binary:
            self.values = np.frombuffer(column.buffers()[2] or b"", np.uint8)
        else:
            # Nulls, which other rows than these may have, make a copy necessary.
            self.values = column.values.to_numpy(zero_copy_only=not column.values.null_count)

    def part(self, index: int) -> np.ndarray:
        begin, end = self.offsets[index : index + 2]
        return self.values[begin:end]


_NAME = re.compile(r"int([3-8])(?:-g([0-9]{1,6}))?(-sym|-asym)?")


def _scheme(layer: str, name: str) -> GroupedScheme | None:
    """The scheme that a table calls `name`, `None` for a plain dtype; sizes that our table has no row for are read."""
    if name in FLOATS:
        return None
    if name in SCHEMES:
        return SCHEMES[name]
    parts = _NAME.fullmatch(name)
    if parts is None:
        raise QuantizationError(f"layer {layer!r} is in the scheme {name!r}, which this fusedllm does not know.")
    bits = int(parts[1])
    symmetric = parts[3] == "-sym" if parts[3] else bits == 8
    return scheme_of(bits, int(parts[2] or 0), symmetric)
