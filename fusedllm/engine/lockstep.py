"""`Lockstep`: what processes that launch the same programs must agree on without asking one another.

Every process is given the same requests in the same order, and plans by itself. So no plan may depend on a clock or on
chance: launches have a fixed length, requests are told apart by their count, and seeds come from one shared number.
"""

from __future__ import annotations

import itertools
import random

from fusedllm.engine.request import Sequence
from fusedllm.errors import RequestError


class Lockstep:
    """Settles requests alike in all processes that began with the same `seed` and settle the same ones."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._serial = itertools.count()

    def settle(self, sequence: Sequence) -> None:
        """Gives a request its seed, unless it has one, and its place in the queue.

        Raises:
          RequestError: it has a deadline, which is over sooner in one process than in another.
        """
        if sequence.deadline is not None:
            raise RequestError("a model that several processes share takes no deadlines: their clocks differ.")
        if sequence.sampling.seed is None:
            sequence.seed = self._random.getrandbits(64)
        sequence.order = float(next(self._serial))
