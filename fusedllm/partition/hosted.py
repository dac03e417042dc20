"""`Hosted`: the host drives compiled segments, the trusted ones on the CPU, the products on an untrusted device.

The layer's code is the same as everywhere. Here nobody compiles it as a whole: its verbs are called with arrays, each
runs a segment that was compiled once, and what goes to the device goes through the policy's `Boundary` alone: around
everything else stands JAX's transfer guard.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import jax
import numpy as np
from jax.typing import DTypeLike

from fusedllm.kernels.choose import traced_for
from fusedllm.model.composed import Composed
from fusedllm.model.params import LayerParams, Params, Weight
from fusedllm.model.placement import Site
from fusedllm.partition.ledger import Ledger
from fusedllm.partition.pad_supply import PadReport
from fusedllm.partition.views import DeviceProgram

Result = TypeVar("Result")
Carry = TypeVar("Carry")

# The matrices of a layer, by the site that multiplies with them: what the device holds. All else stays with the trusted
# side.
PRODUCTS = {"qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}

# Operands that a segment gives up, so that they are updated where they are.
GIVEN_UP = frozenset({"pages", "counts", "outputs"})


class Boundary(Protocol):
    """What a policy does at a crossing."""

    ledger: Ledger

    def place(self, site: Site, weights: tuple[Weight, ...]) -> Any:
        """Puts the weights of a site where the device can read them; what `cross` is given in their place."""
        ...

    def begin(self) -> None:
        """After all weights are placed."""
        ...

    def cross(self, placed: Any, x: jax.Array) -> tuple[np.ndarray, ...]:
        """`x @ w.T` for each weight of a site; `x` and the results are the trusted side's."""
        ...

    def pads(self) -> Mapping[Hashable, PadReport]:
        """What was computed beforehand, by site; empty where nothing is hidden."""
        ...

    def programs(self, rows: int, dtype: DTypeLike) -> list[DeviceProgram]:
        """What runs on the device where `rows` rows of activations of `dtype` cross at each site."""
        ...

    def abandon(self) -> None:
        """Ends a pass that has failed in its midst; the next one may begin."""
        ...

    def close(self) -> None:
        """Ends the session: nothing crosses any more."""
        ...


@functools.lru_cache(maxsize=1024)
def _segment(
    trusted: jax.Device, function: Callable[..., Any], static: tuple[tuple[str, Hashable], ...]
) -> Callable[..., Any]:
    """A segment for all models: what is compiled of it has nothing of theirs but shapes."""

    def traced(*operands: object) -> Any:
        with traced_for(trusted.platform):
            return function(*operands, **dict(static))

    names = inspect.signature(function).parameters
    return jax.jit(
        traced,
        in_shardings=jax.sharding.SingleDeviceSharding(trusted),
        donate_argnums=tuple(place for place, name in enumerate(names) if name in GIVEN_UP),
    )


@functools.lru_cache(maxsize=16)
def _taker(trusted: jax.Device) -> Callable[..., tuple[jax.Array, ...]]:
    """Puts arrays of the host onto the device in one call, where `device_put` would be one for each."""
    return jax.jit(lambda *arrays: arrays, in_shardings=jax.sharding.SingleDeviceSharding(trusted))


class Hosted(Composed):
    """A placement whose loops and layers run in Python, and whose verbs run compiled segments.

    Args:
      boundary: the policy's crossing.
      trusted: the CPU device of the trusted side.
    """

    def __init__(self, boundary: Boundary, trusted: jax.Device) -> None:
        self.boundary = boundary
        self.trusted = trusted
        self._guard = threading.local()

    def place(self, params: Params) -> Params:
        """`params` with the matrices of the products on the device, and a head of its own where it was tied."""
        head = params.embedding if params.head is None else params.head
        placed_head = self.boundary.place(Site("head"), (head,))
        layers = tuple(self._place_layer(index, layer) for index, layer in enumerate(params.layers))
        trusted = jax.device_put(replace(params, layers=(), head=None), self.trusted)
        self.boundary.begin()
        return replace(trusted, layers=layers, head=placed_head)

    def _place_layer(self, index: int, layer: LayerParams) -> LayerParams:
        placed: dict[str, Any] = {}
        for site, names in PRODUCTS.items():
            group = self.boundary.place(Site(site, index), tuple(getattr(layer, name) for name in names))
            # The same stands in place of each weight of a site.
            placed |= dict.fromkeys(names, group)
        none: dict[str, Any] = dict.fromkeys(placed)
        return replace(jax.device_put(replace(layer, **none), self.trusted), **placed)

    def compile(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """The function itself, under the guard: it is its segments that are compiled."""

        @functools.wraps(function)
        def run(*operands: Any, **named: Any) -> Any:
            if getattr(self._guard, "stands", False):
                return function(*operands, **named)
            try:
                with self._guarded():
                    return function(*self._taken(operands), **named)
            except BaseException:
                self.boundary.abandon()
                raise

        return run

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Inside, arrays move between devices and the host by the boundary's hand only, in this thread."""
        self._guard.stands = True
        try:
            # The three one by one: `jax.transfer_guard` sets a fourth value too, which is part of every program's key.
            with (
                jax.transfer_guard_host_to_device("disallow_explicit"),
                jax.transfer_guard_device_to_device("disallow_explicit"),
                jax.transfer_guard_device_to_host("disallow_explicit"),
            ):
                yield
        finally:
            self._guard.stands = False

    def _taken(self, operands: tuple[Any, ...]) -> tuple[Any, ...]:
        """What the host hands over, as arrays of the trusted device."""
        leaves, structure = jax.tree.flatten(operands)
        numbers = [place for place, leaf in enumerate(leaves) if isinstance(leaf, np.ndarray | np.generic)]
        if numbers:
            with jax.transfer_guard_host_to_device("allow"):
                taken = _taker(self.trusted)(*(leaves[place] for place in numbers))
            for place, array in zip(numbers, taken, strict=True):
                leaves[place] = array
        result: tuple[Any, ...] = jax.tree.unflatten(structure, leaves)
        return result

    def loop(self, goes_on: Callable[[Carry], Any], step: Callable[[Carry], Carry], carry: Carry) -> Carry:
        """A loop of the host, over a predicate that the trusted side has computed."""
        while bool(goes_on(carry)):
            carry = step(carry)
        return carry

    def layer_key(self, index: int) -> int | None:
        """The layer's number: each has its own crossings."""
        return index

    def linear(self, site: Site, x: jax.Array, weights: tuple[Any, ...]) -> tuple[Any, ...]:
        """One crossing. The results are NumPy's arrays, which the next segment takes."""
        return self.boundary.cross(weights[0], x)

    def protected(self, site: Site, function: Callable[..., Result], *operands: object, **static: Hashable) -> Result:
        """A segment on the trusted CPU, compiled on first use for each shape.

        The guard is lifted for what the host hands over, for the segment's operands can be nowhere but on this CPU: an
        array that is elsewhere is refused.
        """
        segment = _segment(self.trusted, function, tuple(static.items()))
        with jax.transfer_guard_host_to_device("allow"):
            result: Result = segment(*operands)
        return result
