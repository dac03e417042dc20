"""`IntegerBoundary`: the products of `w8a8` on the device, as sums of integers: masked, checked, both, or neither.

The trusted side rounds activations to codes, keeps all scales, and takes back sums of integers. With pads the device
sees numbers that are uniform over the ring modulo 2^32 (`ring.py`, `pads.py`); with a verifier every product is checked
(`integrity.py`). In every combination the trusted side gets the same bits.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import jax
import numpy as np
from jax.typing import DTypeLike

from fusedllm.errors import BoundaryError, IntegrityError, PolicyError
from fusedllm.kernels.linear import integer_codes, turns
from fusedllm.kernels.ring_linear import ring_linear
from fusedllm.model.params import Weight
from fusedllm.model.placement import Site
from fusedllm.partition import ring
from fusedllm.partition.integrity import Verifier
from fusedllm.partition.ledger import Ledger
from fusedllm.partition.link import CLOSED, Link, Placed, Product
from fusedllm.partition.pad_pool import PadPool
from fusedllm.partition.pad_supply import PadReport, PoolLimits
from fusedllm.partition.pads import site_name
from fusedllm.partition.views import DeviceProgram, Label

# A prompt's chunk needs a pad for each token: what the pool has not in store is made while the prompt waits.
LIMITS = PoolLimits(exhausted="make")


@functools.cache
def integer_product(*, implementation: str | None) -> Product:
    """What the device computes under these policies: `ring_linear` of what was sent, int32 `[rows, out]`."""

    def product(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, ...]:
        return (ring_linear(x, weight, implementation=implementation),)

    return product


@dataclass(frozen=True)
class Group:
    """The weights of one site, one below another, as the device and the trusted side have them.

    Attributes:
      placed: int8 `[out, in]`, on the device.
      scales: of the outputs, float32, of the trusted side.
      ends: where each weight but the last ends among the outputs.
      bound: the largest magnitude of an honest sum.
      turned: activations are turned before they are rounded (`w8a8-h`).
    """

    placed: Placed
    scales: np.ndarray
    ends: tuple[int, ...]
    bound: int
    turned: bool = False

    @property
    def site(self) -> Site:
        """Whose weights they are."""
        return self.placed.site


class IntegerBoundary:
    """The boundary of the policies `masked`, `verify` and `masked+verify`.

    Args:
      link: to the device, which multiplies by `integer_product`.
      masked: whether pads hide what is sent.
      verified: whether products are checked.
      limits: of the pads.
    """

    def __init__(self, link: Link, *, masked: bool, verified: bool, limits: PoolLimits = LIMITS) -> None:
        self.ledger = Ledger()
        self.link = link
        self.pool: PadPool | None = None
        self.verifier: Verifier | None = None
        self._masked = masked
        self._verified = verified
        self._limits = limits
        self._weights: dict[Hashable, np.ndarray] = {}
        self._step = 0
        self._closed = False

    def place(self, site: Site, weights: tuple[Weight, ...]) -> Group:
        """Puts the codes on the device; the scales stay here.

        Raises:
          PolicyError: a weight that has no codes of `w8a8`, or some that meet turned activations and some that do not.
        """
        parts = [integer_codes(weight) for weight in weights]
        if None in parts:
            raise PolicyError(
                f"the products of {site_name(site)} are not of w8a8, which masked and verified products are; quantize "
                "the model first: fusedllm quantize SRC DST --scheme w8a8."
            )
        turned = turns(weights[0])
        if any(turns(weight) != turned for weight in weights):
            raise PolicyError(
                f"the weights of {site_name(site)} share their activations, and some want them turned and some do not: "
                "quantize all of them as w8a8, or all as w8a8-h."
            )
        codes, scales = ([np.asarray(part[kind]) for part in parts if part is not None] for kind in (0, 1))
        matrix = np.ascontiguousarray(np.concatenate(codes))
        try:
            bound = ring.range_bound(matrix)
        except ValueError as error:
            raise PolicyError(f"the products of {site_name(site)} can't be masked: {error}") from error
        self._weights[site] = matrix
        ends = tuple(itertools.accumulate(len(part) for part in codes))[:-1]
        return Group(self.link.place(site, (matrix,)), np.concatenate(scales), ends, bound, turned)

    def begin(self) -> None:
        """After all weights are placed: draws the secrets, and begins to make pads."""
        if self._masked:
            self.pool = PadPool(self._weights, self._limits)
        if self._verified:
            self.verifier = Verifier(self._weights)

    def pads(self) -> Mapping[Hashable, PadReport]:
        """What the offline phase took so far."""
        return {} if self.pool is None else self.pool.report()

    def programs(self, rows: int, dtype: DTypeLike) -> list[DeviceProgram]:
        """What runs on the device: with pads it sees numbers that tell nothing, whatever the `dtype` of activations."""
        return self.link.programs(rows, np.int32, Label.MASKED if self._masked else Label.ACTIVATIONS)

    def abandon(self) -> None:
        """Ends a pass in its midst."""
        self.link.abandon()

    def close(self) -> None:
        """Overwrites the pads that wait and the verifier's secrets, and ends the link; nothing crosses any more."""
        self._closed = True
        try:
            if self.pool is not None:
                self.pool.close()
            if self.verifier is not None:
                self.verifier.close()
        finally:
            self.link.close()

    def cross(self, group: Group, x: jax.Array) -> tuple[np.ndarray, ...]:
        """Sends codes, hidden where the policy says so, and takes sums, checked where it says so.

        Raises:
          IntegrityError: a product is not the one that was asked for. Nothing is sent again; the next pass has new
            secrets.
          BoundaryError: the session is closed.
          PadExhaustedError, PadReuseError: see `PadPool.take`.
        """
        if self._closed:
            raise BoundaryError(CLOSED)
        if self.verifier is not None and self.verifier.spent:
            self.verifier.rotate()
        rows = np.asarray(x).reshape(-1, x.shape[-1])
        if group.site.layer == 0 and group.site.name == "qkv":
            self._step += 1
        decoded, codes = self._masked_sums(group, rows) if self._masked else self._sums(group, rows)
        self._check(group, codes, decoded)
        ends = (0, *group.ends, decoded.out.shape[1])
        return tuple(
            np.ascontiguousarray(decoded.out[:, begin:end], x.dtype).reshape(*x.shape[:-1], -1)
            for begin, end in itertools.pairwise(ends)
        )

    def _masked_sums(self, group: Group, rows: np.ndarray) -> tuple[ring.Decoded, np.ndarray]:
        if self.pool is None:
            raise BoundaryError("the boundary has no pads yet: begin() comes first.")
        with self.pool.take(group.site, len(rows)) as pads:
            out = self.link.outgoing(rows.shape, np.int32)
            encoded = ring.encode(rows, pads.outgoing(), sent=out, turned=group.turned)
            received = self._exchange(group, encoded.sent)
            decoded = ring.decode(received, pads.incoming(), encoded.scales, group.scales, group.bound)
        return decoded, encoded.codes

    def _sums(self, group: Group, rows: np.ndarray) -> tuple[ring.Decoded, np.ndarray]:
        out = self.link.outgoing(rows.shape, np.int32)
        encoded = ring.encode(rows, sent=out, turned=group.turned)
        received = self._exchange(group, encoded.sent)
        return ring.decode(received, None, encoded.scales, group.scales, group.bound), encoded.codes

    def _exchange(self, group: Group, sent: np.ndarray) -> np.ndarray:
        with self.ledger.crossing(group.site.name) as crossing:
            crossing.bytes_to_device = sent.nbytes
            (received,) = self.link.exchange(group.placed, sent)
            crossing.bytes_to_host = received.nbytes
        return received

    def _check(self, group: Group, codes: np.ndarray, decoded: ring.Decoded) -> None:
        if self.verifier is None:
            if not decoded.in_range:
                raise IntegrityError(
                    f"a sum of {site_name(group.site)} is larger than it can be: the device did not compute it."
                )
            return
        self.verifier.check(group.site, self._step, codes, decoded.sums, in_range=decoded.in_range)
