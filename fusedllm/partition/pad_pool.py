"""`PadPool`: the pads of one session, made ahead of their use and refilled in the background.

A pad costs the product r W on the trusted side, which is as much arithmetic as what the device saves. Made beforehand
it buys latency, not throughput: `report` says what the offline phase took, next to which online times belong.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Hashable, Mapping
from typing import NoReturn

import numpy as np
from jaxtyping import Int8

from fusedllm.errors import BoundaryError, PadExhaustedError, PadReuseError
from fusedllm.partition import ring
from fusedllm.partition.forks import abandon_on_fork, forked
from fusedllm.partition.keystream import CipherName, KeyStream
from fusedllm.partition.pad_ledger import PadLedger
from fusedllm.partition.pad_supply import PadReport, PoolLimits, Supply, joined
from fusedllm.partition.pads import Pads, site_name


class PadPool:
    """The pads of one session, for the weights of its sites; any thread may take.

    Attributes:
      session: a name that no other session has.
      ledger: what became of every row.
    """

    def __init__(
        self,
        weights: Mapping[Hashable, Int8[np.ndarray, "out in"]],
        limits: PoolLimits | None = None,
        *,
        cipher: CipherName = "aes-256-ctr",
        ledger: PadLedger | None = None,
        background: bool = True,
    ) -> None:
        """`background` makes a thread that refills, until `close`; without it `wait` means `raise`.

        Raises:
          ValueError: a weight has no exact product over the ring.
        """
        self.session = os.urandom(16).hex()
        self.ledger = ledger or PadLedger()
        self.limits = limits or PoolLimits()
        self._stream = KeyStream(cipher)
        self._process = os.getpid()
        self._changed = threading.Condition()
        self._closed = False
        self._failure: BaseException | None = None
        for weight in weights.values():
            ring.check_weight(weight)
        self._supplies = {
            site: Supply(np.ascontiguousarray(weight), site_name(site)) for site, weight in weights.items()
        }
        self._thread: threading.Thread | None = None
        abandon_on_fork(self)
        if background:
            self._thread = threading.Thread(target=self._refill, name="fusedllm-pads", daemon=True)
            self._thread.start()

    def take(self, site: Hashable, rows: int) -> Pads:
        """`rows` rows that nobody had before or will have again. They are burned when this returns, used or not.

        Raises:
          PadExhaustedError: there are too few, and none came in time.
          PadReuseError: this process was forked from the one that has the session.
          BoundaryError: the session has no such site, or is closed.
        """
        supply = self._supply(site)
        if rows < 1:
            raise ValueError(f"pads are taken for one row or more, got {rows}.")
        deadline = time.monotonic() + self.limits.seconds
        while True:
            with self._changed:
                while supply.waiting < rows and self.limits.exhausted != "make":
                    self._wait(supply, rows, deadline)
                self._refuse_closed()
                if supply.waiting >= rows:
                    # What fails from here on loses rows, and brings none back.
                    pieces = supply.pop(rows)
                    self.ledger.burn(self.session, supply.name, pieces[0].first, rows)
                    if not supply.filling and supply.waiting < self.limits.low_water:
                        supply.filling = True
                        self._changed.notify_all()
                    break
                missing = min(rows - supply.waiting, self.limits.batch)
            self._make(supply, missing)
        r, product = joined(pieces)
        return Pads(self.session, supply.name, pieces[0].first, self.ledger, r, product)

    def fill(self) -> None:
        """The offline phase at once: makes what is missing of every site, in the caller's thread."""
        for site in self._supplies:
            supply = self._supply(site)
            while True:
                with self._changed:
                    self._refuse_closed()
                    missing = min(self.limits.capacity - supply.waiting, self.limits.batch)
                    if missing <= 0:
                        supply.filling = False
                        break
                self._make(supply, missing)

    def report(self) -> dict[Hashable, PadReport]:
        """What the offline phase took, by site."""
        with self._changed:
            return {site: supply.report() for site, supply in self._supplies.items()}

    def close(self) -> None:
        """Ends the session: overwrites all pads that wait, and nothing can be taken any more."""
        with self._changed:
            self._closed = True
            for supply in self._supplies.values():
                supply.clear()
            self._changed.notify_all()
        if self._thread is not None and self._process == os.getpid():
            self._thread.join()

    def __enter__(self) -> PadPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise PadReuseError("a pool of pads can't be copied, pickled or put into a checkpoint: each pad is used once.")

    def _supply(self, site: Hashable) -> Supply:
        if os.getpid() != self._process:
            raise PadReuseError(forked("a pool of pads", self._process))
        if site not in self._supplies:
            raise BoundaryError(f"this session has no pads for {site_name(site)}.")
        return self._supplies[site]

    def _refuse_closed(self) -> None:
        if self._failure is not None:
            raise BoundaryError("the pads of this session can't be refilled; open another.") from self._failure
        if self._closed:
            raise BoundaryError("this session is closed, and its pads are overwritten.")

    def _wait(self, supply: Supply, rows: int, deadline: float) -> None:
        """Waits for more rows, asking for them; raises where they won't come."""
        self._refuse_closed()
        limits = self.limits
        asked = f"{rows} rows of pads are needed for {supply.name}, and {supply.waiting} wait"
        if rows > limits.capacity:
            raise PadExhaustedError(f"{asked}, of {limits.capacity} at most; open the session with a larger capacity.")
        if limits.exhausted == "raise" or self._thread is None:
            raise PadExhaustedError(f"{asked}; fill the pool, or let the session wait for them.")
        left = deadline - time.monotonic()
        if left <= 0:
            raise PadExhaustedError(
                f"{asked} after {limits.seconds:g} seconds; open the session with a larger capacity, or wait longer."
            )
        supply.filling = True
        self._changed.notify_all()
        self._changed.wait(left)

    def _make(self, supply: Supply, rows: int) -> None:
        """Draws rows and multiplies them, without the lock, and puts them into the pool."""
        started = time.perf_counter()
        r = self._stream.numbers((rows, supply.weight.shape[1]))
        drawn = time.perf_counter()
        product = ring.product(r, supply.weight)
        ended = time.perf_counter()
        with self._changed:
            supply.put(r, product)
            supply.draw_seconds += drawn - started
            supply.product_seconds += ended - drawn
            if self._closed:
                supply.clear()
            self._changed.notify_all()

    def _refill(self) -> None:
        try:
            while True:
                with self._changed:
                    while not self._closed and (supply := self._neediest()) is None:
                        self._changed.wait()
                    if self._closed or supply is None:
                        return
                    missing = min(self.limits.capacity - supply.waiting, self.limits.batch)
                self._make(supply, missing)
        except BaseException as error:
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _neediest(self) -> Supply | None:
        for supply in self._supplies.values():
            supply.filling = supply.filling and supply.waiting < self.limits.capacity
        wanting = [supply for supply in self._supplies.values() if supply.filling]
        return min(wanting, key=lambda supply: supply.waiting, default=None)

    def abandon(self) -> None:
        """Lets go of all pads without overwriting what is shared with the parent: this is a forked process."""
        # The thread is the parent's, and so may be whoever held the lock.
        self._changed, self._thread, self._closed = threading.Condition(), None, True
        for supply in self._supplies.values():
            supply.segments, supply.waiting = deque(), 0
