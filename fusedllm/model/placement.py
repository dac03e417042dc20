"""`Placement`: where each part of a layer runs. The layer is written once, in these verbs.

Two say where: `linear` and `protected`. The others are several of these in a row, so that a placement that runs them in
one place may make one operation of them; `composed.py` has what they are otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import numpy as np

from fusedllm.model.params import Weight

Result = TypeVar("Result")
Carry = TypeVar("Carry")

# What a product gives: NumPy's array where the host drives, which the next segment takes.
Numbers = jax.Array | np.ndarray


class Site(NamedTuple):
    """A place in the model, such as `Site("qkv", 3)`.

    `layer` is `None` outside the stack, and for a policy that does not ask for it (`Placement.layer_key`).
    """

    name: str
    layer: int | None = None


class Residual(NamedTuple):
    """The residual stream, `x + (delta + bias)`: the last addition is left to the norm that reads it.

    Attributes:
      x: the stream before it, `[..., hidden]`.
      delta: what the last product gave, whole: what several devices have parts of is summed before. `None` for nothing.
      bias: of that product, or `None`.
    """

    x: jax.Array
    delta: Numbers | None = None
    bias: jax.Array | None = None


@runtime_checkable
class Placement(Protocol):
    """A policy over one and the same layer. An instance is hashable: it is part of a program's key."""

    def compile(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """`function` with the options of `jax.jit`: as one program, or called as it is where the host drives."""
        ...

    def loop(self, goes_on: Callable[[Carry], Any], step: Callable[[Carry], Carry], carry: Carry) -> Carry:
        """`jax.lax.while_loop`, decided where the trust is."""
        ...

    def layer_key(self, index: int) -> int | None:
        """What of a layer's place the policy needs to know; with `None` for all, one trace serves every layer."""
        ...

    def linear(self, site: Site, x: jax.Array, weights: tuple[Weight, ...]) -> tuple[Numbers, ...]:
        """`x @ w.T` for each of `weights` (`[out, in]`), in one crossing; may run on an untrusted device."""
        ...

    def protected(self, site: Site, function: Callable[..., Result], *operands: object, **static: Hashable) -> Result:
        """`function(*operands, **static)`, run where the trust is.

        Arrays are operands and nothing else is; `function` closes over none, so that it can be compiled on its own.
        """
        ...

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
        """The sum of `residual`, and the products of its RMS norm with `weights`.

        `protected` at the first of `sites`, then `linear` at the second. `norm` is the norm's weight, `implementation`
        that of the kernels outside of `linear`.
        """
        ...

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
        """The sum of `residual`, and SwiGLU of the products of its RMS norm with `weights`, those of gate and of up.

        As `normed`, then `protected` at the last of `sites`.
        """
        ...
