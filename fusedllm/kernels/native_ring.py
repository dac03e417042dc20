"""Calls the native arithmetic of masked products on NumPy arrays in host memory (`cpu/ring.h`); runs no JAX."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from fusedllm.kernels import native
from fusedllm.kernels.walsh import block_of

LETTERS: dict[str, type[ctypes._SimpleCData[Any]]] = {"p": ctypes.c_void_p, "n": ctypes.c_int32, "s": ctypes.c_int64}

# Of the functions in `cpu/ring.h`: pointers, int32 and int64.
SIGNATURES = {
    "fusedllm_ring_product": "ppsssp",
    "fusedllm_ring_encode": "ppsssppp",
    "fusedllm_ring_decode": "ppppssnpp",
    "fusedllm_ring_residues": "pnpsssp",
    "fusedllm_ring_weigh": "ppsssp",
    "fusedllm_ring_largest_row": "pssp",
}

# What the functions return where a sum is out of range.
OUT_OF_RANGE = 1


@functools.cache
def available() -> bool:
    """Whether the library is there; without a warning where it is not, as NumPy does the same more slowly."""
    return native.why_unavailable() is None


def product(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """int32 `x` `[tokens, in]` times int8 `weight` `[out, in]` transposed, modulo 2^32; int32 `[tokens, out]`."""
    _check(x, np.int32, (len(x), weight.shape[1]))
    _check(weight, np.int8, weight.shape)
    out = np.empty((len(x), len(weight)), np.int32)
    _call("fusedllm_ring_product", x, weight, len(x), weight.shape[1], len(weight), out)
    return out


def encode(
    x: np.ndarray, pads: np.ndarray | None, masked: np.ndarray | None, scales: np.ndarray, *, turned: bool = False
) -> np.ndarray:
    """The codes of float32 `x` `[tokens, in]`, int8; writes tokens' `scales`, and codes plus `pads` to `masked`.

    Rows are `turned` first (`kernels/walsh.py`) where that is asked for.
    """
    _check(x, np.float32, x.shape)
    _check(scales, np.float32, (len(x), 1))
    for optional in (pads, masked):
        if optional is not None:
            _check(optional, np.int32, x.shape)
    codes = np.empty(x.shape, np.int8)
    _call("fusedllm_ring_encode", x, pads, *x.shape, block_of(x.shape[1]) if turned else 0, masked, codes, scales)
    return codes


def decode(
    sums: np.ndarray,
    pads: np.ndarray | None,
    token_scales: np.ndarray,
    output_scales: np.ndarray,
    bound: int,
    integers: np.ndarray,
    out: np.ndarray,
) -> bool:
    """Writes `sums` less `pads` to `integers`, and scaled to `out`; whether no magnitude is above `bound`."""
    for array in (sums, integers, *([] if pads is None else [pads])):
        _check(array, np.int32, sums.shape)
    _check(token_scales, np.float32, (len(sums), 1))
    _check(output_scales, np.float32, sums.shape[1:])
    _check(out, np.float32, sums.shape)
    result = _call("fusedllm_ring_decode", sums, pads, token_scales, output_scales, *sums.shape, bound, integers, out)
    return result != OUT_OF_RANGE


def residues(x: np.ndarray, secrets: np.ndarray) -> np.ndarray:
    """`x` `[tokens, width]`, int32 or int8, times uint32 `secrets` `[rounds, width]` modulo 2^31 - 1, uint32."""
    _check(x, np.int8 if x.dtype == np.int8 else np.int32, x.shape)
    _check(secrets, np.uint32, (len(secrets), x.shape[1]))
    out = np.empty((len(x), len(secrets)), np.uint32)
    codes = int(x.dtype == np.int8)
    _call("fusedllm_ring_residues", x, codes, secrets, len(secrets), *x.shape, out)
    return out


def weigh(secrets: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """uint32 `secrets` `[rounds, out]` times int8 `weight` `[out, in]` modulo 2^31 - 1, uint32 `[rounds, in]`."""
    _check(weight, np.int8, weight.shape)
    _check(secrets, np.uint32, (len(secrets), len(weight)))
    out = np.empty((len(secrets), weight.shape[1]), np.uint32)
    _call("fusedllm_ring_weigh", weight, secrets, len(secrets), *weight.shape, out)
    return out


def largest_row(weight: np.ndarray) -> int:
    """The largest sum of magnitudes of a row of int8 `weight`."""
    _check(weight, np.int8, weight.shape)
    largest = np.zeros(1, np.int64)
    _call("fusedllm_ring_largest_row", weight, *weight.shape, largest)
    return int(largest[0])


def _check(array: np.ndarray, dtype: type, shape: tuple[int, ...]) -> None:
    if array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous:
        raise ValueError(
            f"native arithmetic takes contiguous {np.dtype(dtype).name} {list(shape)} here, got {array.dtype} "
            f"{list(array.shape)}."
        )


def _call(name: str, *arguments: np.ndarray | int | None) -> int:
    """Arrays are passed by their address."""
    passed = [_address(argument) if isinstance(argument, np.ndarray) else argument for argument in arguments]
    result = _function(name)(*passed)
    if result == -2:
        raise MemoryError
    assert result >= 0, "sizes that were checked make no sense"
    return result


def _address(array: np.ndarray) -> int:
    # A third of the time of the other, which is most of a call for one token.
    if array.flags.writeable and array.size:
        return ctypes.addressof(ctypes.c_char.from_buffer(array.data))
    return array.ctypes.data


@functools.cache
def _function(name: str) -> Callable[..., int]:
    function: ctypes._NamedFuncPointer = getattr(native.library(), name)
    function.argtypes = [LETTERS[letter] for letter in SIGNATURES[name]]
    function.restype = ctypes.c_int32
    return function
