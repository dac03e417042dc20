"""Grouped codes as other formats lay them out: in 32-bit words, and as tensors that are read when somebody asks.

A stream of codes puts code `i` into the bits `[i * bits, (i + 1) * bits)`, the least significant bit of a word first,
and words are little-endian: so a row of words holds the bytes of a row of ours (`fusedllm.kernels.grouped`), except
that codes of eight bits are unsigned in a stream and signed here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import ml_dtypes
import numpy as np

from fusedllm.errors import CheckpointError
from fusedllm.kernels.grouped import GroupedScheme, pack, unpack
from fusedllm.kernels.hadamard import hadamard_numpy
from fusedllm.model.attributes import shortened
from fusedllm.qarray import QuantArray
from fusedllm.weights.checkpoint import LazyTensor

WORD_BITS = 32
WORD = np.dtype(np.int32)
SCALES = tuple(np.dtype(kind) for kind in (np.float16, ml_dtypes.bfloat16, np.float32))

# Added to a signed code of eight bits it makes the unsigned one; as bytes, it flips the highest bit.
_SIGN = 0x80
# Weights decoded per step: their intermediate arrays stay in a core's cache.
_CHUNK_WEIGHTS = 1 << 18


def word_count(codes: int, bits: int) -> int:
    """Words that a stream of so many codes takes."""
    return -(-codes * bits // WORD_BITS)


def pack_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned codes `[rows, n]` as streams, int32 `[rows, words]`; what is left of the last word is zero."""
    rows, count = codes.shape
    padded = np.zeros((rows, -(-count // WORD_BITS) * WORD_BITS), np.uint8)
    padded[:, :count] = codes
    used = word_count(count, bits) * WORD.itemsize
    return np.ascontiguousarray(pack(np, padded, bits)[:, :used]).view(WORD)


def unpack_words(words: np.ndarray, count: int, bits: int) -> np.ndarray:
    """The first `count` unsigned codes of each stream, uint8 `[rows, count]`; the inverse of `pack_words`."""
    raw = np.ascontiguousarray(words).view(np.uint8)
    whole = np.zeros((len(raw), -(-count // WORD_BITS) * WORD.itemsize * bits), np.uint8)
    whole[:, : raw.shape[1]] = raw[:, : whole.shape[1]]
    return np.asarray(unpack(np, whole, bits)).view(np.uint8)[:, :count]


def values_to_words(values: np.ndarray, width: int, bits: int) -> np.ndarray:
    """`QuantArray.values` `[rows, bytes]` as streams of unsigned codes without padding, int32 `[rows, words]`."""
    used = -(-width * bits // 8)
    raw = np.zeros((len(values), word_count(width, bits) * WORD.itemsize), np.uint8)
    raw[:, :used] = values[:, :used] ^ _SIGN if bits == 8 else values[:, :used]
    raw[:, used - 1] &= 0xFF >> (used * 8 - width * bits)
    return raw.view(WORD)


def values_from_words(words: np.ndarray, width: int, scheme: GroupedScheme, zeros: np.ndarray | None) -> np.ndarray:
    """Streams of unsigned codes as `QuantArray.values`: a view where the bytes are the same; for `zeros` see below."""
    if scheme.padded(width) > width:
        return values_from_codes(unpack_words(words, width, scheme.bits), scheme, zeros)
    raw = np.ascontiguousarray(words).view(np.uint8)[:, : scheme.row_bytes(width)]
    return raw ^ _SIGN if scheme.bits == 8 else raw


def values_from_codes(codes: np.ndarray, scheme: GroupedScheme, zeros: np.ndarray | None) -> np.ndarray:
    """Unsigned codes `[rows, width]` as `QuantArray.values`.

    `zeros`, unsigned `[rows, groups]`, are what a row is padded with, so that it is worth nothing; `None` stands for
    the scheme's own zero point.
    """
    padding = scheme.padded(codes.shape[1]) - codes.shape[1]
    if padding:
        fill = np.full((len(codes), 1), 1 << (scheme.bits - 1), np.uint8) if zeros is None else zeros[:, -1:]
        codes = np.concatenate([codes, np.repeat(fill, padding, axis=1)], axis=1)
    values: np.ndarray = pack(np, codes, scheme.bits)
    return values ^ _SIGN if scheme.bits == 8 else values


def quant_array(
    scheme: GroupedScheme, shape: tuple[int, ...], values: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None
) -> QuantArray:
    """The parts as a `QuantArray`; `zeros` are unsigned codes `[rows, groups]`.

    Scales of bfloat16 become float16 where that holds all of them exactly, and float32 otherwise.
    """
    if scales.dtype == ml_dtypes.bfloat16:
        with np.errstate(over="ignore"):
            wide, half = scales.astype(np.float32), scales.astype(np.float16)
        scales = half if np.array_equal(half.astype(np.float32), wide) else wide
    if zeros is not None:
        zeros = (zeros.astype(np.int16) - (_SIGN if scheme.signed else 0)).astype(scales.dtype)
    # NumPy's arrays where a program will see jax's: who loads them decides where they are put.
    return QuantArray(cast("Any", values), cast("Any", scales), cast("Any", zeros), scheme, shape)


def unsigned_zeros(array: QuantArray, name: str) -> np.ndarray | None:
    """The zero points of `array` as unsigned codes, uint8 `[rows, groups]`; `None` for a symmetric scheme.

    Raises:
      CheckpointError: one of them is no code, so that formats which store codes have no place for it.
    """
    scheme = array.scheme
    assert isinstance(scheme, GroupedScheme)
    if array.zeros is None:
        return None
    zeros = np.asarray(array.zeros, np.float32) + (_SIGN if scheme.signed else 0)
    if not ((zeros == np.floor(zeros)) & (zeros >= 0) & (zeros < 2**scheme.bits)).all():
        raise CheckpointError(
            f"{name} has zero points that are no whole codes, as HQQ makes them, and compressed-tensors stores codes: "
            "quantize with another method, or convert with --dtype float16."
        )
    return zeros.astype(np.uint8)


def lazy_matrix(
    name: str,
    scheme: GroupedScheme,
    shape: tuple[int, ...],
    nbytes: int,
    array: Callable[[], QuantArray],
    order: np.ndarray | None = None,
) -> LazyTensor:
    """A tensor that reads `array`; with an `order`, the group of each column, it can only be dequantized."""
    read = partial(_read, array, order)
    label = scheme.name if order is None else f"{scheme.name} in act-order"
    return LazyTensor(name, shape, np.dtype(np.float32), nbytes, read, label, array if order is None else None)


def _read(array: Callable[[], QuantArray], order: np.ndarray | None) -> np.ndarray:
    return decode(array(), order)


def decode(array: QuantArray, order: np.ndarray | None = None) -> np.ndarray:
    """The float32 values of `array` without JAX; `order` is the group of each column, by default they follow."""
    scheme = array.scheme
    assert isinstance(scheme, GroupedScheme)
    assert array.scales is not None
    rows, width = array.shape
    if order is None:
        order = np.arange(width) // (scheme.group_size or width)
    values, scales = np.asarray(array.values), np.asarray(array.scales)
    zeros = None if array.zeros is None else np.asarray(array.zeros)
    result = np.empty((rows, width), np.float32)
    step = max(1, _CHUNK_WEIGHTS // width)
    # A damaged file may hold infinite scales; infinity times zero is then NaN, as in every other decoder.
    with np.errstate(invalid="ignore", over="ignore"):
        for first in range(0, rows, step):
            part = slice(first, first + step)
            if scheme.codes == "float8":
                codes = values[part].view(ml_dtypes.float8_e4m3fn)[:, :width].astype(np.float32)
            else:
                codes = np.asarray(unpack(np, values[part], scheme.bits))[:, :width].astype(np.float32)
                codes -= np.float32(scheme.center) if zeros is None else zeros[part].astype(np.float32)[:, order]
            np.multiply(codes, scales[part].astype(np.float32)[:, order], out=result[part])
    return hadamard_numpy(result) if scheme.turned else result


def part_of(
    tensors: Mapping[str, LazyTensor], module: str, part: str, dtypes: Sequence[np.dtype], shape: Sequence[int | None]
) -> LazyTensor:
    """The tensor `part` of a quantized `module`; `None` in `shape` stands for any size.

    Raises:
      CheckpointError: it is missing, or has another shape or dtype.
    """
    tensor = tensors.get(f"{module}.{part}")
    if tensor is None:
        raise CheckpointError(
            f"{module}.weight is quantized and has no {shortened(part)}: the checkpoint is incomplete."
        )
    fits = len(tensor.shape) == len(shape) and all(
        wanted in (None, found) for found, wanted in zip(tensor.shape, shape, strict=True)
    )
    if not fits or tensor.dtype not in dtypes:
        kinds = " or ".join(str(dtype) for dtype in dtypes)
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        raise CheckpointError(
            f"{tensor.name} is {tensor.dtype} {list(tensor.shape)}, and the quantization_config asks for {kinds} "
            f"[{sizes}]."
        )
    return tensor


def group_order(index: LazyTensor, width: int, scheme: GroupedScheme) -> np.ndarray | None:
    """The group of each column as `index` says it, or `None` where the groups just follow one another.

    Raises:
      CheckpointError: it names a group that is not there.
    """
    order = index.read()
    groups = scheme.groups(width)
    if order.min() < 0 or order.max() >= groups:
        raise CheckpointError(f"{index.name} names groups from {order.min()} to {order.max()}, and there are {groups}.")
    return None if np.array_equal(order, np.arange(width) // (scheme.group_size or width)) else order
