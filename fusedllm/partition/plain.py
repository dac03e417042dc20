"""`Plain`: everything is ordinary traced code, XLA fuses the whole layer, and nothing crosses a boundary.

No confidentiality claim: whoever runs the accelerator sees weights, prompt and output.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fusedllm.kernels.choose import traced_for, traced_here
from fusedllm.kernels.linear import linear
from fusedllm.kernels.norm_linear import norm_linear, norm_swiglu
from fusedllm.kernels.pallas_support import preferring
from fusedllm.model.composed import Composed, biased
from fusedllm.model.params import Weight
from fusedllm.model.placement import Numbers, Residual, Site

Result = TypeVar("Result")
Carry = TypeVar("Carry")

# Logits are read as float32, and rounding them to the activations' dtype before would make ties.
OUT_DTYPES: dict[str, DTypeLike] = {"head": jnp.float32}


@dataclass(frozen=True, slots=True)
class Plain(Composed):
    """The placement without a boundary.

    Attributes:
      implementation: passed to the kernels; `None` lets them choose.
      activation_bits: 16 or 8, to which native products with packed weights round activations.
      platform: where the parameters are, if that is not the default backend.
      way: of Pallas to a GPU, where there are kernels of both (`pallas_support.preferring`); `None` for the better one.
    """

    implementation: str | None = None
    activation_bits: int = 16
    platform: str | None = None
    way: str | None = None

    def compile(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """One XLA program."""
        if self.platform is None:
            return jax.jit(traced_here(function), **options)

        @functools.wraps(function)
        def traced(*operands: Any, **named: Any) -> Any:
            with traced_for(str(self.platform)):
                return function(*operands, **named)

        return jax.jit(traced, **options)

    def loop(self, goes_on: Callable[[Carry], Any], step: Callable[[Carry], Carry], carry: Carry) -> Carry:
        """Part of the program."""
        return jax.lax.while_loop(goes_on, step, carry)

    def layer_key(self, index: int) -> int | None:
        """Nothing: every layer is treated alike."""
        return None

    def linear(self, site: Site, x: jax.Array, weights: tuple[Weight, ...]) -> tuple[jax.Array, ...]:
        """Traced where it is called."""
        with self._traced(site.name):
            return linear(
                x,
                *weights,
                precise=self._precise,
                out_dtype=OUT_DTYPES.get(site.name),
                implementation=self.implementation,
            )

    def protected(self, site: Site, function: Callable[..., Result], *operands: object, **static: Hashable) -> Result:
        """Traced where it is called."""
        with self._traced(site.name):
            return function(*operands, **static)

    def normed(
        self,
        sites: tuple[Site, Site],
        residual: Residual,
        norm: jax.Array,
        weights: tuple[Weight, ...],
        *,
        eps: float,
        implementation: str | None,
    ) -> tuple[jax.Array, tuple[Numbers, ...]]:
        """One operation, unless norms and products were asked to be of different implementations."""
        if implementation != self.implementation:
            return Composed.normed(self, sites, residual, norm, weights, eps=eps, implementation=implementation)
        with self._traced(sites[1].name):
            return norm_linear(
                residual.x,
                norm,
                *weights,
                eps=eps,
                delta=_delta(residual),
                precise=self._precise,
                implementation=implementation,
            )

    def activated(
        self,
        sites: tuple[Site, Site, Site],
        residual: Residual,
        norm: jax.Array,
        weights: tuple[Weight, Weight],
        biases: tuple[jax.Array | None, jax.Array | None],
        *,
        eps: float,
        implementation: str | None,
    ) -> tuple[jax.Array, jax.Array]:
        """As `normed`."""
        if implementation != self.implementation:
            return Composed.activated(
                self, sites, residual, norm, weights, biases, eps=eps, implementation=implementation
            )
        with self._traced(sites[1].name):
            return norm_swiglu(
                residual.x,
                norm,
                *weights,
                eps=eps,
                delta=_delta(residual),
                biases=biases,
                precise=self._precise,
                implementation=implementation,
            )

    @contextlib.contextmanager
    def _traced(self, scope: str) -> Iterator[None]:
        with jax.named_scope(scope), preferring(self.way):
            yield

    @property
    def _precise(self) -> bool:
        return self.activation_bits == 16


def _delta(residual: Residual) -> jax.Array | None:
    return None if residual.delta is None else biased(jnp.asarray(residual.delta), residual.bias)
