"""Where one compiled program on the device and the trusted thread meet at each product, natively or through Python.

Both sides name the product that they mean by its number. The trusted side's is what counts: a program that asks for
another product than the next, or has results of another one or of another size, has broken the meeting.
"""

from __future__ import annotations

import functools
import logging
import threading
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from fusedllm.errors import BoundaryError, PolicyError
from fusedllm.kernels import native, native_rendezvous

ENDED = "the pass has ended"
OUT_OF_ORDER = "the device asked for another product than the next, or gave results of another one"
OTHER_SIZE = "the device asked for, or gave, another number of rows or columns than the product has"


class Meeting(Protocol):
    """One program at a time meets one thread at a time. Every wait of the trusted side has an end.

    Attributes:
      call: by what a program asks, in its jaxpr.
    """

    call: str

    def ask(
        self, last: int | None, results: tuple[jax.Array, ...], number: int | None, operand: jax.ShapeDtypeStruct | None
    ) -> jax.Array:
        """Traced into the program: hands over the results of the product `last`, takes the operand of `number`."""
        ...

    def begin(self) -> None:
        """A program will come; no earlier one is under way."""
        ...

    def end(self) -> None:
        """A program that waits, or comes later, fails; it reaches no array of the trusted side any more."""
        ...

    def close(self) -> None:
        """Ends, and gives back what the meeting holds. No program is under way."""
        ...

    def exchange(self, number: int, sent: np.ndarray, into: tuple[np.ndarray, ...], seconds: float) -> bool:
        """Sends what the product `number` multiplies, and waits for its results; whether they are there.

        Raises:
          BoundaryError: the program has broken the meeting.
        """
        ...

    def wait(self, seconds: float) -> bool:
        """Waits on, after an `exchange` without results; whether they are there. Raises as it does."""
        ...


class NativeMeeting:
    """Through a native call in the program: no Python, and no interpreter lock. On the CPU alone.

    Raises:
      PolicyError: there are no native kernels, or no place is left.
    """

    call = "fusedllm_ask"

    def __init__(self) -> None:
        problem = native.why_unavailable()
        if problem is not None:
            raise PolicyError(
                f"the crossing 'ffi' needs the native kernels, and {problem}; use the crossing 'driven' or 'callback'."
            )
        self._place = native_rendezvous.open_place()
        if self._place < 0:
            raise PolicyError("every place for the crossing 'ffi' is in use; close other models, or use 'driven'.")

    def ask(
        self, last: int | None, results: tuple[jax.Array, ...], number: int | None, operand: jax.ShapeDtypeStruct | None
    ) -> jax.Array:
        """See `Meeting`. The program has the place's number in it, which is the same in the next process."""
        nothing = native_rendezvous.NOTHING
        numbers = [nothing if known is None else known for known in (last, number)]
        return native_rendezvous.ask(self._place, numbers[0], results, numbers[1], operand)

    def begin(self) -> None:
        """See `Meeting`."""
        native_rendezvous.begin(self._place)

    def end(self) -> None:
        """See `Meeting`."""
        native_rendezvous.end(self._place)

    def close(self) -> None:
        """See `Meeting`."""
        place, self._place = self._place, -1
        native_rendezvous.close_place(place)

    def exchange(self, number: int, sent: np.ndarray, into: tuple[np.ndarray, ...], seconds: float) -> bool:
        """See `Meeting`."""
        return _there(native_rendezvous.exchange(self._place, number, sent, into, seconds))

    def wait(self, seconds: float) -> bool:
        """See `Meeting`."""
        return _there(native_rendezvous.wait(self._place, seconds))


def _there(outcome: int) -> bool:
    if outcome in (native_rendezvous.DONE, native_rendezvous.NOT_YET):
        return outcome == native_rendezvous.DONE
    words = {native_rendezvous.OUT_OF_ORDER: OUT_OF_ORDER, native_rendezvous.OTHER_SIZE: OTHER_SIZE}
    raise BoundaryError(f"{words.get(outcome, ENDED)}; the pass is over.")


class CallbackMeeting:
    """Through `jax.experimental.io_callback`, on every device. What runs in the callback calls no JAX."""

    call = "io_callback"

    def __init__(self) -> None:
        self._turned = threading.Condition()
        self._open = False
        self._pass = 0
        self._broken: str | None = None
        # What the trusted side has sent and the program not taken; and what it has taken and not given results of.
        self._posted: tuple[int, np.ndarray, tuple[np.ndarray, ...]] | None = None
        self._taken: tuple[int, tuple[np.ndarray, ...]] | None = None
        logging.getLogger(_JAX_LOGGER).addFilter(_is_news)

    def ask(
        self, last: int | None, results: tuple[jax.Array, ...], number: int | None, operand: jax.ShapeDtypeStruct | None
    ) -> jax.Array:
        """See `Meeting`."""
        asked = functools.partial(self._asked, last, number, operand)
        shape = jax.ShapeDtypeStruct((), jnp.int32) if operand is None else operand
        x: jax.Array = io_callback(asked, shape, *results, ordered=True)
        return x

    def _asked(
        self, last: int | None, number: int | None, operand: jax.ShapeDtypeStruct | None, *results: jax.Array
    ) -> np.ndarray | np.generic:
        with self._turned:
            self._check(self._open, ENDED)
            if last is None:
                self._check(self._taken is None, OUT_OF_ORDER)
            else:
                self._give(last, [np.asarray(result) for result in results])
            if number is None or operand is None:
                return np.int32(0)
            began = self._pass
            self._turned.wait_for(lambda: self._posted is not None or not self._open or began != self._pass)
            self._check(self._open and began == self._pass, ENDED)
            return self._take(number, operand)

    def _give(self, last: int, results: list[np.ndarray]) -> None:
        self._check(self._taken is not None and self._taken[0] == last, OUT_OF_ORDER)
        assert self._taken is not None
        into = self._taken[1]
        shapes = [(array.shape, array.dtype) for array in into]
        self._check([(array.shape, array.dtype) for array in results] == shapes, OTHER_SIZE)
        for array, result in zip(into, results, strict=True):
            np.copyto(array, result)
        self._taken = None
        self._turned.notify_all()

    def _take(self, number: int, operand: jax.ShapeDtypeStruct) -> np.ndarray:
        assert self._posted is not None
        posted, sent, into = self._posted
        self._check(posted == number, OUT_OF_ORDER)
        self._check((sent.shape, sent.dtype) == (operand.shape, operand.dtype), OTHER_SIZE)
        self._posted, self._taken = None, (number, into)
        return sent

    def _check(self, holds: bool, otherwise: str) -> None:
        """Ends the meeting where it does not hold, and the program with it."""
        if holds:
            return
        if self._open:
            self._broken = otherwise
        self._close()
        raise _EndedError(otherwise)

    def _close(self) -> None:
        self._open, self._posted, self._taken = False, None, None
        self._turned.notify_all()

    def begin(self) -> None:
        """See `Meeting`."""
        with self._turned:
            self._close()
            self._open, self._broken = True, None
            self._pass += 1

    def end(self) -> None:
        """See `Meeting`."""
        with self._turned:
            self._close()

    def close(self) -> None:
        """See `Meeting`."""
        self.end()

    def exchange(self, number: int, sent: np.ndarray, into: tuple[np.ndarray, ...], seconds: float) -> bool:
        """See `Meeting`."""
        with self._turned:
            if self._open:
                self._posted = (number, sent, into)
                self._turned.notify_all()
            return self.wait(seconds)

    def wait(self, seconds: float) -> bool:
        """See `Meeting`."""
        with self._turned:
            came = self._turned.wait_for(
                lambda: not self._open or (self._posted is None and self._taken is None), seconds
            )
            if not self._open:
                raise BoundaryError(f"{self._broken or ENDED}; the pass is over.")
            return came


_JAX_LOGGER = "jax._src.callback"


class _EndedError(Exception):
    """What a callback raises to end a program; the trusted side has its own error."""


def _is_news(record: logging.LogRecord) -> bool:
    """Not what ended a program on purpose, of which JAX would log a traceback."""
    return not (record.exc_info and isinstance(record.exc_info[1], _EndedError))
