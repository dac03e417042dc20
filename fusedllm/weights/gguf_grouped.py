"""Grouped codes as GGUF's blocks: the codes stay, and each block of 32 has its group's scale.

Symmetric codes of 4 and 3 bits become Q4_0 and codes of 8 bits Q8_0, whose values are the same bit for bit where scales
are float16. Q4_1, for codes with zero points, stores `-scale * zero_point`, which float16 rounds.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from fusedllm.errors import QuantizationError
from fusedllm.kernels.grouped import GroupedScheme, unpack
from fusedllm.qarray import QuantArray
from fusedllm.quant.blocks import SCHEMES
from fusedllm.quant.schemes import not_said, scheme_named
from fusedllm.weights.checkpoint import Checkpoint, LazyTensor

BLOCK = 32

# What is not larger is rounded to zero in float16.
VANISHING = 2.0**-25


class DequantizedWarning(UserWarning):
    """Codes that a GGUF has no blocks for were written as floats."""


def check_blocks(checkpoint: Checkpoint, path: Path) -> None:
    """Refuses a quantized `checkpoint` of which nothing would stay quantized in the GGUF `path`.

    Raises:
      QuantizationError: there are codes, and no blocks for any of them.
    """
    coded = [tensor for tensor in checkpoint.tensors.values() if tensor.quantization is not None]
    if coded and all(as_blocks(tensor).quantization not in SCHEMES for tensor in coded):
        raise QuantizationError(_nothing(path, f"{coded[0].name} ({said(coded[0])})"))


def check_scheme(name: str, path: Path) -> None:
    """As `check_blocks`, for all tensors in the scheme of that name, before there are any.

    Raises:
      QuantizationError: there is no such scheme, or no blocks for it.
    """
    # A width that every group divides.
    if block_name(scheme_named(name), 2**20) is None:
        raise QuantizationError(_nothing(path, name))


def warn_of_floats(tensors: Sequence[LazyTensor], total: int) -> None:
    """Warns of the `tensors`, of `total` quantized ones, whose codes are not kept."""
    if tensors:
        warnings.warn(
            f"{len(tensors)} of {total} quantized tensors are written as floats, as a GGUF has no blocks for their "
            f"codes; the first is {tensors[0].name} ({said(tensors[0])}).",
            DequantizedWarning,
            stacklevel=3,
        )


def said(tensor: LazyTensor) -> str:
    """Scheme and shape of a tensor."""
    return f"{tensor.quantization}, {' x '.join(map(str, tensor.shape))}"


def _nothing(path: Path, what: str) -> str:
    return (
        f"{path} would hold floats alone, as a GGUF has no blocks for {what}: choose a scheme of 3, 4 or 8 bits for "
        "rows that are multiples of 32, or another format."
    )


def as_blocks(tensor: LazyTensor) -> LazyTensor:
    """`tensor` with blocks of GGUF instead of grouped codes, where there are blocks for them; else as it is.

    Raises:
      QuantizationError: its products turn their inputs, which no GGUF says.
    """
    if tensor.read_quantized is None or tensor.quantization in SCHEMES or len(tensor.shape) != 2:
        return tensor
    read = tensor.read_quantized
    scheme = read().scheme
    if isinstance(scheme, GroupedScheme) and scheme.turned:
        raise QuantizationError(not_said(f"{tensor.name} ({said(tensor)})", "a GGUF"))
    name = block_name(scheme, tensor.shape[1]) if isinstance(scheme, GroupedScheme) else None
    if name is None:
        return tensor

    def read_blocks() -> QuantArray:
        try:
            blocks = blocks_of(read(), name)
        except QuantizationError as error:
            raise QuantizationError(f"{tensor.name}: {error}") from error
        return QuantArray(cast("Any", blocks), None, None, SCHEMES[name], tensor.shape)

    return dataclasses.replace(tensor, quantization=name, read_quantized=read_blocks)


def block_name(scheme: GroupedScheme, width: int) -> str | None:
    """The type of GGUF that holds the codes of `scheme`, or `None`."""
    if scheme.codes != "integer" or scheme.bits not in (3, 4, 8) or scheme.turned:
        return None
    if width % BLOCK or scheme.group_size % BLOCK:
        return None
    if scheme.bits == 8:
        return "Q8_0" if scheme.symmetric else None
    return "Q4_0" if scheme.symmetric else "Q4_1"


def blocks_of(array: QuantArray, name: str) -> np.ndarray:
    """The blocks of `array`, uint8 `[rows, bytes of a row]`, in the type `name` of `block_name`.

    Raises:
      QuantizationError: a scale or a minimum is beyond float16, or a scale too small for it.
    """
    scheme = cast("GroupedScheme", array.scheme)
    rows, width = array.shape
    count = width // BLOCK
    codes = unpack(np, np.asarray(array.values), scheme.bits)[:, :width].reshape(rows, count, BLOCK)
    repeats = scheme.group_size // BLOCK if scheme.group_size else count

    def of_blocks(numbers: Any) -> np.ndarray:
        return np.repeat(np.asarray(numbers, np.float32), repeats, axis=1)[:, :count, None]

    scales = of_blocks(array.scales)
    least = np.abs(scales[scales != 0]).min(initial=np.inf)
    if least <= VANISHING:
        raise QuantizationError(
            f"{name} has scales of float16, and {least:.3g} would become zero: convert with --dtype float32."
        )
    parts = [_halves(scales, name)]
    if name == "Q8_0":
        return np.concatenate([*parts, codes.view(np.uint8)], axis=2).reshape(rows, -1)
    if name == "Q4_0":
        codes = codes + np.uint8(8 - scheme.center)
    else:
        parts.append(_halves(-scales * of_blocks(array.zeros), name))
    parts.append(codes[..., :16] | codes[..., 16:] << np.uint8(4))
    return np.concatenate(parts, axis=2).reshape(rows, -1)


def _halves(numbers: np.ndarray, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        halves = numbers.astype(np.float16)
    if not np.isfinite(halves).all():
        raise QuantizationError(
            f"{name} has scales and minimums of float16, and {np.abs(numbers).max():.3g} is beyond them: convert with "
            "--dtype float32."
        )
    return halves.view(np.uint8)
