"""What a forked process must let go of: secrets that are used once, of which it has got a copy."""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Abandons(Protocol):
    """What holds such secrets."""

    def abandon(self) -> None:
        """Lets go of them; in a forked process, where nobody may ever give back a lock that was held."""
        ...


_watched: weakref.WeakSet[Abandons] = weakref.WeakSet()


def abandon_on_fork(holder: Abandons) -> None:
    """Has `holder.abandon()` called in every process that is forked from this one."""
    _watched.add(holder)


def forked(what: str, process: int) -> str:
    """The sentence for who uses `what` of `process` in a process that was forked from it."""
    return (
        f"{what} belongs to the process {process}, and this one was forked from it; both would use the same pads, so "
        "open a session in this process."
    )


def _abandon_all() -> None:
    for holder in list(_watched):
        holder.abandon()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_abandon_all)
