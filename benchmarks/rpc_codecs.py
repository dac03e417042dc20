"""How arrays travel between the trusted client and the device server of `rpc_ladder.py`: its rungs' codecs.

A codec packs a small header and arrays into one ZeroMQ frame and takes them out again. Each side has its own instance;
neither knows jax.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import ml_dtypes
import msgpack
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT32 = np.dtype(np.float32)

# What XLA's CPU client asks of host memory that it uses as a device buffer: arrays in shared memory begin there.
ALIGNMENT = 64

Header = dict[str, Any]


class Codec(Protocol):
    """One way over. `wire` is the dtype that floating-point arrays have meanwhile; integers go as they are."""

    wire: np.dtype[Any]

    def pack(self, header: Header, arrays: Sequence[np.ndarray]) -> bytes:
        """The frame to send."""
        ...

    def unpack(self, frame: bytes) -> tuple[Header, list[np.ndarray]]:
        """What the other side packed; the arrays may be read-only."""
        ...

    def moved(self, frame: bytes, arrays: Sequence[np.ndarray]) -> int:
        """Bytes that crossed for a frame and its arrays, those beside the frame included."""
        ...


@dataclass(frozen=True)
class Lists:
    """(a) Arrays as lists of Python numbers, with dtype and shape: nine bytes and some 100 ns for each element."""

    wire: np.dtype[Any] = FLOAT32

    def pack(self, header: Header, arrays: Sequence[np.ndarray]) -> bytes:
        """Each element becomes a Python object on the way."""
        described = [{"data": array.tolist(), **_description(array)} for array in arrays]
        return msgpack.packb({**header, "arrays": described})

    def unpack(self, frame: bytes) -> tuple[Header, list[np.ndarray]]:
        """And another one on the way back."""
        header = msgpack.unpackb(frame)
        arrays = header.pop("arrays")
        return header, [np.array(a["data"], np.dtype(a["dtype"])).reshape(a["shape"]) for a in arrays]

    def moved(self, frame: bytes, arrays: Sequence[np.ndarray]) -> int:
        """All of it is in the frame."""
        del arrays
        return len(frame)


@dataclass(frozen=True)
class Raw:
    """(b) The arrays' bytes in msgpack; (c) with `wire` bfloat16.

    With `widen` arrays of bfloat16 arrive as float32: NumPy computes with nothing narrower.
    """

    wire: np.dtype[Any] = FLOAT32
    widen: bool = False

    def pack(self, header: Header, arrays: Sequence[np.ndarray]) -> bytes:
        """Narrowed where that is asked for, copied by `tobytes`, and once more by msgpack."""
        described = [{"data": a.tobytes(), **_description(a)} for a in (_narrowed(a, self.wire) for a in arrays)]
        return msgpack.packb({**header, "arrays": described})

    def unpack(self, frame: bytes) -> tuple[Header, list[np.ndarray]]:
        """msgpack copies, NumPy looks at the copy."""
        header = msgpack.unpackb(frame)
        arrays = (np.frombuffer(a["data"], np.dtype(a["dtype"])).reshape(a["shape"]) for a in header.pop("arrays"))
        return header, [_widened(array) if self.widen else array for array in arrays]

    def moved(self, frame: bytes, arrays: Sequence[np.ndarray]) -> int:
        """All of it is in the frame."""
        del arrays
        return len(frame)


class Arena:
    """Memory that two processes share: an anonymous file, which is gone once both have ended (Linux only)."""

    def __init__(self, descriptor: int, size: int) -> None:
        self._map = mmap.mmap(descriptor, size)
        self.memory = np.frombuffer(self._map, np.uint8)

    @staticmethod
    def descriptor() -> int:
        """A new file of no size, to be inherited by the server."""
        return os.memfd_create("rpc_ladder")


@dataclass(frozen=True)
class Shared:
    """(d) The arrays lie in shared memory, and only dtype, shape and place go through ZeroMQ.

    The trusted side copies what it reads (`copies`): the next reply overwrites it, and what the other side can write
    may change while it is looked at. The server looks at it where it lies.
    """

    outgoing: Arena
    incoming: Arena
    copies: bool
    wire: np.dtype[Any] = FLOAT32

    def pack(self, header: Header, arrays: Sequence[np.ndarray]) -> bytes:
        """One copy of each array.

        Raises:
          ValueError: they do not fit the shared memory.
        """
        described, at = [], 0
        for array in arrays:
            end = at + array.nbytes
            if end > self.outgoing.memory.size:
                raise ValueError(
                    f"the arrays of one message take {end:,} bytes or more, "
                    f"and {self.outgoing.memory.size:,} are shared."
                )
            np.copyto(self.outgoing.memory[at:end].view(array.dtype).reshape(array.shape), array)
            described.append({"at": at, **_description(array)})
            at = end + -end % ALIGNMENT
        return msgpack.packb({**header, "arrays": described})

    def unpack(self, frame: bytes) -> tuple[Header, list[np.ndarray]]:
        """Views, or copies of them."""
        header = msgpack.unpackb(frame)
        arrays = [self._read(described) for described in header.pop("arrays")]
        return header, [array.copy() for array in arrays] if self.copies else arrays

    def moved(self, frame: bytes, arrays: Sequence[np.ndarray]) -> int:
        """The frame, and the arrays beside it."""
        return len(frame) + sum(array.nbytes for array in arrays)

    def _read(self, described: dict[str, Any]) -> np.ndarray:
        dtype, shape, at = np.dtype(described["dtype"]), described["shape"], described["at"]
        count = int(np.prod(shape, dtype=np.int64))
        return self.incoming.memory[at : at + count * dtype.itemsize].view(dtype).reshape(shape)


def codecs(outgoing: Arena | None, incoming: Arena | None, trusted: bool) -> dict[str, Codec]:
    """One side's codecs by the letter of their rung; without arenas that of shared memory is left out."""
    made: dict[str, Codec] = {"a": Lists(), "b": Raw(), "c": Raw(BFLOAT16, widen=trusted)}
    if outgoing is not None and incoming is not None:
        made["d"] = Shared(outgoing, incoming, copies=trusted)
    return made


def shared_bytes(largest: int, arrays: int = 4) -> int:
    """The size of an arena for messages of `largest` bytes in so many arrays."""
    pages = -(-(largest + arrays * ALIGNMENT) // mmap.PAGESIZE)
    return pages * mmap.PAGESIZE


def _description(array: np.ndarray) -> Header:
    return {"dtype": array.dtype.name, "shape": list(array.shape)}


def _narrowed(array: np.ndarray, wire: np.dtype[Any]) -> np.ndarray:
    return array.astype(wire) if array.dtype == FLOAT32 != wire else array


def _widened(array: np.ndarray) -> np.ndarray:
    return array.astype(FLOAT32) if array.dtype == BFLOAT16 else array
