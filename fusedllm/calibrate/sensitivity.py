"""How much each tensor matters: the loss that is expected of every scheme for it, measured on the model.

To second order a small change of a matrix, `E`, moves the model's distribution by `E_x E_g (g . E x)^2 / 2` nats of KL
divergence, where `x` is an input of it and `g` the gradient of the log-probability of a token drawn from the model
(the Fisher information; arXiv:1412.1193). Inputs and gradients are taken to be independent, and gradients of a matrix's
outputs of one another, as in K-FAC (arXiv:1503.05671): a row `e` of `E` costs `E[g^2] e H e^T / 2`.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from fusedllm.calibrate.layers import SITES, Recorder, run_layer
from fusedllm.calibrate.run import Run
from fusedllm.config import ModelConfig
from fusedllm.errors import QuantizationError
from fusedllm.kernels.grouped import GroupedScheme
from fusedllm.kernels.quantize import quantize
from fusedllm.kernels.rms_norm import rms_norm
from fusedllm.model.params import LayerParams, describe, specs
from fusedllm.model.placement import Site
from fusedllm.quant.allocate import Choice, allocate
from fusedllm.quant.gptq import factorized
from fusedllm.quant.schemes import SCHEMES
from fusedllm.quant.statistics import Statistics
from fusedllm.quant.table import Place

# What a budget of bits is spent on.
CANDIDATES = ("int3-g128", "int3-g64", "int4-g128", "int4-g64", "int4-g32", "int8-g128")
# Windows whose gradients are measured, and rows of a matrix that speak for all of them.
WINDOWS = 8
ROWS = 1024
# Tokens that were not seen are expected so often, beside those that were.
UNSEEN = 0.05
FLOAT_BITS = 32


@dataclass(frozen=True, eq=False)
class Prober(Recorder):
    """A recorder that adds `probes` to what products return: their gradients are those of the outputs."""

    probes: dict[str, jax.Array] = field(default_factory=dict)

    def linear(self, site: Site, x: jax.Array, weights: tuple[Any, ...]) -> tuple[jax.Array, ...]:
        """The products and their probes."""
        made = super().linear(site, x, weights)
        return tuple(
            one + self.probes[name].reshape(one.shape) for one, name in zip(made, SITES[site.name], strict=True)
        )


def choose_schemes(
    run: Run, target: float, candidates: Sequence[str] = CANDIDATES, fixed: Iterable[str] = ()
) -> dict[str, GroupedScheme | None]:
    """A scheme for every tensor that `run` would quantize; all tensors together have `target` bits per weight at most.

    Tensors whose names one of the regular expressions `fixed` finds keep the scheme that `run` has for them.

    Raises:
      QuantizationError: no positive number, or the candidates take more.
    """
    if not isinstance(target, (int, float)) or not 0 < target <= FLOAT_BITS:
        raise QuantizationError(f"target_bpw must be a number of bits from 0 to {FLOAT_BITS}, got {target!r}.")
    config = run.checkpoint.config
    wanted = {name: spec.shape for name, spec in specs(config).items()}
    schemes = {name: run.scheme_of(name, shape) for name, shape in wanted.items()}
    free = [name for name in wanted if schemes[name] is not None and not any(re.search(one, name) for one in fixed)]
    short = run.tokens[: min(WINDOWS, len(run.tokens))]
    measured = _Measured(Run(run.checkpoint, short, run.scheme_of, run.method, run.scale_dtype, None, run.progress))
    item = 8 * run.scale_dtype.itemsize

    def bits_of(name: str, scheme: GroupedScheme | None) -> int:
        place = Place.of(wanted[name], scheme, FLOAT_BITS // 8)
        return 8 * place.code_bytes + item * (place.numbers + place.zeros)

    choices = {}
    for name in tqdm(free, desc="weighing", unit="tensor", disable=None if run.progress else True):
        weights = jnp.asarray(run.read(name))
        choices[name] = [
            Choice(candidate, bits_of(name, SCHEMES[candidate]), measured.loss(name, weights, SCHEMES[candidate]))
            for candidate in candidates
        ]
    total = sum(math.prod(shape) for shape in wanted.values())
    spent = sum(bits_of(name, schemes[name]) for name in wanted if name not in choices)
    found = allocate(choices, int(target * total) - spent)
    return schemes | {name: SCHEMES[candidate] for name, candidate in found.items()}


class _Measured:
    """Second moments of all inputs, and of the gradients of all outputs."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._statistics: dict[str, Statistics] = {}
        self._gradients: dict[str, jax.Array] = {}
        self._factors: dict[int, jax.Array] = {}
        config = run.checkpoint.config
        description: Any = describe(config)
        hidden = [run.read(description.embedding.name)[run.tokens]]
        for name, found in run.statistics(hidden):
            self._statistics[name] = found
        head = description.embedding if description.head is None else description.head
        gradients, self._gradients[head.name] = self._of_head(
            run.read(description.final_norm.name), run.read(head.name), hidden[-1]
        )
        order = list(reversed(range(config.num_layers)))
        for index in tqdm(order, desc="differentiating", unit="layer", disable=None if run.progress else True):
            layer = run.float_layer(description.layers[index])
            gradients, squares = self._of_layer(index, layer, hidden[index], gradients)
            for name, one in squares.items():
                self._gradients[getattr(description.layers[index], name).name] = one
        self._embedding = description.embedding.name
        self._tied = description.head is None
        seen = np.bincount(run.tokens.reshape(-1), minlength=config.vocab_size) + UNSEEN
        self._frequencies = seen / seen.sum()
        self._stream = np.square(gradients).reshape(-1, config.hidden_size).mean(0)

    def loss(self, name: str, weights: jax.Array, scheme: GroupedScheme) -> float:
        """The KL divergence that is expected of `name` in `scheme`, in nats for each token."""
        step = max(1, weights.shape[0] // ROWS)
        some = weights[::step]
        importance = self._statistics.get(name)
        # By rounding, whatever the method: a search would take much longer and keep the schemes' order. Codes that make
        # up for one another need not be tried either, as what remains of their errors is known.
        off = quantize(some, scheme, scale_dtype=self._run.scale_dtype).dequantize() - some
        loss = 0.0
        if name == self._embedding:
            rows = jnp.asarray(self._frequencies[::step], jnp.float32)
            loss += float(0.5 * (rows * (jnp.square(off) * jnp.asarray(self._stream)).sum(-1)).sum()) * step
        if importance is not None and importance.hessian is not None:
            gradients = self._gradients[name][::step]
            share = weights.shape[0] / off.shape[0]
            if self._run.method.gptq:
                loss += share * float(_loss_left(off, gradients, self._left_over(importance)))
            else:
                loss += share * float(_loss(off, gradients, importance.hessian))
        return loss

    def _left_over(self, statistics: Statistics) -> jax.Array:
        """What an error in each column costs when all later ones have made up for it; matrices of a site share it."""
        key = id(statistics)
        if key not in self._factors:
            self._factors[key] = _unexplained(statistics.hessian)
        return self._factors[key]

    def _of_head(self, norm: np.ndarray, head: np.ndarray, hidden: np.ndarray) -> tuple[np.ndarray, jax.Array]:
        config = self._run.checkpoint.config
        gradients = np.empty_like(hidden)
        total: Any = 0.0
        for index, part in enumerate(hidden):
            key = jax.random.key(index)
            pulled, squares = _pull_head(config, jnp.asarray(part), jnp.asarray(norm), jnp.asarray(head), key)
            gradients[index] = pulled
            total = total + squares
        return gradients, total / hidden[..., 0].size

    def _of_layer(
        self, index: int, layer: LayerParams, hidden: np.ndarray, gradients: np.ndarray
    ) -> tuple[np.ndarray, dict[str, jax.Array]]:
        config = self._run.checkpoint.config
        before = np.empty_like(gradients)
        total: dict[str, Any] = {}
        for at in range(0, len(hidden), 2):
            part = slice(at, at + 2)
            pulled, squares = _pull_layer(
                config, layer, jnp.asarray(hidden[part]), jnp.asarray(gradients[part]), config.sliding_windows[index]
            )
            before[part] = pulled
            total = {name: total.get(name, 0.0) + one for name, one in squares.items()}
        return before, {name: one / hidden[..., 0].size for name, one in total.items()}


@jax.jit
def _unexplained(hessian: jax.Array) -> jax.Array:
    """Of each column's input, the mean square that those rounded after it can't explain."""
    factor = factorized(hessian)
    left = jnp.diagonal(hessian).mean() / jnp.square(jnp.diagonal(factor.upper))
    return jnp.zeros_like(left).at[factor.order].set(left)


@jax.jit
def _loss_left(off: jax.Array, gradients: jax.Array, left: jax.Array) -> jax.Array:
    return 0.5 * (gradients * (jnp.square(off) * left).sum(-1)).sum()


@jax.jit
def _loss(off: jax.Array, gradients: jax.Array, hessian: jax.Array) -> jax.Array:
    products = jnp.matmul(off, hessian, precision=jax.lax.Precision.HIGHEST)
    return 0.5 * (gradients * (products * off).sum(-1)).sum()


@functools.partial(jax.jit, static_argnums=0)
def _pull_head(
    config: ModelConfig, hidden: jax.Array, norm: jax.Array, head: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gradients of the log-probability of drawn tokens by `hidden`, and the sum of squares of those by logits."""
    normed, pull = jax.vjp(lambda x: rms_norm(x, norm, config.rms_norm_eps, implementation="xla")[1], hidden)
    logits = jnp.matmul(normed, head.T, precision=jax.lax.Precision.HIGHEST)
    probabilities = jax.nn.softmax(logits, axis=-1)
    drawn = jax.nn.one_hot(jax.random.categorical(key, logits, axis=-1), logits.shape[-1])
    (gradients,) = pull(jnp.matmul(drawn - probabilities, head, precision=jax.lax.Precision.HIGHEST))
    # Of logits the expectation is known, and needs no draw.
    return gradients, (probabilities * (1 - probabilities)).sum(0)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _pull_layer(
    config: ModelConfig, layer: LayerParams, hidden: jax.Array, gradients: jax.Array, window: int | None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Gradients by what goes into a layer, and the sums of squares of those by the outputs of its matrices."""
    tokens = hidden.shape[0] * hidden.shape[1]
    probes = {name: jnp.zeros((tokens, getattr(layer, name).shape[0])) for names in SITES.values() for name in names}

    def out(hidden: jax.Array, probes: dict[str, jax.Array]) -> jax.Array:
        return run_layer(config, Prober("xla", probes=probes), layer, hidden, window, "xla")

    _, pull = jax.vjp(out, hidden, probes)
    before, found = pull(gradients)
    return before, {name: jnp.square(one).sum(0) for name, one in found.items()}
