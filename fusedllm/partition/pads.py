"""Pads: numbers uniform over the ring modulo 2^32 that hide one message each, and the ledger that proves it.

A pad that hid two messages would tell their difference. So a row of a pad has a number of its own, is burned in the
ledger before anybody gets it, and can neither be copied, pickled nor taken along into a forked process. What memory
holds of a pad is overwritten after its use, as far as Python allows: temporary copies that NumPy makes are not.

All of this ends where a whole machine is copied: a snapshot of a virtual machine that runs twice uses its pads twice.
"""

from __future__ import annotations

import os
from collections.abc import Hashable
from typing import NoReturn

import numpy as np
from jaxtyping import Int32

from fusedllm.errors import PadReuseError
from fusedllm.partition.forks import abandon_on_fork, forked
from fusedllm.partition.pad_ledger import PadLedger


class Pads:
    """Rows of r and r W that one message is hidden with: each is given out once, and both are wiped after use."""

    def __init__(
        self, session: str, site: str, first: int, ledger: PadLedger, r: np.ndarray, product: np.ndarray
    ) -> None:
        self.session, self.site, self.first, self.rows = session, site, first, len(r)
        self._ledger, self._process = ledger, os.getpid()
        self._r, self._product = r, product
        self._stage = 0
        abandon_on_fork(self)

    def outgoing(self) -> Int32[np.ndarray, "rows in"]:
        """r, which is added to what is sent. Its memory is overwritten by `wipe`.

        Raises:
          PadReuseError: a second time, or in a forked process.
        """
        self._advance(0)
        self._ledger.send(self.session, self.site, self.first, self.rows)
        return self._r

    def incoming(self) -> Int32[np.ndarray, "rows out"]:
        """r W, which is subtracted from what comes back; once, and after `outgoing`.

        Raises:
          PadReuseError: a second time, before anything was sent, or in a forked process.
        """
        self._advance(1)
        return self._product

    def wipe(self) -> None:
        """Overwrites both; sent or not, they can't be used any more."""
        self._stage = 2
        if os.getpid() == self._process:
            self._r.fill(0)
            self._product.fill(0)
            self._ledger.wipe(self.session, self.site, self.first, self.rows)

    def __enter__(self) -> Pads:
        return self

    def __exit__(self, *exception: object) -> None:
        self.wipe()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise PadReuseError(
            f"pads of {self.site} can't be copied, pickled or put into a checkpoint: each is used once."
        )

    def _advance(self, stage: int) -> None:
        if os.getpid() != self._process:
            raise PadReuseError(forked(f"the pads of {self.site}", self._process))
        if self._stage != stage:
            raise PadReuseError(
                f"rows {self.first} to {self.first + self.rows - 1} of the pads of {self.site} are used."
            )
        self._stage += 1

    def abandon(self) -> None:
        """Lets go of both without overwriting what is shared with the parent: this is a forked process."""
        self._stage = 2
        self._r = self._product = np.zeros((0, 0), np.int32)


def site_name(site: Hashable) -> str:
    """A site in words: `qkv of layer 3` for `Site("qkv", 3)`."""
    if isinstance(site, tuple) and len(site) == 2:
        return str(site[0]) if site[1] is None else f"{site[0]} of layer {site[1]}"
    return str(site)
