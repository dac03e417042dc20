"""`Split`: the products on the device, everything else on the trusted CPU, activations in the clear.

No confidentiality claim: whoever runs the device sees the activations of every product, from which prompt and answer
follow. It is the price of the crossing alone, beside which `masked` is to be read.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping

import jax
import numpy as np
from jax.typing import DTypeLike

from fusedllm.errors import BoundaryError
from fusedllm.kernels.linear import linear
from fusedllm.model.params import Weight
from fusedllm.model.placement import Site
from fusedllm.partition.ledger import Ledger
from fusedllm.partition.link import CLOSED, Link, Placed, Product
from fusedllm.partition.pad_supply import PadReport
from fusedllm.partition.views import DeviceProgram, Label


@functools.cache
def clear_product(*, precise: bool, implementation: str | None) -> Product:
    """What the device computes under `split`: `linear` of what was sent."""
    return functools.partial(linear, precise=precise, implementation=implementation)


class Split:
    """The boundary of the policy `split`.

    Args:
      link: to the device, which multiplies by `clear_product`.
    """

    def __init__(self, link: Link) -> None:
        self.ledger = Ledger()
        self.link = link
        self._closed = False

    def place(self, site: Site, weights: tuple[Weight, ...]) -> Placed:
        """The weights on the device."""
        return self.link.place(site, weights)

    def begin(self) -> None:
        """Nothing: there are no secrets."""

    def abandon(self) -> None:
        """Ends a pass in its midst."""
        self.link.abandon()

    def close(self) -> None:
        """Ends the link; nothing crosses any more."""
        self._closed = True
        self.link.close()

    def pads(self) -> Mapping[Hashable, PadReport]:
        """None."""
        return {}

    def programs(self, rows: int, dtype: DTypeLike) -> list[DeviceProgram]:
        """What runs on the device, which sees activations."""
        return self.link.programs(rows, dtype, Label.ACTIVATIONS)

    def cross(self, placed: Placed, x: jax.Array) -> tuple[np.ndarray, ...]:
        """Sends `x` as it is, and takes the products."""
        rows = np.asarray(x).reshape(-1, x.shape[-1])
        if self._closed:
            raise BoundaryError(CLOSED)
        with self.ledger.crossing(placed.site.name) as crossing:
            crossing.bytes_to_device = rows.nbytes
            products = self.link.exchange(placed, rows)
            crossing.bytes_to_host = sum(product.nbytes for product in products)
        return tuple(product.reshape(*x.shape[:-1], -1) for product in products)
