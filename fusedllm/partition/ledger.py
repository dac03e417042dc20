"""`Ledger`: every crossing of the boundary, by site: how often, how many bytes each way, how long."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace


@dataclass(slots=True)
class Crossings:
    """What crossed at one site since the start, or in one block of `Ledger.during`.

    A crossing is one send with what comes back for it. `seconds` are from the send until the answer is there, the
    device's arithmetic included, and what the trusted side does before and after not.
    """

    count: int = 0
    bytes_to_device: int = 0
    bytes_to_host: int = 0
    seconds: float = 0.0

    def add(self, other: Crossings) -> None:
        """Counts what `other` has as well."""
        self.count += other.count
        self.bytes_to_device += other.bytes_to_device
        self.bytes_to_host += other.bytes_to_host
        self.seconds += other.seconds


@dataclass(slots=True)
class Crossing:
    """One crossing while it is under way; the bytes are filled in by who makes it."""

    bytes_to_device: int = 0
    bytes_to_host: int = 0


@dataclass(slots=True)
class Ledger:
    """Counts of one policy. Safe for several threads."""

    sites: dict[str, Crossings] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def crossing(self, site: str) -> Iterator[Crossing]:
        """Inside, something crosses at `site`; it counts even if it fails, as its bytes may have left."""
        made = Crossing()
        began = time.perf_counter()
        try:
            yield made
        finally:
            one = Crossings(1, made.bytes_to_device, made.bytes_to_host, time.perf_counter() - began)
            with self._lock:
                self.sites.setdefault(site, Crossings()).add(one)

    def by_site(self) -> dict[str, Crossings]:
        """A copy of what crossed at each site."""
        with self._lock:
            return {name: replace(found) for name, found in self.sites.items()}

    def total(self) -> Crossings:
        """All sites together."""
        total = Crossings()
        with self._lock:
            for crossings in self.sites.values():
                total.add(crossings)
        return total

    def table(self) -> str:
        """A line for each site and one for all, for people."""
        header = f"{'site':<12} {'crossings':>10} {'MB to device':>13} {'MB to host':>11} {'ms each':>8}"
        with self._lock:
            rows = sorted(self.sites.items())
        return "\n".join([header, *(_row(name, one) for name, one in rows), _row("all", self.total())])


def _row(name: str, one: Crossings) -> str:
    each = 1e3 * one.seconds / one.count if one.count else 0.0
    megabytes = (one.bytes_to_device / 1e6, one.bytes_to_host / 1e6)
    return f"{name:<12} {one.count:>10,} {megabytes[0]:>13.3f} {megabytes[1]:>11.3f} {each:>8.3f}"
