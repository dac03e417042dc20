"""`Arena`: memory for many small matrices in a few large pieces, which the system can back with huge pages.

A matrix of a megabyte in memory of its own is spread over hundreds of small pages, at each of which the processor stops
to read ahead; decoding was seen to take twice as long.
"""

from __future__ import annotations

import math
import threading

import jax
import numpy as np

# Buffers on such a boundary become jax's without a copy.
ALIGNMENT = 64

# Of a piece at least.
ARENA_BYTES = 256 * 2**20


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialized array that begins on a 64-byte boundary, which `jax.device_put` on the CPU need not copy."""
    nbytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + nbytes].view(dtype).reshape(shape)


class Arena:
    """Gives memory out, and takes none back; any thread may take."""

    def __init__(self) -> None:
        self._left = np.empty(0, np.uint8)
        self._lock = threading.Lock()

    def take(self, size: int) -> np.ndarray:
        """The next `size` bytes, on a boundary of `ALIGNMENT`."""
        whole = -(-size // ALIGNMENT) * ALIGNMENT
        with self._lock:
            if len(self._left) < whole:
                self._left = aligned_empty((max(whole, ARENA_BYTES),), np.dtype(np.uint8))
            taken, self._left = self._left[:size], self._left[whole:]
        return taken

    def put(self, values: np.ndarray | jax.Array, device: jax.Device) -> jax.Array:
        """`values` on a device of the CPU, in memory of the arena."""
        source = np.asarray(values)
        place = self.take(source.nbytes).view(source.dtype).reshape(source.shape)
        np.copyto(place, source)
        place.flags.writeable = False
        return jax.device_put(place, device)
