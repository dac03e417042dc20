"""Calls the native meeting of a program on a device of this CPU with the thread that feeds it (`cpu/rendezvous.h`)."""

from __future__ import annotations

import ctypes
import functools

import jax
import jax.numpy as jnp
import numpy as np

from fusedllm.kernels import native

# `Rendezvous::kNothing`: the number of no product.
NOTHING = -1

# `Rendezvous::Outcome`.
DONE, NOT_YET, ENDED, OUT_OF_ORDER, OTHER_SIZE = 0, 1, -1, -2, -3

# `Rendezvous::kMostResults`.
MOST_RESULTS = 8


def ask(
    place: int, last: int, results: tuple[jax.Array, ...], number: int, operand: jax.ShapeDtypeStruct | None
) -> jax.Array:
    """Traced: hands over `results` of the product `last`, and takes the operand of the product `number`.

    Without results or without an operand the number is `NOTHING`, and then what is returned means nothing.
    """
    taken = jax.ShapeDtypeStruct((), jnp.int32) if operand is None else operand
    call = jax.ffi.ffi_call("fusedllm_ask", (taken,), has_side_effect=True)
    (x,) = call(*results, place=np.int64(place), last=np.int64(last), number=np.int64(number))
    return x


def open_place() -> int:
    """The number of a place in which a program can meet a thread, or -1 where all are in use."""
    place: int = _functions().fusedllm_rendezvous_open()
    return place


def close_place(place: int) -> None:
    """Gives a place back; no program may know it any more."""
    _functions().fusedllm_rendezvous_close(place)


def begin(place: int) -> None:
    """A program may ask from now on. No other one does."""
    _functions().fusedllm_rendezvous_begin(place)


def end(place: int) -> None:
    """Whoever waits is told that the pass is over, and no memory of the last exchange is reached any more."""
    _functions().fusedllm_rendezvous_end(place)


def exchange(place: int, number: int, sent: np.ndarray, into: tuple[np.ndarray, ...], seconds: float) -> int:
    """Sends `sent`, contiguous, and waits for what goes `into` contiguous arrays; `DONE`, or why not.

    After `NOT_YET` it is `wait` that waits on; `sent` and `into` must stay where they are until something else comes.
    """
    count = len(into)
    pointers = (ctypes.c_void_p * count)(*(array.ctypes.data for array in into))
    sizes = (ctypes.c_int64 * count)(*(array.nbytes for array in into))
    outcome: int = _functions().fusedllm_rendezvous_exchange(
        place, number, sent.ctypes.data, sent.nbytes, count, pointers, sizes, int(1e6 * seconds)
    )
    return outcome


def wait(place: int, seconds: float) -> int:
    """Waits on for the results of an `exchange` that returned `NOT_YET`."""
    outcome: int = _functions().fusedllm_rendezvous_wait(place, int(1e6 * seconds))
    return outcome


@functools.cache
def _functions() -> ctypes.CDLL:
    library = native.library()
    number, size, pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
    library.fusedllm_rendezvous_close.argtypes = [number]
    library.fusedllm_rendezvous_begin.argtypes = [number]
    library.fusedllm_rendezvous_end.argtypes = [number]
    library.fusedllm_rendezvous_wait.argtypes = [number, size]
    library.fusedllm_rendezvous_exchange.argtypes = [number, size, pointer, size, number, pointer, pointer, size]
    return library
