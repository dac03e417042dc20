"""`InProgram`: one compiled program runs the products of a pass, and asks the host for what it multiplies next.

A pass of a model with L layers is three launches, where `Driven` makes 4 L + 1. They are cut where the number of rows
may change: the *stack*, all products up to the last layer's first; the *tail*, what is left of the last layer (of a
prompt only the last token gets there); and the *head*, which is also asked for alone. Each is compiled once for each
number of rows.

    program = x = ask(first);  results = product(x, ...);  x = ask(next, results);  ...  tell(results)

What is asked for, and whether a pass goes on, is known by the trusted side alone: a request is compared with what it
expects, and nothing that the device says changes that (`meeting.py`). The program is launched by a thread of the link,
for on the CPU it may hold that thread until it ends. Nothing that the trusted side has left in its midst goes on
waiting: `Hosted` abandons the pass where it fails.
"""

from __future__ import annotations

import atexit
import contextlib
import queue
import threading
import time
import weakref
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from fusedllm.errors import BoundaryError, PolicyError
from fusedllm.model.placement import Site
from fusedllm.partition.link import Outbox, Placed, Product, Room, for_device
from fusedllm.partition.meeting import CallbackMeeting, Meeting, NativeMeeting
from fusedllm.partition.pads import site_name
from fusedllm.partition.views import Asked, DeviceProgram, Label
from fusedllm.weights.arena import aligned_empty

# The ways in which a program can ask.
VIAS = ("callback", "ffi")

# A device that has not answered for so long will not: no product of a chunk takes as long on any machine.
ANSWER_SECONDS = 120.0

# Between two looks at whether the program is still there, and whether the user has interrupted.
LOOK_SECONDS = 0.1

# For a program that was told that its pass is over, when the process ends or the model is closed.
END_SECONDS = 5.0

# What the thread of a link is to do; `None` ends it.
Tasks = queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None]


class InProgram:
    """A link to a device that runs one program for many exchanges.

    Sites are placed in the order in which a pass exchanges them. Their weights are matrices `[out, in]`.

    Args:
      device: that multiplies.
      product: `(sent, *weights) -> products`, traceable.
      via: `callback` for `io_callback`, on every device; `ffi` for a native call, on the CPU.
      answer_seconds: after which a device that does not answer has failed.

    Raises:
      PolicyError: `via` is unknown, or does not run on this device.
    """

    def __init__(
        self, device: jax.Device, product: Product, *, via: str, answer_seconds: float = ANSWER_SECONDS
    ) -> None:
        if via not in VIAS:
            raise PolicyError(f"a program can't ask the host by {via!r}; known are {', '.join(VIAS)}.")
        if via == "ffi" and device.platform != "cpu":
            raise PolicyError(
                f"the crossing 'ffi' meets the program in this process's memory, and {device} is no CPU; use the "
                "crossing 'driven' or 'callback'."
            )
        self.device = device
        self.product = for_device(device, product)
        self._answer_seconds = answer_seconds
        self._outbox = Outbox()
        self._room = Room(device)
        self._meeting: Meeting = NativeMeeting() if via == "ffi" else CallbackMeeting()
        self._placed: list[Placed] = []
        self._numbers: dict[Site, int] = {}
        self._programs: dict[int, tuple[int, ...]] = {}
        self._compiled: dict[Hashable, Any] = {}
        self._results: dict[Hashable, tuple[jax.ShapeDtypeStruct, ...]] = {}
        # Of the pass: the products that are still to come, how many rows they have and of what, and the program.
        self._left: tuple[int, ...] = ()
        self._rows: tuple[int, np.dtype[Any]] = (0, np.dtype(np.int32))
        self._running: Future[Any] | None = None
        # Arrays that the program may reach, whatever becomes of the exchange.
        self._held: tuple[np.ndarray, ...] = ()
        self._failed = False
        self._start_thread()
        _links.add(self)

    def place(self, site: Site, weights: tuple[Any, ...]) -> Placed:
        """Puts the weights of a site on the device."""
        placed = Placed(site, self._room.put(weights))
        self._numbers[site] = len(self._placed)
        self._placed.append(placed)
        self._programs = {}
        return placed

    def outgoing(self, shape: tuple[int, int], dtype: DTypeLike) -> np.ndarray:
        """See `Link`."""
        return self._outbox.take(shape, dtype)

    def exchange(self, placed: Placed, sent: np.ndarray) -> tuple[np.ndarray, ...]:
        """Gives the program what it waits for, and waits for the products; launches it where a pass begins.

        Raises:
          BoundaryError: it is not the turn of this site or of this many rows, the device asks for something else, it
            does not answer, or the link is closed. The pass is over, and the next one may begin.
        """
        number = self._numbers[placed.site]
        sent = np.ascontiguousarray(sent)
        rows = (len(sent), sent.dtype)
        if number in self._cut():
            self._begin(number, rows)
        if self._left[:1] != (number,) or rows != self._rows:
            expected = (
                f"{site_name(self._placed[self._left[0]].site)} of {self._rows[0]} rows" if self._left else "a pass"
            )
            self._end()
            raise BoundaryError(
                f"the products of {site_name(placed.site)} with {rows[0]} rows are not what comes next, which is "
                f"{expected}."
            )
        into = tuple(aligned_empty(made.shape, made.dtype) for made in self._shapes(number, rows))
        self._held = (sent, *into)
        try:
            self._wait(number, sent, into)
        except BaseException:
            self._end()
            raise
        self._left, self._held = self._left[1:], ()
        return into

    def abandon(self) -> None:
        """See `Link`: the program that waits is told to end."""
        self._end()

    def close(self) -> None:
        """Ends the program that waits, and the thread of the link. Nothing can be exchanged any more."""
        self._end()
        if self._closed.alive:
            with contextlib.suppress(BoundaryError):
                self._finish(END_SECONDS)
            # Not by calling it, which does nothing when the process ends.
            self._closed.detach()
            _close(self._meeting, self._tasks)
            self._thread.join(END_SECONDS)

    def _cut(self) -> dict[int, tuple[int, ...]]:
        """The programs: their products, by the first one's number."""
        if not self._programs:
            layers = [placed.site.layer for placed in self._placed if placed.site.layer is not None]
            stack = [number for number, placed in enumerate(self._placed) if placed.site.layer is not None]
            rest = [number for number in stack if self._placed[number].site.layer == max(layers, default=None)][1:]
            parts = [[n for n in stack if n not in rest], rest]
            parts += [[number] for number, placed in enumerate(self._placed) if placed.site.layer is None]
            self._programs = {part[0]: tuple(part) for part in parts if part}
        return self._programs

    def _begin(self, first: int, rows: tuple[int, np.dtype[Any]]) -> None:
        """Launches a program; ends the one before, if the trusted side has left it waiting."""
        if not self._closed.alive:
            raise BoundaryError("the link to the device is closed; load the model again.")
        self._end()
        if self._failed:
            # It was told to end; it must have, or its requests would be taken for the next one's.
            self._finish(self._answer_seconds)
            # Where a program of a thread has failed, JAX lets no other ordered callback run in it.
            self._closed.detach()
            self._tasks.put(None)
            self._start_thread()
            self._failed = False
        program = self._compiled.get((first, rows))
        if program is None:
            program = self._compiled[first, rows] = self._run(lambda: self._compile(first, rows)).result()
        numbers = self._programs[first]
        weights = [self._placed[number].weights for number in numbers]
        # A GPU takes its programs one after the other by itself.
        turn = _turn if self.device.platform == "cpu" else contextlib.nullcontext()

        def launch() -> None:
            with turn:
                jax.block_until_ready(program(weights))

        self._meeting.begin()
        # Before the program can wait for it: what is interrupted here is ended as any pass is.
        self._left, self._rows = numbers, rows
        self._running = self._run(launch)

    def programs(self, rows: int, dtype: DTypeLike, label: Label) -> list[DeviceProgram]:
        """See `Link`: three programs, which take weights as operands and ask for the rest."""
        return [
            DeviceProgram(
                f"the products from {site_name(self._placed[first].site)} on",
                self._jitted(first, (rows, np.dtype(dtype))),
                ([self._placed[number].weights for number in numbers],),
                (Label.WEIGHTS,),
                self.device,
                # Once for each product, and once to hand over the last.
                asked=(Asked(self._meeting.call, label, len(numbers) + 1),),
            )
            for first, numbers in self._cut().items()
        ]

    def _compile(self, first: int, rows: tuple[int, np.dtype[Any]]) -> Any:
        weights = [self._placed[number].weights for number in self._programs[first]]
        return self._jitted(first, rows).lower(weights).compile()

    def _jitted(self, first: int, rows: tuple[int, np.dtype[Any]]) -> Any:
        numbers = self._programs[first]

        def program(weights: list[tuple[Any, ...]]) -> jax.Array:
            last: int | None = None
            results: tuple[jax.Array, ...] = ()
            for number, operands in zip(numbers, weights, strict=True):
                x = self._meeting.ask(last, results, number, self._operand(number, rows))
                last, results = number, self.product(x, *operands)
            return self._meeting.ask(last, results, None, None)

        there = jax.sharding.SingleDeviceSharding(self.device)
        return jax.jit(program, in_shardings=there, out_shardings=there)

    def _operand(self, number: int, rows: tuple[int, np.dtype[Any]]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows[0], self._placed[number].weights[0].shape[1]), rows[1])

    def _shapes(self, number: int, rows: tuple[int, np.dtype[Any]]) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Of the results of a product."""
        known = self._results.get((number, rows))
        if known is None:
            operands = (self._operand(number, rows), *self._placed[number].weights)
            known = self._results[number, rows] = jax.eval_shape(self.product, *operands)
        return known

    def _start_thread(self) -> None:
        """Of this link; it holds nothing of it, so that the link may go away."""
        self._tasks: Tasks = queue.SimpleQueue()
        self._thread = threading.Thread(target=_work, args=(self._tasks,), name="fusedllm-device", daemon=True)
        self._thread.start()
        self._closed = weakref.finalize(self, _close, self._meeting, self._tasks)
        # `_close_all` does it, which also waits.
        self._closed.atexit = False
        _threads.add(self._thread)

    def _run(self, function: Callable[[], Any]) -> Future[Any]:
        """`function` in the thread of the link."""
        future: Future[Any] = Future()
        self._tasks.put((function, future))
        return future

    def _wait(self, number: int, sent: np.ndarray, into: tuple[np.ndarray, ...]) -> None:
        running = self._running
        until = time.monotonic() + self._answer_seconds
        there = self._meeting.exchange(number, sent, into, min(LOOK_SECONDS, self._answer_seconds))
        while not there:
            if running is not None and running.done() and not self._meeting.wait(0.0):
                raise BoundaryError(f"the device's program ended before its time: {running.exception()}.")
            if time.monotonic() > until:
                raise BoundaryError(
                    f"the device did not answer for {self._answer_seconds:g} seconds, at "
                    f"{site_name(self._placed[number].site)}; the pass is over."
                )
            there = self._meeting.wait(LOOK_SECONDS)

    def _end(self) -> None:
        """Ends a pass in its midst; nothing where it had come to its end."""
        if self._left:
            self._failed = True
            # First, so that one that is interrupted is made up for; from then on no program reaches these arrays.
            self._meeting.end()
            self._left, self._held = (), ()

    def _finish(self, seconds: float) -> None:
        """Waits for the program that has ended, or was told to."""
        running = self._running
        if running is None:
            return
        try:
            running.exception(seconds)
        except FutureTimeoutError:
            raise BoundaryError(
                f"the device has not ended its last program for {seconds:g} seconds; nothing more is sent to it."
            ) from None
        self._running = None


def _work(tasks: Tasks) -> None:
    while (task := tasks.get()) is not None:
        function, future = task
        try:
            result = function()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)
            del result
        del task, function, future


def _close(meeting: Meeting, tasks: Tasks) -> None:
    """Of a link that is closed, or that nobody has any more; what its program may still use is given back after it."""
    meeting.end()
    tasks.put((meeting.close, Future()))
    tasks.put(None)


# Only one program waits at a time. XLA's CPU has a thread for each of its devices, two where one plays the accelerator,
# and may run a program in one of them, however it was launched: if two programs waited, of two models, no thread would
# be left for the segments that they wait for.
_turn = threading.Lock()

_links: weakref.WeakSet[InProgram] = weakref.WeakSet()
_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Before JAX waits for what runs on its devices, whose own function at exit was registered earlier.

    The threads of links that nobody has any more are waited for, too: one that is inside of XLA when the interpreter
    goes away aborts the process.
    """
    for link in list(_links):
        link.abandon()
    for link in list(_links):
        link.close()
    for thread in list(_threads):
        thread.join(END_SECONDS)
