"""Reading quantized matrices of compressed-tensors, the format of llm-compressor and vLLM.

A module's `weight` is stored as `weight_packed` (streams of unsigned codes along a row, `weight_shape` beside it) or,
where it has eight bits, as int8 or float8 itself; `weight_scale` is `[out, groups]`, `[out, 1]` or one number, and
`weight_zero_point` has that shape too, packed along `out` where the weight is packed. `config_groups` of the
`quantization_config` say what the numbers mean. Learnt from https://github.com/vllm-project/compressed-tensors 0.20.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from fusedllm.errors import CheckpointError
from fusedllm.kernels.grouped import GroupedScheme
from fusedllm.model.attributes import shortened
from fusedllm.qarray import QuantArray
from fusedllm.weights.checkpoint import LazyTensor
from fusedllm.weights.compressed_tensors_config import Group, group_for, groups_of
from fusedllm.weights.grouped_codes import (
    SCALES,
    WORD,
    WORD_BITS,
    group_order,
    lazy_matrix,
    part_of,
    quant_array,
    unpack_words,
    values_from_codes,
    values_from_words,
    word_count,
)

_INT8, _INT64 = np.dtype(np.int8), np.dtype(np.int64)
_FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
_PARTS = ("weight_packed", "weight_shape", "weight_scale", "weight_zero_point", "weight_g_idx")
# Fixed ranges of activations, which are not rounded to them here.
_ACTIVATIONS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")


def read(quantization: Mapping[str, Any], tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """`tensors` of a file with the parts of each quantized matrix made one tensor, under the name of its weight.

    Activations are not rounded, except in W8A8 with a scale for each token.

    Raises:
      ConfigError: the `quantization_config` asks for something that is not implemented; it is named.
      CheckpointError: a part of a matrix is missing or does not fit the others.
    """
    groups = groups_of(quantization)
    split = {name: (module, part) for name in tensors for module, _, part in [name.rpartition(".")]}
    # By the file, and not by the targets: a matrix without codes was left alone, whatever the targets say. In order.
    quantized = dict.fromkeys(module for name, (module, part) in split.items() if _is_code(part, tensors[name]))
    result = {
        name: tensors[name]
        for name, (module, part) in split.items()
        if part not in _ACTIVATIONS and not (module in quantized and part in ("weight", *_PARTS))
    }
    for module in quantized:
        group = group_for(module, groups)
        result[f"{module}.weight"] = (_packed if group.packed else _plain)(module, group, tensors)
    return result


def _is_code(part: str, tensor: LazyTensor) -> bool:
    return part in _PARTS or (part == "weight" and tensor.dtype in (_INT8, _FLOAT8))


def _packed(module: str, group: Group, tensors: Mapping[str, LazyTensor]) -> LazyTensor:
    scheme = group.scheme
    packed = part_of(tensors, module, "weight_packed", [WORD], [None, None])
    sizes = part_of(tensors, module, "weight_shape", [_INT64, WORD], [2]).read().tolist()
    rows, width = sizes
    if rows != packed.shape[0] or width < 1 or word_count(width, scheme.bits) != packed.shape[1]:
        # Before 0.18 a code never straddled two words, which left bits of them free where 32 is no multiple.
        older = -(-width // (WORD_BITS // scheme.bits)) == packed.shape[1]
        hint = ": a compressed-tensors before 0.18 packed it; use a newer one" if older else ""
        raise CheckpointError(
            f"{packed.name} is {list(packed.shape)}, which does not hold {shortened(sizes)} codes of {scheme.bits} "
            f"bits{hint}."
        )
    groups = _groups_of_row(module, width, scheme)
    scales = _scales(module, group, rows, groups, tensors)
    zeros, order = None, _order(module, width, scheme, tensors)
    if not scheme.symmetric:
        count = word_count(rows, scheme.bits)
        zeros = part_of(tensors, module, "weight_zero_point", [WORD], [count, groups])

    def array() -> QuantArray:
        codes = None if zeros is None else unpack_words(zeros.read().T, rows, scheme.bits).T
        values = values_from_words(packed.read(), width, scheme, codes)
        return quant_array(scheme, (rows, width), values, _spread(scales.read(), rows, groups), codes)

    nbytes = sum(part.nbytes for part in (packed, scales, zeros) if part is not None)
    return lazy_matrix(f"{module}.weight", scheme, (rows, width), nbytes, array, order)


def _plain(module: str, group: Group, tensors: Mapping[str, LazyTensor]) -> LazyTensor:
    scheme = group.scheme
    weight = part_of(tensors, module, "weight", [_INT8 if scheme.codes == "integer" else _FLOAT8], [None, None])
    rows, width = weight.shape
    groups = _groups_of_row(module, width, scheme)
    scales = _scales(module, group, rows, groups, tensors)
    zeros, order = None, _order(module, width, scheme, tensors)
    if not scheme.symmetric:
        zeros = part_of(tensors, module, "weight_zero_point", [_INT8], scales.shape)
    half = 1 << (scheme.bits - 1)

    def unsigned(signed: LazyTensor) -> np.ndarray:
        shifted = signed.read().astype(np.int16) + half
        if ((shifted < 0) | (shifted >= 2 * half)).any():
            raise CheckpointError(f"{signed.name} has codes that are none of {scheme.bits} bits.")
        return shifted.astype(np.uint8)

    def array() -> QuantArray:
        codes = None if zeros is None else _spread(unsigned(zeros), rows, groups)
        # Eight bits are stored as they are here.
        values = weight.read().view(np.uint8)
        if scheme.bits < 8:
            values = values_from_codes(unsigned(weight), scheme, codes)
        return quant_array(scheme, (rows, width), values, _spread(scales.read(), rows, groups), codes)

    nbytes = sum(part.nbytes for part in (weight, scales, zeros) if part is not None)
    return lazy_matrix(f"{module}.weight", scheme, (rows, width), nbytes, array, order)


def _groups_of_row(module: str, width: int, scheme: GroupedScheme) -> int:
    if scheme.group_size and width % scheme.group_size:
        raise CheckpointError(
            f"{module}.weight has rows of {width} weights, which groups of {scheme.group_size} do not divide."
        )
    return scheme.groups(width)


def _scales(module: str, group: Group, rows: int, groups: int, tensors: Mapping[str, LazyTensor]) -> LazyTensor:
    found = tensors.get(f"{module}.weight_scale")
    rank = 2 if found is None else len(found.shape)
    if group.strategy == "tensor":
        return part_of(tensors, module, "weight_scale", SCALES, [1] * rank)
    return part_of(tensors, module, "weight_scale", SCALES, [rows] if rank == 1 and groups == 1 else [rows, groups])


def _spread(numbers: np.ndarray, rows: int, groups: int) -> np.ndarray:
    """A number for each group, for each row or for all, as `[rows, groups]`."""
    return np.broadcast_to(numbers.reshape(-1, groups if numbers.size > 1 else 1), (rows, groups))


def _order(module: str, width: int, scheme: GroupedScheme, tensors: Mapping[str, LazyTensor]) -> np.ndarray | None:
    """The group of each column where they are out of order, as GPTQ's act-order once left them."""
    if f"{module}.weight_g_idx" not in tensors:
        return None
    return group_order(part_of(tensors, module, "weight_g_idx", [WORD], [width]), width, scheme)
