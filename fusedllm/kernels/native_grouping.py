"""Calls the native quantizer and its inverse on matrices in host memory, many in one call (`cpu/grouping.h`)."""

from __future__ import annotations

import ctypes

import ml_dtypes
import numpy as np

from fusedllm.kernels import native
from fusedllm.kernels.grouped import GroupedScheme

# `fusedllm_grouping`, field by field.
JOB = np.dtype(
    [
        ("weights", np.uint64),
        ("codes", np.uint64),
        ("scales", np.uint64),
        ("zeros", np.uint64),
        ("rows", np.int64),
        ("width", np.int64),
        ("group", np.int64),
        ("number", np.int32),
        ("bits", np.int32),
        ("wide", np.int32),
        ("reserved", np.int32),
        ("error", np.float64),
        ("power", np.float64),
        ("seconds", np.float64),
        ("problem", np.int64),
    ],
    align=True,
)
NUMBERS = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(ml_dtypes.bfloat16): 2}

# Of weights, as `cpu/ffi_grouping.cc` has it too; larger ones are left to XLA.
LARGEST_GROUP = 4096

# Bits of a job's `problem`.
NOT_FINITE = 1
SCALE_TOO_LARGE = 2


def can_encode(scheme: GroupedScheme) -> bool:
    """Whether the native quantizer knows `scheme`."""
    is_integer = scheme.codes == "integer" and not scheme.turned
    return is_integer and scheme.group_size % 32 == 0 and scheme.group_size <= LARGEST_GROUP


def describe(jobs: np.ndarray, scheme: GroupedScheme) -> None:
    """Fills in what `scheme` says in a slice of jobs."""
    jobs["group"] = scheme.group_size
    jobs["bits"] = scheme.bits


def encode(jobs: np.ndarray) -> None:
    """Quantizes: each of `jobs`, of dtype `JOB`, holds the addresses of memory that the caller keeps alive.

    Raises:
      ImplementationError: the native library is not there.
      MemoryError: there was not enough for scratch.
    """
    _call(native.library().fusedllm_encode, jobs)


def decode(jobs: np.ndarray) -> None:
    """Decodes into `weights`; as `encode`."""
    _call(native.library().fusedllm_decode, jobs)


def _call(function: ctypes._FuncPointer, jobs: np.ndarray) -> None:
    assert jobs.dtype == JOB
    assert jobs.flags.c_contiguous
    result = function(ctypes.c_void_p(jobs.ctypes.data), ctypes.c_int64(len(jobs)))
    if result == -2:
        raise MemoryError
    assert result == 0, "a job makes no sense"
