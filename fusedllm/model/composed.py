"""`Composed`: the verbs of a `Placement` that are others in a row, for placements that run each part by itself."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Protocol, TypeVar

import jax
import jax.numpy as jnp

from fusedllm.kernels.rms_norm import rms_norm
from fusedllm.kernels.swiglu import swiglu
from fusedllm.model.params import Weight
from fusedllm.model.placement import Numbers, Residual, Site

Result = TypeVar("Result")


class _Verbs(Protocol):
    """The verbs that say where a part runs; see `Placement`."""

    def linear(self, site: Site, x: jax.Array, weights: tuple[Weight, ...]) -> tuple[Numbers, ...]: ...

    def protected(
        self, site: Site, function: Callable[..., Result], *operands: object, **static: Hashable
    ) -> Result: ...


class Composed:
    """What a class inherits that has `linear` and `protected`."""

    def normed(
        self: _Verbs,
        sites: tuple[Site, Site],
        residual: Residual,
        norm: jax.Array,
        weights: tuple[Weight, ...],
        *,
        eps: float,
        implementation: str | None,
    ) -> tuple[jax.Array, tuple[Numbers, ...]]:
        """See `Placement.normed`."""
        x, normed = self.protected(sites[0], add_and_norm, *residual, norm, eps=eps, implementation=implementation)
        return x, self.linear(sites[1], normed, weights)

    def activated(
        self: _Verbs,
        sites: tuple[Site, Site, Site],
        residual: Residual,
        norm: jax.Array,
        weights: tuple[Weight, Weight],
        biases: tuple[jax.Array | None, jax.Array | None],
        *,
        eps: float,
        implementation: str | None,
    ) -> tuple[jax.Array, jax.Array]:
        """See `Placement.activated`."""
        x, normed = self.protected(sites[0], add_and_norm, *residual, norm, eps=eps, implementation=implementation)
        gate, up = self.linear(sites[1], normed, weights)
        return x, self.protected(sites[2], activate, gate, up, *biases, implementation=implementation)


def add_and_norm(
    x: jax.Array,
    delta: jax.Array | None,
    bias: jax.Array | None,
    weight: jax.Array,
    *,
    eps: float,
    implementation: str | None,
) -> tuple[jax.Array, jax.Array]:
    """The sum of a `Residual` of these three, and its norm."""
    return rms_norm(x, weight, eps, delta=None if delta is None else biased(delta, bias), implementation=implementation)


def activate(
    gate: jax.Array,
    up: jax.Array,
    gate_bias: jax.Array | None,
    up_bias: jax.Array | None,
    *,
    implementation: str | None,
) -> jax.Array:
    """SwiGLU of products to which biases are still to be added."""
    return swiglu(biased(gate, gate_bias), biased(up, up_bias), implementation=implementation)


def added(residual: Residual) -> jax.Array:
    """The sum of a residual stream, traced where it is called."""
    x, delta, bias = residual
    return x if delta is None else x + biased(jnp.asarray(delta), bias)


def biased(x: jax.Array, bias: jax.Array | None) -> jax.Array:
    """`x`, and a bias where there is one."""
    return x if bias is None else x + bias.astype(x.dtype)
