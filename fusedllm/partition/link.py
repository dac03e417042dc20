"""`Link`: the way to the device and back. Nothing else of a policy touches the device.

What a policy does to numbers before they leave, and to those that come back, is its `Boundary`'s; how they travel is
the link's. `Driven` is the form in which the host launches one compiled product after another; in `in_program.py` one
compiled program asks the host for what it multiplies next.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np
from jax.typing import DTypeLike

from fusedllm.kernels.choose import traced_for
from fusedllm.model.placement import Site
from fusedllm.partition.pads import site_name
from fusedllm.partition.views import DeviceProgram, Label
from fusedllm.weights.arena import Arena, aligned_empty

CLOSED = "this session is closed, and nothing crosses any more; load the model again."

# The operands of a product on the device, and its results: arrays `[rows, out]`.
Product = Callable[..., tuple[jax.Array, ...]]


@dataclass(frozen=True, slots=True)
class Placed:
    """The weights of a site as the device has them.

    Attributes:
      site: whose.
      weights: the operands of the product beside what is sent: arrays, or pytrees of them.
    """

    site: Site
    weights: tuple[Any, ...]


class Link(Protocol):
    """Sends numbers to a device that multiplies them. All calls are of one thread at a time."""

    def place(self, site: Site, weights: tuple[Any, ...]) -> Placed:
        """Puts the weights of a site on the device. A model's sites are placed before the first exchange."""
        ...

    def outgoing(self, shape: tuple[int, int], dtype: DTypeLike) -> np.ndarray:
        """Memory for what is sent next, from which it leaves without another copy; the same for every exchange."""
        ...

    def exchange(self, placed: Placed, sent: np.ndarray) -> tuple[np.ndarray, ...]:
        """What the product of `sent` with the weights of a site is on the device: all that leaves, all that comes back.

        Args:
          sent: `[rows, in]`; not written to until the exchange is over. Those of `outgoing` travel best.
        """
        ...

    def abandon(self) -> None:
        """Ends a pass that the trusted side has left in its midst; nothing where there is none."""
        ...

    def close(self) -> None:
        """Ends what is under way on the device."""
        ...

    def programs(self, rows: int, dtype: DTypeLike, label: Label) -> list[DeviceProgram]:
        """What runs on the device where `rows` rows of `dtype`, which are what `label` says, are sent to each site."""
        ...


class Outbox:
    """Memory for what is sent, used again and again: new memory of megabytes costs as much as to copy them."""

    def __init__(self) -> None:
        self._memory = aligned_empty((0,), np.dtype(np.uint8))

    def take(self, shape: tuple[int, int], dtype: DTypeLike) -> np.ndarray:
        """An array of what was there before, on a boundary of 64 bytes; the next one lies in the same memory."""
        size = shape[0] * shape[1] * np.dtype(dtype).itemsize
        if self._memory.nbytes < size:
            self._memory = aligned_empty((size,), np.dtype(np.uint8))
        return self._memory[:size].view(dtype).reshape(shape)


def for_device(device: jax.Device, product: Product) -> Product:
    """`product` with the implementations that its device has, whatever the default backend is."""

    def traced(*operands: Any) -> tuple[jax.Array, ...]:
        with traced_for(device.platform):
            return product(*operands)

    return traced


class Room:
    """Where the weights lie on a device; on one that the CPU plays, in memory as good as that of a loaded model."""

    def __init__(self, device: jax.Device) -> None:
        self._device = device
        self._arena = Arena()

    def put(self, weights: tuple[Any, ...]) -> tuple[Any, ...]:
        """The weights on the device."""
        put = self._arena.put if self._device.platform == "cpu" else jax.device_put
        placed: tuple[Any, ...] = jax.tree.map(lambda leaf: put(leaf, self._device), weights)
        return placed


@functools.lru_cache(maxsize=64)
def _launcher(device: jax.Device, product: Product) -> Any:
    """The compiled product, for all models: weights are its operands.

    Where an operand is said to be is where it goes: NumPy's array straight to the device, in one copy at most.
    """
    return jax.jit(for_device(device, product), in_shardings=jax.sharding.SingleDeviceSharding(device))


class Driven:
    """The host launches a compiled product for each exchange.

    Args:
      device: that multiplies.
      product: `(sent, *weights) -> products`, traceable.
    """

    def __init__(self, device: jax.Device, product: Product) -> None:
        self.device = device
        self._outbox = Outbox()
        self._room = Room(device)
        self.launch = _launcher(device, product)
        self._is_cpu = device.platform == "cpu"
        self._sites: list[Placed] = []

    def place(self, site: Site, weights: tuple[Any, ...]) -> Placed:
        """Puts the weights of a site on the device."""
        placed = Placed(site, self._room.put(weights))
        self._sites.append(placed)
        return placed

    def outgoing(self, shape: tuple[int, int], dtype: DTypeLike) -> np.ndarray:
        """See `Link`. On the CPU the program reads it where it lies."""
        return self._outbox.take(shape, dtype)

    def exchange(self, placed: Placed, sent: np.ndarray) -> tuple[np.ndarray, ...]:
        """Launches the product, and waits for it."""
        with jax.transfer_guard_host_to_device("allow"):
            products = self.launch(sent, *placed.weights)
        if self._is_cpu:
            # Where they lie; nothing is transferred that a guard could see.
            return tuple(map(np.asarray, products))
        with jax.transfer_guard_device_to_host("allow"):
            return tuple(map(np.asarray, products))

    def abandon(self) -> None:
        """Nothing, as for `close`."""

    def close(self) -> None:
        """Nothing: between two exchanges nothing is under way."""

    def programs(self, rows: int, dtype: DTypeLike, label: Label) -> list[DeviceProgram]:
        """A program for each site."""
        return [
            DeviceProgram(
                f"the product of {site_name(placed.site)}",
                self.launch,
                (jax.ShapeDtypeStruct((rows, placed.weights[0].shape[1]), dtype), *placed.weights),
                (label, *[Label.WEIGHTS] * len(placed.weights)),
                self.device,
            )
            for placed in self._sites
        ]
