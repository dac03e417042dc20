"""The native kernels for the CPU: finds their library, registers its FFI handlers, chooses variant and threads.

The library is built when the package is installed (`setup.py`, sources in `cpu/`). Where there was no compiler it is
missing, and XLA's implementations serve.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.machinery
import os
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from fusedllm.errors import ImplementationError

# Each is the name of a symbol in the library and of the FFI target.
HANDLERS = (
    "fusedllm_linear",
    "fusedllm_embed",
    "fusedllm_attention",
    "fusedllm_draw",
    "fusedllm_rms_norm",
    "fusedllm_swiglu",
    "fusedllm_quantize",
    "fusedllm_dequantize",
    "fusedllm_ring_linear",
    "fusedllm_hadamard",
    "fusedllm_ask",
)

# Best first.
ISAS = ("avx512bf16", "avx512", "avx2", "portable")
ISA_VARIABLE = "FUSEDLLM_CPU_ISA"

# The path of another library than the installed one: `scripts/sanitize.py` builds one with checks.
LIBRARY_VARIABLE = "FUSEDLLM_CPU_LIBRARY"

# `Pool::kMostThreads`.
MOST_THREADS = 256

# Changes with every change of a handler's operands or of their dtypes, in `cpu/isa.cc` too: a library of another age is
# not used.
INTERFACE = 10


class MissingKernelsWarning(UserWarning):
    """The native kernels are not there, and what that loses."""


def available() -> bool:
    """Whether the native kernels can run; the first time that they can't, a warning says why."""
    problem = why_unavailable()
    if problem is not None:
        _warn(problem)
    return problem is None


@functools.cache
def why_unavailable() -> str | None:
    """Why the native kernels can't run, or `None` if they can.

    Raises:
      ImplementationError: `FUSEDLLM_CPU_ISA` names a variant that this processor can't run.
    """
    path = _find()
    if path is None:
        return "they were not built when the package was installed (no C++ compiler?)"
    try:
        library = ctypes.CDLL(str(path))
        age = library.fusedllm_interface()
    except (OSError, AttributeError) as error:
        return f"{path.name} can't be used: {error}"
    if age != INTERFACE:
        return f"{path.name} was built from other sources; build it again with `pip install -e .`"
    _declare(library)
    wanted = os.environ.get(ISA_VARIABLE)
    if wanted and not library.fusedllm_has_isa(wanted.encode()):
        raise ImplementationError(
            f"{ISA_VARIABLE} asks for {wanted!r}; this processor runs: {', '.join(_runnable(library))}."
        )
    for name in HANDLERS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return None


def isa() -> str:
    """The variant that runs: one of `ISAS`."""
    name: bytes = library().fusedllm_isa()
    return name.decode()


def isas() -> tuple[str, ...]:
    """The variants that this processor can run, best first."""
    return _runnable(library())


@contextlib.contextmanager
def using_isa(name: str) -> Iterator[None]:
    """Makes the variant `name` run inside the block, in all threads.

    Raises:
      ImplementationError: this processor can't run it, or there is none of that name.
    """
    before = isa()
    if not library().fusedllm_choose_isa(name.encode()):
        raise ImplementationError(f"variant {name!r} can't run here; this processor runs: {', '.join(isas())}.")
    try:
        yield
    finally:
        library().fusedllm_choose_isa(before.encode())


def threads() -> int:
    """Threads that share the work of a kernel; by default as many as the process may use cores."""
    count: int = library().fusedllm_threads()
    return count


def set_threads(count: int) -> None:
    """Sets `threads` for the whole process, from the next kernel on; at most `MOST_THREADS`."""
    library().fusedllm_set_threads(count)


def packed_bytes(number: int, shared: int, rows: int, width: int) -> int:
    """Bytes of a matrix packed in the format `number` (`cpu/variant.h`), `shared` groups a scale; -1 if it can't be."""
    count: int = library().fusedllm_packed_bytes(number, shared, rows, width)
    return count


def pack(number: int, rows: int, width: int, blocks: np.ndarray, packed: np.ndarray) -> None:
    """Packs GGUF's `blocks` into `packed`, both contiguous uint8, with all threads and without the interpreter lock."""
    expected = packed_bytes(number, 1, rows, width)
    if expected < 0 or packed.nbytes != expected or not (blocks.flags.c_contiguous and packed.flags.c_contiguous):
        raise ValueError(f"a matrix {rows} x {width} is packed from contiguous blocks into {expected} bytes.")
    failed = library().fusedllm_pack(number, rows, width, blocks.ctypes.data, packed.ctypes.data)
    assert not failed


def pack_grouped(
    number: int,
    shared: int,
    shape: tuple[int, int],
    bits: int,
    codes: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray | None,
    packed: np.ndarray,
) -> None:
    """Packs grouped `codes` of a matrix of `shape` into `packed`, with all threads and without the interpreter lock.

    All are contiguous: `codes`, uint8 `[rows, bytes per row]`, and `packed` as `packed_bytes` says; `scales` and
    `zeros`, float16 `[rows, groups]`, a group being `shared` times 32 columns.
    """
    rows, width = shape
    numbers = (rows, -(-width // (32 * shared)))
    halves = [scales] if zeros is None else [scales, zeros]
    fits = (
        packed.nbytes == packed_bytes(number, shared, rows, width)
        and codes.dtype == np.uint8
        and (codes.ndim, len(codes)) == (2, rows)
        and all(half.dtype == np.float16 and half.shape == numbers for half in halves)
        and all(array.flags.c_contiguous for array in (codes, packed, *halves))
    )
    if not fits or library().fusedllm_pack_grouped(
        number,
        shared,
        rows,
        width,
        bits,
        codes.shape[1],
        codes.ctypes.data,
        scales.ctypes.data,
        None if zeros is None else zeros.ctypes.data,
        packed.ctypes.data,
    ):
        raise ValueError(f"a matrix {rows} x {width} is not packed from codes {codes.shape}, scales {scales.shape}.")


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library.

    Raises:
      ImplementationError: it can't be used.
    """
    problem = why_unavailable()
    path = _find()
    if problem is not None or path is None:
        raise ImplementationError(f"the native kernels are not there: {problem}.")
    found = ctypes.CDLL(str(path))
    _declare(found)
    return found


def _find() -> Path | None:
    if named := os.environ.get(LIBRARY_VARIABLE):
        return Path(named)
    names = [f"_cpu{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    return next((path for name in names if (path := Path(__file__).with_name(name)).exists()), None)


def _declare(library: ctypes.CDLL) -> None:
    number, size, pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
    library.fusedllm_isa.restype = ctypes.c_char_p
    library.fusedllm_has_isa.argtypes = [ctypes.c_char_p]
    library.fusedllm_choose_isa.argtypes = [ctypes.c_char_p]
    library.fusedllm_set_threads.argtypes = [number]
    library.fusedllm_packed_bytes.argtypes = [number, size, size, size]
    library.fusedllm_packed_bytes.restype = size
    library.fusedllm_pack.argtypes = [number, size, size, pointer, pointer]
    library.fusedllm_pack_grouped.argtypes = [number, size, size, size, number, size, *[pointer] * 4]


def _runnable(library: ctypes.CDLL) -> tuple[str, ...]:
    return tuple(name for name in ISAS if library.fusedllm_has_isa(name.encode()))


_warned = threading.Event()


def _warn(problem: str) -> None:
    if not _warned.is_set():
        _warned.set()
        warnings.warn(
            f"fusedllm's native CPU kernels are missing: {problem}. XLA computes instead: quantized models decode at "
            "about a tenth of the speed, from weights that take four to eight times the memory.",
            MissingKernelsWarning,
            stacklevel=2,
        )
