"""`PadLedger`: what became of every row of every pad, and the proof that none was used twice."""

from __future__ import annotations

import threading
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from fusedllm.errors import PadReuseError
from fusedllm.partition.forks import abandon_on_fork


class PadEvent(NamedTuple):
    """What happened to rows `first` to `first + rows - 1`: burned, sent, or wiped."""

    kind: Literal["burned", "sent", "wiped"]
    session: str
    site: str
    first: int
    rows: int


@dataclass(slots=True)
class _Account:
    """Rows of one session and site: ranges that are burned, in order and merged, and those in somebody's hands."""

    burned: list[tuple[int, int]] = field(default_factory=list)
    held: dict[tuple[int, int], bool] = field(default_factory=dict)  # range -> whether it was sent
    rows_burned: int = 0
    rows_sent: int = 0
    rows_wiped: int = 0


class PadLedger:
    """Which rows of pads were burned, sent and wiped; refuses what would be a second use. Any thread may write.

    Attributes:
      events: every entry in order, where they are kept: for tests, as it grows without bound.
    """

    def __init__(self, *, keep_events: bool = False) -> None:
        self.events: list[PadEvent] | None = [] if keep_events else None
        self._accounts: dict[tuple[str, str], _Account] = {}
        self._lock = threading.Lock()
        abandon_on_fork(self)

    def burn(self, session: str, site: str, first: int, rows: int) -> None:
        """Rows leave the pool: nobody will get them again.

        Raises:
          PadReuseError: one of them has been burned before.
        """
        with self._lock:
            account = self._accounts.setdefault((session, site), _Account())
            place = bisect_right(account.burned, (first, first))
            before = account.burned[place - 1] if place else (0, 0)
            after = account.burned[place] if place < len(account.burned) else (first + rows, first + rows)
            if rows < 1 or before[1] > first or after[0] < first + rows:
                raise PadReuseError(f"rows {first} to {first + rows - 1} of the pads of {site} were burned before.")
            start, end = first, first + rows
            low, high = place, place
            if place and before[1] == first:
                low, start = place - 1, before[0]
            if place < len(account.burned) and after[0] == end:
                high, end = place + 1, after[1]
            account.burned[low:high] = [(start, end)]
            account.held[first, rows] = False
            account.rows_burned += rows
            self._note("burned", session, site, first, rows)

    def send(self, session: str, site: str, first: int, rows: int) -> None:
        """Rows hide a message that is about to leave.

        Raises:
          PadReuseError: they hid another, were wiped, or nobody burned them.
        """
        with self._lock:
            account = self._accounts.get((session, site), _Account())
            if account.held.get((first, rows)) is not False:
                raise PadReuseError(f"rows {first} to {first + rows - 1} of the pads of {site} can't hide a message.")
            account.held[first, rows] = True
            account.rows_sent += rows
            self._note("sent", session, site, first, rows)

    def wipe(self, session: str, site: str, first: int, rows: int) -> None:
        """Rows are overwritten, sent or not; a second time changes nothing."""
        with self._lock:
            account = self._accounts.get((session, site), _Account())
            if account.held.pop((first, rows), None) is not None:
                account.rows_wiped += rows
                self._note("wiped", session, site, first, rows)

    def counts(self, session: str, site: str) -> tuple[int, int, int]:
        """Rows that were burned, sent and wiped so far; `site` in words, as `site_name` has it."""
        with self._lock:
            account = self._accounts.get((session, site), _Account())
            return account.rows_burned, account.rows_sent, account.rows_wiped

    def abandon(self) -> None:
        """Keeps the accounts: this is a forked process."""
        self._lock = threading.Lock()

    def _note(self, kind: Literal["burned", "sent", "wiped"], session: str, site: str, first: int, rows: int) -> None:
        if self.events is not None:
            self.events.append(PadEvent(kind, session, site, first, rows))
