"""`Split`: the products on the device, everything else on the trusted CPU, activations in the clear.

No confidentiality claim: whoever runs the device sees the activations of every product, from which prompt and answer
follow. It is the price of the crossing alone, beside which `masked` is to be read.
"""

from __future__ import annotations

import functools

import jax

from fusedllm.kernels.linear import linear
from fusedllm.model.params import Weight
from fusedllm.model.placement import Site
from fusedllm.partition.ledger import Ledger


class Split:
    """The boundary of the policy `split`.

    Args:
      device: where the products run.
      trusted: where everything else does.
      precise: as in `linear`.
      implementation: of the products.
    """

    def __init__(
        self, device: jax.Device, trusted: jax.Device, *, precise: bool = True, implementation: str | None = None
    ) -> None:
        self.ledger = Ledger()
        self._device = device
        self._trusted = trusted
        self._product = jax.jit(functools.partial(linear, precise=precise, implementation=implementation))

    def place(self, site: Site, weights: tuple[Weight, ...]) -> tuple[Weight, ...]:
        """The weights on the device."""
        placed: tuple[Weight, ...] = jax.device_put(weights, self._device)
        return placed

    def begin(self) -> None:
        """Nothing: there are no secrets."""

    def cross(self, site: Site, x: jax.Array, placed: tuple[Weight, ...]) -> tuple[jax.Array, ...]:
        """Sends `x` as it is, and takes the products."""
        with self.ledger.crossing(site.name) as crossing:
            there = jax.device_put(x, self._device)
            back = jax.block_until_ready(jax.device_put(self._product(there, *placed), self._trusted))
            crossing.bytes_to_device = x.nbytes
            crossing.bytes_to_host = sum(product.nbytes for product in back)
        result: tuple[jax.Array, ...] = back
        return result
