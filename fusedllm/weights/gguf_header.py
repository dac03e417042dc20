"""The header of a GGUF file: metadata and the table of tensors, every length checked before it is believed.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.

Parsed here and not by `gguf.GGUFReader`, for two reasons. That reader makes several NumPy arrays for each string of
a vocabulary (seconds for 49,000 tokens, a few hundredths of a second here). And it believes the file: an array
length of 2^60 keeps it busy until the memory is full, a truncated file gives wrong shapes instead of an error.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from fusedllm.errors import CheckpointError
from fusedllm.model.attributes import shortened
from fusedllm.quant.blocks import SCHEMES
from fusedllm.weights.mapped import map_file

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_FIXED_BYTES = 24  # magic, version, number of tensors, number of metadata entries
_DEFAULT_ALIGNMENT = 32
_MAX_ALIGNMENT = 1 << 20
_MAX_RANK = 4
_MAX_NAME_BYTES = 1 << 16

# GGUF's value types by number; 8 is a string, 9 an array.
_SCALARS = {
    code: np.dtype(name).newbyteorder("<")
    for code, name in enumerate(("u1", "i1", "u2", "i2", "u4", "i4", "f4", "?", "", "", "u8", "i8", "f8"))
    if name
}
_FLOAT32, _STRING, _ARRAY = 6, 8, 9
# The least that an entry can take: name length, name, type, value; name length, name, rank, size, type, offset.
_LEAST_ENTRY_BYTES = 8 + 1 + 4 + 1
_LEAST_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8

# Tensor types by number (`ggml_type`).
TENSOR_TYPES: Mapping[int, str] = MappingProxyType(
    {
        0: "F32",
        1: "F16",
        2: "Q4_0",
        3: "Q4_1",
        6: "Q5_0",
        7: "Q5_1",
        8: "Q8_0",
        10: "Q2_K",
        11: "Q3_K",
        12: "Q4_K",
        13: "Q5_K",
        14: "Q6_K",
        30: "BF16",
    }
)
# Weights and bytes in a block of each.
_BLOCKS = {"F32": (1, 4), "F16": (1, 2), "BF16": (1, 2)} | {
    name: (scheme.block_size, scheme.block_bytes) for name, scheme in SCHEMES.items()
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of the table: its name in GGUF, shape `[out, in]`, type, and where its bytes lie in the file."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """A GGUF file opened: its bytes (a memory map), metadata as plain Python values, and its tensors by name."""

    data: np.ndarray
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]


def read_header(path: Path) -> Header:
    """Map the file `path` and read its header.

    Raises:
      CheckpointError: not a GGUF file, another version, truncated, damaged, or a tensor of a type that can't be read.
    """
    data = map_file(path, _FIXED_BYTES, "GGUF")
    if data[:4].tobytes() != _MAGIC:
        raise CheckpointError(
            f"{path} is not a GGUF file: it begins with {data[:4].tobytes()!r} instead of {_MAGIC!r}."
        )
    cursor = _Cursor(data, path)
    version = cursor.unpack("<I")
    if version not in _VERSIONS:
        swapped = version & 0xFFFF == 0
        kind = "big-endian" if swapped else f"version {version}"
        raise CheckpointError(f"{path} is a GGUF file of {kind}; versions 2 and 3, little-endian, can be read.")
    num_tensors, num_entries = cursor.unpack("<Q"), cursor.unpack("<Q")
    cursor.require(num_entries * _LEAST_ENTRY_BYTES + num_tensors * _LEAST_TENSOR_BYTES, "its tables")
    metadata: dict[str, Any] = {}
    for _ in range(num_entries):
        key = cursor.name()
        if key in metadata:
            raise CheckpointError(f"{path} sets the metadata {shortened(key)} twice.")
        metadata[key] = cursor.value(key)
    described = [_describe(cursor, path) for _ in range(num_tensors)]
    return Header(data, metadata, _place(described, cursor.position, metadata, data, path))


class _Cursor:
    """Reads the header from front to back, and never past the end of the file."""

    def __init__(self, data: np.ndarray, path: Path) -> None:
        self.position = len(_MAGIC)
        self._data, self._path, self._size = data, path, len(data)
        self._bytes = data.data

    def require(self, count: int, what: str) -> None:
        if count > self._size - self.position:
            raise CheckpointError(
                f"{self._path} is truncated or damaged: {what} need {shortened(count)} bytes from byte {self.position} "
                f"on, the file has {self._size}."
            )

    def unpack(self, form: str) -> int:
        size = struct.calcsize(form)
        self.require(size, "its header's numbers")
        value: int = struct.unpack_from(form, self._bytes, self.position)[0]
        self.position += size
        return value

    def text(self, what: str) -> str:
        length = self.unpack("<Q")
        self.require(length, what)
        raw = bytes(self._bytes[self.position : self.position + length])
        self.position += length
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self._path} is damaged: {what} are not UTF-8 text ({error.reason}).") from error

    def name(self) -> str:
        name = self.text("the names in its header")
        if not name or len(name) > _MAX_NAME_BYTES:
            raise CheckpointError(f"{self._path} is damaged: a name in its header has {len(name)} characters.")
        return name

    def value(self, key: str) -> Any:
        """One metadata value as Python's own int, float, bool, str or list of them."""
        code, what = self.unpack("<I"), f"the values of {shortened(key)}"
        if code == _STRING:
            return self.text(what)
        if code == _ARRAY:
            return self._array(self.unpack("<I"), self.unpack("<Q"), what)
        value = self._numbers(code, 1, what)[0]
        # 1e-5 in float32 is 9.99999975e-06 in Python's float; its shortest text is what was meant.
        return float(str(np.float32(value))) if code == _FLOAT32 else value

    def _array(self, code: int, count: int, what: str) -> list[Any]:
        if code != _STRING:
            return self._numbers(code, count, what)
        self.require(8 * count, what)
        strings, position, size, view = [], self.position, self._size, self._bytes
        length_at = struct.Struct("<Q").unpack_from
        # The one hot loop: a vocabulary and its merges are hundreds of thousands of strings.
        for _ in range(count):
            start = position + 8
            if start > size or (position := start + length_at(view, start - 8)[0]) > size:
                raise CheckpointError(f"{self._path} is truncated or damaged: {what} go past its {size} bytes.")
            strings.append(bytes(view[start:position]))
        self.position = position
        try:
            return [one.decode() for one in strings]
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self._path} is damaged: {what} are not UTF-8 text ({error.reason}).") from error

    def _numbers(self, code: int, count: int, what: str) -> list[Any]:
        dtype = _SCALARS.get(code)
        if dtype is None:
            raise CheckpointError(f"{self._path} has metadata of an unknown kind ({code}): {what}.")
        self.require(count * dtype.itemsize, what)
        end = self.position + count * dtype.itemsize
        values = self._data[self.position : end].view(dtype)
        self.position = end
        return list(values.tolist())


def _describe(cursor: _Cursor, path: Path) -> tuple[str, tuple[int, ...], str, int, int]:
    """One entry of the tensor table: name, shape, type, offset in the data section, bytes."""
    name = cursor.name()
    rank = cursor.unpack("<I")
    if not 1 <= rank <= _MAX_RANK:
        raise CheckpointError(f"{path} is damaged: the tensor {shortened(name)} has {rank} dimensions.")
    # GGUF writes the fastest dimension first.
    shape = tuple(reversed([cursor.unpack("<Q") for _ in range(rank)]))
    if 0 in shape:
        raise CheckpointError(f"{path} is damaged: the tensor {shortened(name)} has the shape {shape}.")
    code, offset = cursor.unpack("<I"), cursor.unpack("<Q")
    type_name = TENSOR_TYPES.get(code)
    if type_name is None:
        raise CheckpointError(
            f"the tensor {shortened(name)} in {path} has the type {_unknown_type(code)}, which can't be read; known "
            f"are: {', '.join(_BLOCKS)}."
        )
    block_size, block_bytes = _BLOCKS[type_name]
    if shape[-1] % block_size:
        raise CheckpointError(
            f"{path} is damaged: rows of {shape[-1]} in {shortened(name)} are not whole blocks of {block_size} "
            f"({type_name})."
        )
    return name, shape, type_name, offset, math.prod(shape) // block_size * block_bytes


def _place(
    described: list[tuple[str, tuple[int, ...], str, int, int]],
    position: int,
    metadata: Mapping[str, Any],
    data: np.ndarray,
    path: Path,
) -> dict[str, TensorEntry]:
    """Where each tensor lies: in the order of the table, padded to the alignment, as the format demands."""
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
        raise CheckpointError(f"{path} is damaged: its alignment is {shortened(alignment)}, not a power of two.")
    base = position + -position % alignment
    tensors: dict[str, TensorEntry] = {}
    expected = end = 0
    for name, shape, type_name, offset, nbytes in described:
        if name in tensors:
            raise CheckpointError(f"{path} has two tensors with the name {shortened(name)}.")
        if offset != expected:
            raise CheckpointError(
                f"{path} is damaged: the tensor {shortened(name)} lies at byte {offset} of the data, {expected} was "
                "expected."
            )
        end = offset + nbytes
        expected = end + -end % alignment
        tensors[name] = TensorEntry(name, shape, type_name, base + offset, nbytes)
    if base + end > len(data) and described:
        raise CheckpointError(f"{path} is truncated: its tensors need {base + end} bytes, the file has {len(data)}.")
    return tensors


def _unknown_type(code: int) -> str:
    """The name of a tensor type that is not read here, where the `gguf` library knows it."""
    try:
        import gguf

        return str(gguf.GGMLQuantizationType(code).name)
    except (ImportError, ValueError):
        return f"number {code}"
