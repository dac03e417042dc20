"""Writing grouped codes as compressed-tensors: each matrix as the parts that `compressed_tensors.py` describes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from fusedllm.errors import CheckpointError, QuantizationError
from fusedllm.kernels.grouped import GroupedScheme
from fusedllm.qarray import QuantArray
from fusedllm.quant.blocks import SCHEMES as BLOCKS
from fusedllm.quant.schemes import not_said
from fusedllm.weights.checkpoint import Checkpoint, LazyTensor
from fusedllm.weights.compressed_tensors_config import EMBEDDING, PACKED, configuration, format_for
from fusedllm.weights.grouped_codes import (
    WORD,
    decode,
    pack_words,
    unsigned_zeros,
    values_to_words,
    word_count,
)

_HEAD = "lm_head"


def compress(checkpoint: Checkpoint) -> tuple[dict[str, LazyTensor], dict[str, Any] | None]:
    """The tensors of `checkpoint` as a file of compressed-tensors holds them, and its `quantization_config`.

    A matrix of grouped codes becomes its parts, each of which reads the matrix again unless it was the last one that
    was read; scales keep their dtype. An embedding is dequantized to the dtype of its scales, because most readers
    quantize linear layers alone. All other tensors stay as they are, and without any codes the configuration is `None`.

    Raises:
      CheckpointError: the format has no place for a matrix: groups that do not divide a row, or zero points that are no
        codes.
      QuantizationError: products with a matrix turn their inputs (`w8a8-h`), which is not written.
    """

    @functools.lru_cache(maxsize=1)
    def latest(name: str) -> QuantArray:
        return _codes(checkpoint.tensors[name])

    tensors: dict[str, LazyTensor] = {}
    modules: dict[GroupedScheme, list[str]] = {}
    # A tied head has no tensor, and is a linear layer all the same.
    alone = {_HEAD}
    for name, tensor in checkpoint.tensors.items():
        module, read = name.removesuffix(".weight"), functools.partial(latest, name)
        array = _codes(tensor) if _may_be_grouped(tensor) else None
        if array is None or not isinstance(array.scheme, GroupedScheme):
            tensors[name] = tensor
            if len(tensor.shape) == 2 and module != EMBEDDING:
                alone.add(module)
            continue
        if array.shape != tensor.shape or array.scales is None:
            raise CheckpointError(f"{name} was announced as {tensor.shape} and read as {array.shape}.")
        if array.scheme.turned:
            raise QuantizationError(
                not_said(f"{name} ({array.scheme.name})", "compressed-tensors, as it is written here,")
            )
        if module == EMBEDDING:
            tensors[name] = _dequantized(name, array, read)
        else:
            _check(name, array)
            modules.setdefault(array.scheme, []).append(module)
            parts = (_packed if format_for(array.scheme) == PACKED else _plain)(module, array, read)
            tensors.update({part.name: part for part in parts})
    if not modules:
        return tensors, None
    quantized = {module for names in modules.values() for module in names}
    return tensors, configuration(modules, sorted(alone - quantized))


def _may_be_grouped(tensor: LazyTensor) -> bool:
    # GGUF's blocks are known by name, which spares reading them.
    is_matrix = len(tensor.shape) == 2 and tensor.name.endswith(".weight")
    return is_matrix and tensor.read_quantized is not None and tensor.quantization not in BLOCKS


def _codes(tensor: LazyTensor) -> QuantArray:
    assert tensor.read_quantized is not None
    return tensor.read_quantized()


def _scheme(array: QuantArray) -> GroupedScheme:
    assert isinstance(array.scheme, GroupedScheme)
    return array.scheme


def _check(name: str, array: QuantArray) -> None:
    """What can't be written shows before anything is."""
    scheme, width = _scheme(array), array.shape[1]
    if scheme.group_size and width % scheme.group_size:
        raise CheckpointError(
            f"{name} has rows of {width} weights in groups of {scheme.group_size}, and compressed-tensors only "
            "knows groups that divide a row: quantize it with another group size, or convert with --dtype float16."
        )
    if format_for(scheme) != PACKED and scheme.bits != 8:
        raise CheckpointError(
            f"{name} has codes of {scheme.bits} bits for rounded activations, of which compressed-tensors only "
            "gets those of 8 bits from here: quantize it with another scheme, or convert with --dtype float16."
        )
    unsigned_zeros(array, name)


def _part(
    name: str,
    dtype: np.dtype,
    shape: tuple[int, ...],
    make: Callable[[QuantArray], Any],
    read: Callable[[], QuantArray],
) -> LazyTensor:
    nbytes = math.prod(shape) * dtype.itemsize
    return LazyTensor(name, shape, dtype, nbytes, lambda: np.ascontiguousarray(make(read())))


def _scales(module: str, array: QuantArray, read: Callable[[], QuantArray]) -> LazyTensor:
    assert array.scales is not None
    dtype = np.dtype(array.scales.dtype)
    return _part(f"{module}.weight_scale", dtype, array.scales.shape, lambda array: array.scales, read)


def _packed(module: str, array: QuantArray, read: Callable[[], QuantArray]) -> list[LazyTensor]:
    scheme, (rows, width) = _scheme(array), array.shape
    bits = scheme.bits

    def zero_points(array: QuantArray) -> np.ndarray:
        zeros = unsigned_zeros(array, f"{module}.weight")
        assert zeros is not None
        return pack_words(zeros.T, bits).T

    shape = np.asarray(array.shape, np.int64)
    parts = [
        _part(
            f"{module}.weight_packed",
            WORD,
            (rows, word_count(width, bits)),
            lambda array: values_to_words(np.asarray(array.values), width, bits),
            read,
        ),
        LazyTensor(f"{module}.weight_shape", shape.shape, shape.dtype, shape.nbytes, lambda: shape),
        _scales(module, array, read),
    ]
    if not scheme.symmetric:
        size = (word_count(rows, bits), scheme.groups(width))
        parts.append(_part(f"{module}.weight_zero_point", WORD, size, zero_points, read))
    return parts


def _plain(module: str, array: QuantArray, read: Callable[[], QuantArray]) -> list[LazyTensor]:
    scheme, (rows, width) = _scheme(array), array.shape
    kind = np.dtype(np.int8 if scheme.codes == "integer" else ml_dtypes.float8_e4m3fn)
    weight = _part(
        f"{module}.weight", kind, (rows, width), lambda array: np.asarray(array.values).view(kind)[:, :width], read
    )
    parts = [weight, _scales(module, array, read)]
    if not scheme.symmetric:
        size = (rows, scheme.groups(width))
        parts.append(
            _part(f"{module}.weight_zero_point", kind, size, lambda array: np.asarray(array.zeros).astype(kind), read)
        )
    return parts


def _dequantized(name: str, array: QuantArray, read: Callable[[], QuantArray]) -> LazyTensor:
    assert array.scales is not None
    dtype = np.dtype(array.scales.dtype)

    def values(array: QuantArray) -> np.ndarray:
        with np.errstate(over="ignore"):
            narrow = decode(array).astype(dtype)
        if not np.isfinite(narrow).all():
            raise CheckpointError(
                f"{name} has values beyond {dtype}, as which it is written: convert with --dtype float32."
            )
        return narrow

    return _part(name, dtype, array.shape, values, read)
