"""Reading quantized matrices of GPTQ (AutoGPTQ, GPTQModel) and of AWQ (AutoAWQ's `gemm`).

Both store `[in, out]`, four tensors a module. `qweight` has the codes in 32-bit words: GPTQ along `in`, int32
`[in * bits / 32, out]`, AWQ eight columns of `out` a word, in an order of its own. `qzeros` has the zero points
`[groups, out * bits / 32]`, packed along `out`; the format `gptq` subtracted one from each, `gptq_v2` does not.
`scales` are `[groups, out]`, and GPTQ's `g_idx` `[in]` names the group of each input. Learnt from AutoGPTQ 0.7,
GPTQModel 7.7 and AutoAWQ 0.2.9.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fusedllm.errors import CheckpointError, ConfigError, QuantizationError
from fusedllm.kernels.grouped import GroupedScheme
from fusedllm.model.attributes import Attributes, shortened
from fusedllm.qarray import QuantArray
from fusedllm.quant.schemes import scheme_of
from fusedllm.weights.checkpoint import LazyTensor
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

_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_GPTQ_BITS = (3, 4, 8)
_AWQ_BITS = 4
# Rows are padded to whole groups up to this size, so that all matrices of a usual checkpoint have one scheme.
_LONGEST_PADDED = 1024
# Nibble i of a word of AWQ, lowest first, is column _AWQ_ORDER[i] of its eight; and the other way round.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_AWQ_COLUMNS = np.argsort(_AWQ_ORDER)


def read_gptq(quantization: Mapping[str, Any], tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """`tensors` of a GPTQ checkpoint with the parts of each quantized matrix made one tensor, `[out, in]`.

    A matrix whose groups are out of order (`desc_act`) is only dequantized.

    Raises:
      ConfigError: the `quantization_config` asks for something that is not implemented; it is named.
      CheckpointError: a part of a matrix is missing or does not fit the others.
    """
    attributes = Attributes(quantization, "the quantization_config")
    format = attributes.string("checkpoint_format", attributes.string("format", "gptq"))
    if str(format).lower() not in ("gptq", "gptq_v2"):
        raise ConfigError(f"{attributes.what} has the format {shortened(format)}; gptq and gptq_v2 can be read.")
    attributes.expect("quant_method", "gptq")
    attributes.expect("is_marlin_format", False)
    attributes.expect("pack_dtype", "int32", "torch.int32")
    for name in ("adapter", "rotation"):
        attributes.expect(name)
    dynamic = attributes.raw("dynamic", {})
    # Rules with a minus only say which modules were left alone.
    if dynamic and not (isinstance(dynamic, Mapping) and all(str(rule).startswith("-:") for rule in dynamic)):
        raise ConfigError(f"{attributes.what} has rules for single modules ('dynamic'), which are not implemented.")
    scheme = _scheme(attributes, _GPTQ_BITS, symmetric=attributes.boolean("sym", True))
    ordered = attributes.boolean("desc_act", False) and scheme.group_size > 0
    minus_one = str(format).lower() == "gptq"
    return _read(tensors, lambda module: _gptq(module, scheme, minus_one, ordered, tensors))


def read_awq(quantization: Mapping[str, Any], tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """`tensors` of an AWQ checkpoint with the parts of each quantized matrix made one tensor, `[out, in]`.

    Raises:
      ConfigError: the `quantization_config` asks for something that is not implemented; it is named.
      CheckpointError: a part of a matrix is missing or does not fit the others.
    """
    attributes = Attributes(quantization, "the quantization_config")
    format = attributes.string("version", attributes.string("format", "gemm"))
    # llm-awq says with which of its own layouts it packs in `backend`, whatever the version says.
    backend = attributes.string("backend", None)
    if str(format).lower() != "gemm" or backend == "llm-awq":
        found = shortened(format if backend != "llm-awq" else backend)
        raise ConfigError(f"{attributes.what} has the version {found}; of AWQ only gemm can be read.")
    scheme = _scheme(attributes, (_AWQ_BITS,), symmetric=not attributes.boolean("zero_point", True))
    return _read(tensors, lambda module: _awq(module, scheme, tensors))


def _scheme(attributes: Attributes, known: tuple[int, ...], symmetric: bool) -> GroupedScheme:
    """What else stands in the `quantization_config` is how codes were searched for, and not what they mean."""
    bits, size = attributes.integer("bits", None), attributes.integer("group_size", None, low=-1)
    if bits not in known or size is None:
        listed = ", ".join(map(str, known))
        raise ConfigError(
            f"{attributes.what} has bits {bits} and group_size {size}; codes of {listed} bits with a group_size can be "
            "read."
        )
    try:
        return scheme_of(bits, max(size, 0), symmetric)
    except QuantizationError as error:
        raise ConfigError(f"{attributes.what} can't be read, because {error}") from error


def _read(tensors: Mapping[str, LazyTensor], make: Callable[[str], LazyTensor]) -> dict[str, LazyTensor]:
    modules = {name.removesuffix(".qweight"): True for name in tensors if name.endswith(".qweight")}
    result = {
        name: tensor
        for name, tensor in tensors.items()
        if not (name.rpartition(".")[0] in modules and name.rpartition(".")[2] in _PARTS)
    }
    for module in modules:
        if f"{module}.weight" in result:
            raise CheckpointError(f"{module} has both a weight and a qweight; one of them is left over.")
        result[f"{module}.weight"] = make(module)
    return result


def _gptq(
    module: str, scheme: GroupedScheme, minus_one: bool, ordered: bool, tensors: Mapping[str, LazyTensor]
) -> LazyTensor:
    bits = scheme.bits
    codes = part_of(tensors, module, "qweight", [WORD], [None, None])
    words, rows = codes.shape
    if words * WORD_BITS % bits:
        raise CheckpointError(
            f"{codes.name} has columns of {words} words, which do not hold whole codes of {bits} bits."
        )
    width = words * WORD_BITS // bits
    scheme = _within(scheme, codes, width)
    groups = scheme.groups(width)
    scales = part_of(tensors, module, "scales", SCALES, [groups, rows])
    zeros = part_of(tensors, module, "qzeros", [WORD], [groups, word_count(rows, bits)])
    order = None
    # Some writers leave out an index that only counts.
    if ordered or f"{module}.g_idx" in tensors:
        order = group_order(part_of(tensors, module, "g_idx", [WORD], [width]), width, scheme)

    def array() -> QuantArray:
        points = _checked(_gptq_zeros(zeros.read(), rows, bits, minus_one), scheme, zeros.name)
        values = values_from_words(codes.read().T, width, scheme, points)
        return quant_array(scheme, (rows, width), values, np.ascontiguousarray(scales.read().T), points)

    nbytes = codes.nbytes + scales.nbytes + zeros.nbytes
    return lazy_matrix(f"{module}.weight", scheme, (rows, width), nbytes, array, order)


def _gptq_zeros(words: np.ndarray, rows: int, bits: int, minus_one: bool) -> np.ndarray:
    """Zero points as unsigned codes `[rows, groups]`."""
    if minus_one and WORD_BITS % bits == 0:
        # GPTQModel subtracted from whole words, so that a zero point of 0 borrows from its neighbour; adding to whole
        # words gives that back, and is the same as adding to codes where nothing was borrowed.
        ones = sum(1 << shift for shift in range(0, WORD_BITS, bits))
        words = words.view(np.uint32) + np.uint32(ones)
    points = unpack_words(words, rows, bits).T
    if minus_one and WORD_BITS % bits:
        points = (points + np.uint8(1)) & np.uint8((1 << bits) - 1)
    return points


def _awq(module: str, scheme: GroupedScheme, tensors: Mapping[str, LazyTensor]) -> LazyTensor:
    codes = part_of(tensors, module, "qweight", [WORD], [None, None])
    width, columns = codes.shape
    scheme = _within(scheme, codes, width)
    rows, groups = columns * len(_AWQ_ORDER), scheme.groups(width)
    scales = part_of(tensors, module, "scales", SCALES, [groups, rows])
    zeros = part_of(tensors, module, "qzeros", [WORD], [groups, columns])

    def array() -> QuantArray:
        points = _checked(_awq_codes(zeros.read()), scheme, zeros.name)
        values = values_from_codes(_awq_codes(codes.read()), scheme, points)
        return quant_array(scheme, (rows, width), values, np.ascontiguousarray(scales.read().T), points)

    nbytes = codes.nbytes + scales.nbytes + zeros.nbytes
    return lazy_matrix(f"{module}.weight", scheme, (rows, width), nbytes, array)


def _within(scheme: GroupedScheme, codes: LazyTensor, width: int) -> GroupedScheme:
    """`scheme` for rows of `width` weights: a group that is much longer is the row, and nothing is padded to it."""
    if width < 1:
        raise CheckpointError(f"{codes.name} is {list(codes.shape)} and holds no codes.")
    return scheme if scheme.group_size <= max(width, _LONGEST_PADDED) else scheme_of(scheme.bits, 0, scheme.symmetric)


def _awq_codes(words: np.ndarray) -> np.ndarray:
    """Words `[n, out / 8]` as unsigned codes `[out, n]`."""
    eight = unpack_words(words, words.shape[1] * len(_AWQ_ORDER), _AWQ_BITS)
    return np.asarray(eight.reshape(len(eight), -1, len(_AWQ_ORDER))[..., _AWQ_COLUMNS].reshape(eight.shape).T)


def _checked(points: np.ndarray, scheme: GroupedScheme, name: str) -> np.ndarray | None:
    """`points`, or `None` for a symmetric scheme, whose zero points are all the middle."""
    if not scheme.symmetric:
        return points
    if (points != 1 << (scheme.bits - 1)).any():
        raise CheckpointError(
            f"{name} has zero points beside the middle, although the quantization_config calls the codes symmetric."
        )
    return None
