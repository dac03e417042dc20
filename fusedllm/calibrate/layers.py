"""The decoder one layer at a time: what goes out of a layer, and what its matrices see while it does."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from fusedllm.config import ModelConfig
from fusedllm.kernels.linear import linear
from fusedllm.kernels.rms_norm import rms_norm
from fusedllm.model.composed import Composed, added
from fusedllm.model.params import LayerParams, Weight
from fusedllm.model.placement import Residual, Site
from fusedllm.model.rope import cos_sin
from fusedllm.model.transformer import decoder_layer
from fusedllm.quant.statistics import Statistics

Result = TypeVar("Result")
Carry = TypeVar("Carry")

# The sites of a layer, and the fields of `LayerParams` that are multiplied there.
SITES: dict[str, tuple[str, ...]] = {
    "qkv": ("q", "k", "v"),
    "o": ("o",),
    "gate_up": ("gate", "up"),
    "down": ("down",),
}

Sums = dict[str, tuple[jax.Array, jax.Array]]
"""Of each site's inputs over all tokens: the sum of `x x^T`, `[in, in]`, and of `|x|`, `[in]`."""


@dataclass(frozen=True, eq=False)
class Recorder(Composed):
    """A placement that runs everything in place and keeps the inputs of each product, `[tokens, in]`, by site."""

    implementation: str | None = None
    inputs: dict[str, jax.Array] = field(default_factory=dict)

    def compile(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """Part of the program that calls it: what is recorded may not be a value of another one."""
        return function

    def loop(self, goes_on: Callable[[Carry], Any], step: Callable[[Carry], Carry], carry: Carry) -> Carry:
        """Part of the program; a layer has none."""
        return jax.lax.while_loop(goes_on, step, carry)

    def layer_key(self, index: int) -> int | None:
        """Nothing: a recorder serves one layer."""
        return None

    def linear(self, site: Site, x: jax.Array, weights: tuple[Weight, ...]) -> tuple[jax.Array, ...]:
        """The products, with activations as they are."""
        self.inputs[site.name] = x.reshape(-1, x.shape[-1])
        return linear(x, *weights, precise=True, implementation=self.implementation)

    def protected(self, site: Site, function: Callable[..., Result], *operands: object, **static: Hashable) -> Result:
        """Traced where it is called."""
        return function(*operands, **static)


def run_layer(
    config: ModelConfig,
    placement: Any,
    layer: LayerParams,
    x: jax.Array,
    window: int | None,
    implementation: str | None,
) -> jax.Array:
    """What comes out of `layer` for whole sequences `x`, `[batch, seq, hidden]`, each from position 0 on; traceable."""
    batch, seq = x.shape[:2]
    # A constant of the program, without which XLA's attention has no derivative.
    with jax.ensure_compile_time_eval():
        start = jnp.zeros(batch, jnp.int32)
    angles = cos_sin(config.rope, config.head_dim, jnp.broadcast_to(jnp.arange(seq), (batch, seq)))
    # Each sequence is one page; page 0 is nobody's.
    page = jnp.zeros((batch + 1, config.num_kv_heads, seq, config.head_dim), x.dtype)
    table = jnp.arange(1, batch + 1, dtype=jnp.int32)[:, None]
    out, _ = decoder_layer(
        config,
        placement,
        layer,
        Residual(x),
        (page, page),
        angles,
        start,
        table,
        window=window,
        key=None,
        implementation=implementation,
    )
    return added(out)


@functools.partial(jax.jit, static_argnames=("config", "window", "implementation"))
def layer_output(
    config: ModelConfig,
    layer: LayerParams,
    x: Float[Array, "batch seq hidden"],
    *,
    window: int | None,
    implementation: str | None = None,
) -> Float[Array, "batch seq hidden"]:
    """What comes out of `layer` for `x`."""
    return run_layer(config, Recorder(implementation), layer, x, window, implementation)


@functools.partial(jax.jit, static_argnames=("config", "window", "implementation"), donate_argnames="sums")
def layer_sums(
    config: ModelConfig,
    layer: LayerParams,
    x: Float[Array, "batch seq hidden"],
    sums: Sums,
    *,
    window: int | None,
    implementation: str | None = None,
) -> Sums:
    """`sums` with those of the inputs that the sites of `layer` see for `x`."""
    recorder = Recorder(implementation)
    run_layer(config, recorder, layer, x, window, implementation)
    return {name: _added(sums[name], recorder.inputs[name]) for name in sums}


@functools.partial(jax.jit, static_argnames=("config", "implementation"), donate_argnames="sums")
def head_sums(
    config: ModelConfig,
    norm: jax.Array,
    x: Float[Array, "batch seq hidden"],
    sums: tuple[jax.Array, jax.Array],
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`sums` with those of the head's inputs."""
    normed = rms_norm(x, norm, config.rms_norm_eps, implementation=implementation)[1]
    return _added(sums, normed.reshape(-1, x.shape[-1]))


def empty_sums(width: int) -> tuple[jax.Array, jax.Array]:
    """The sums over no tokens of inputs of `width` elements."""
    return jnp.zeros((width, width), jnp.float32), jnp.zeros(width, jnp.float32)


def statistics_of(sums: tuple[jax.Array, jax.Array], tokens: int) -> Statistics:
    """The means over `tokens` tokens."""
    products, magnitudes = (np.float32(1 / tokens) * one for one in sums)
    return Statistics(mean_square=jnp.diagonal(products), mean_abs=magnitudes, hessian=products)


def _added(sums: tuple[jax.Array, jax.Array], x: jax.Array) -> tuple[jax.Array, jax.Array]:
    x = x.astype(jnp.float32)
    products = jnp.matmul(x.T, x, precision=lax.Precision.HIGHEST)
    return sums[0] + products, sums[1] + jnp.abs(x).sum(0)
