"""`Hosted`: the host drives compiled segments, the trusted ones on the CPU, the products on an untrusted device.

The layer's code is the same as everywhere. Here nobody compiles it as a whole: its verbs are called with arrays, each
runs a segment that was compiled once, and what goes to the device goes through the policy's `Boundary` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import jax
import numpy as np

from fusedllm.model.params import LayerParams, Params, Weight
from fusedllm.model.placement import Site
from fusedllm.partition.ledger import Ledger

Result = TypeVar("Result")
Carry = TypeVar("Carry")

# The matrices of a layer, by the site that multiplies with them: what the device holds. All else stays with the trusted
# side.
PRODUCTS = {"qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}


class Boundary(Protocol):
    """What a policy does at a crossing."""

    ledger: Ledger

    def place(self, site: Site, weights: tuple[Weight, ...]) -> tuple[Any, ...]:
        """Puts the weights of a site where the device can read them; what `cross` is given in place of each."""
        ...

    def begin(self) -> None:
        """After all weights are placed."""
        ...

    def cross(self, site: Site, x: jax.Array, placed: tuple[Any, ...]) -> tuple[jax.Array, ...]:
        """`x @ w.T` for each weight of a site; `x` and the results are the trusted side's."""
        ...


class Hosted:
    """A placement whose loops and layers run in Python, and whose verbs run compiled segments.

    Args:
      boundary: the policy's crossing.
      trusted: the CPU device of the trusted side.
    """

    def __init__(self, boundary: Boundary, trusted: jax.Device) -> None:
        self.boundary = boundary
        self.trusted = trusted
        self._segments: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def place(self, params: Params) -> Params:
        """`params` with the matrices of the products on the device, and a head of its own where it was tied."""
        head = params.embedding if params.head is None else params.head
        (placed_head,) = self.boundary.place(Site("head"), (head,))
        layers = tuple(self._place_layer(index, layer) for index, layer in enumerate(params.layers))
        trusted = jax.device_put(replace(params, layers=(), head=None), self.trusted)
        self.boundary.begin()
        return replace(trusted, layers=layers, head=placed_head)

    def _place_layer(self, index: int, layer: LayerParams) -> LayerParams:
        placed: dict[str, Any] = {}
        for site, names in PRODUCTS.items():
            weights = tuple(getattr(layer, name) for name in names)
            placed |= zip(names, self.boundary.place(Site(site, index), weights), strict=True)
        none: dict[str, Any] = dict.fromkeys(placed)
        return replace(jax.device_put(replace(layer, **none), self.trusted), **placed)

    def compile(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """The function itself, with its arrays on the trusted side: it is its segments that are compiled."""

        def run(*operands: Any, **named: Any) -> Any:
            return function(*(self._here(operand) for operand in operands), **named)

        return run

    def _here(self, operand: Any) -> Any:
        """NumPy's arrays as the trusted device's; whatever is somewhere already stays there."""
        numbers = (np.ndarray, np.generic)
        return jax.tree.map(lambda x: jax.device_put(x, self.trusted) if isinstance(x, numbers) else x, operand)

    def loop(self, goes_on: Callable[[Carry], Any], step: Callable[[Carry], Carry], carry: Carry) -> Carry:
        """A loop of the host, over a predicate that the trusted side has computed."""
        while bool(goes_on(carry)):
            carry = step(carry)
        return carry

    def layer_key(self, index: int) -> int | None:
        """The layer's number: each has its own crossings."""
        return index

    def linear(self, site: Site, x: jax.Array, weights: tuple[Weight, ...]) -> tuple[jax.Array, ...]:
        """One crossing."""
        return self.boundary.cross(site, x, weights)

    def protected(self, site: Site, function: Callable[..., Result], *operands: object, **static: Hashable) -> Result:
        """A segment on the trusted CPU, compiled on first use for each shape."""
        # Of an attention the pages are given up, so that they are updated where they are.
        donated = ("pages",) if site.name == "attention" else ()
        key = (function, tuple(static), donated)
        if key not in self._segments:
            self._segments[key] = jax.jit(function, static_argnames=tuple(static), donate_argnames=donated)
        result: Result = self._segments[key](*operands, **static)
        return result
