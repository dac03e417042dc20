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
from collections.abc import Callable, Iterable, Sequence
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
from fusedllm.quant.methods import Method
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
    part = Run(run.checkpoint, short, run.scheme_of, run.method, run.scale_dtype, None, run.progress)
    losses = expected_losses(part, free, [SCHEMES[candidate] for candidate in candidates])
    item = 8 * run.scale_dtype.itemsize

    def bits_of(name: str, scheme: GroupedScheme | None) -> int:
        place = Place.of(wanted[name], scheme, FLOAT_BITS // 8)
        return 8 * place.code_bytes + item * (place.numbers + place.zeros)

    choices = {
        name: [
            Choice(candidate, bits_of(name, SCHEMES[candidate]), loss)
            for candidate, loss in zip(candidates, losses[name], strict=True)
        ]
        for name in free
    }
    total = sum(math.prod(shape) for shape in wanted.values())
    spent = sum(bits_of(name, schemes[name]) for name in wanted if name not in choices)
    found = allocate(choices, int(target * total) - spent)
    return schemes | {name: SCHEMES[candidate] for name, candidate in found.items()}


def expected_losses(run: Run, names: Iterable[str], schemes: Sequence[GroupedScheme]) -> dict[str, list[float]]:
    """The KL divergence that is expected of each of `names`, matrices, in each of `schemes`, in nats for each token.

    From the head down, a layer's weights and second moments are in memory at a time, beside the hidden states that all
    layers below take.
    """
    wanted = frozenset(names)
    config = run.checkpoint.config
    description: Any = describe(config)
    states = run.states()
    gradients, losses = _at_head(run, description, wanted, schemes, states.pop())
    order = reversed(range(config.num_layers))
    for index in tqdm(
        order, desc="weighing", unit="layer", total=config.num_layers, disable=None if run.progress else True
    ):
        gradients, found = _at_layer(run, description, index, wanted, schemes, states.pop(), gradients)
        losses |= found
        run.checkpoint.release()
    name = description.embedding.name
    if name in wanted:
        found_rows = _at_embedding(run, name, schemes, gradients)
        # One that is the head too errs in both places.
        losses[name] = [sum(both) for both in zip(found_rows, losses.get(name, [0.0] * len(schemes)), strict=True)]
    return losses


# In functions of their own, so that nothing of one layer is left when the next is read.
def _at_head(
    run: Run, description: Any, wanted: frozenset[str], schemes: Sequence[GroupedScheme], hidden: np.ndarray
) -> tuple[np.ndarray, dict[str, list[float]]]:
    """The gradients by the `hidden` states that the head takes, and the losses of the head."""
    head = description.embedding if description.head is None else description.head
    norm, weights = run.read(description.final_norm.name), jnp.asarray(run.read(head.name))
    gradients, squares = _through_head(run.checkpoint.config, norm, weights, hidden)
    if head.name not in wanted:
        return gradients, {}
    cost = functools.partial(_cost(run.head_statistics(norm, hidden), run.method), squares)
    return gradients, {head.name: _losses(weights, schemes, run.scale_dtype, cost)}


def _at_layer(
    run: Run,
    description: Any,
    index: int,
    wanted: frozenset[str],
    schemes: Sequence[GroupedScheme],
    hidden: np.ndarray,
    gradients: np.ndarray,
) -> tuple[np.ndarray, dict[str, list[float]]]:
    """The gradients by the `hidden` states that a layer takes, and the losses of its matrices."""
    described, losses = description.layers[index], {}
    layer = run.float_layer(described)
    before, squares = _through_layer(run.checkpoint.config, index, layer, hidden, gradients)
    for site, statistics in run.site_statistics(index, layer, hidden).items():
        names = {name: getattr(described, name).name for name in SITES[site]}
        if wanted.isdisjoint(names.values()):
            continue
        of_site = _cost(statistics, run.method)
        for name, full in names.items():
            if full in wanted:
                cost = functools.partial(of_site, squares[name])
                losses[full] = _losses(getattr(layer, name), schemes, run.scale_dtype, cost)
    return before, losses


def _at_embedding(run: Run, name: str, schemes: Sequence[GroupedScheme], gradients: np.ndarray) -> list[float]:
    """The losses of the embedding's rows, as often as they are seen."""
    config = run.checkpoint.config
    seen = np.bincount(run.tokens.reshape(-1), minlength=config.vocab_size) + UNSEEN
    frequencies = jnp.asarray(seen / seen.sum(), jnp.float32)
    stream = jnp.asarray(np.square(gradients).reshape(-1, config.hidden_size).mean(0))
    cost = functools.partial(_loss_rows, frequencies, stream)
    return _losses(jnp.asarray(run.read(name)), schemes, run.scale_dtype, cost)


# What errors `off`, of each so many rows of a matrix, cost: from what is known of its rows, the errors and that step.
Cost = Callable[[jax.Array, jax.Array, int], jax.Array]


def _losses(
    weights: jax.Array,
    schemes: Sequence[GroupedScheme],
    scale_dtype: np.dtype,
    cost: Callable[[jax.Array, int], jax.Array],
) -> list[float]:
    """What `cost` says of the errors of `weights` in each of `schemes`, from some rows for all of them."""
    step = max(1, weights.shape[0] // ROWS)
    some = weights[::step]
    share = weights.shape[0] / some.shape[0]
    # By rounding, whatever the method: a search would take much longer and keep the schemes' order. Codes that make
    # up for one another need not be tried either, as what remains of their errors is known.
    return [
        share * float(cost(quantize(some, scheme, scale_dtype=scale_dtype).dequantize() - some, step))
        for scheme in schemes
    ]


def _cost(statistics: Statistics, method: Method) -> Cost:
    """The cost of errors in the matrices of a site, by the mean squares of the gradients of their outputs."""
    hessian = statistics.hessian
    assert hessian is not None
    if not method.gptq:
        return lambda gradients, off, step: _loss(off, gradients[::step], hessian)
    # Of an error in each column when all later ones have made up for it.
    left = _unexplained(hessian)
    return lambda gradients, off, step: _loss_left(off, gradients[::step], left)


def _through_head(
    config: ModelConfig, norm: np.ndarray, head: jax.Array, hidden: np.ndarray
) -> tuple[np.ndarray, jax.Array]:
    """The gradients by `hidden`, and the mean squares of those by the logits."""
    gradients = np.empty_like(hidden)
    total: Any = 0.0
    for index, part in enumerate(hidden):
        pulled, squares = _pull_head(config, jnp.asarray(part), jnp.asarray(norm), head, jax.random.key(index))
        gradients[index] = pulled
        total = total + squares
    return gradients, total / hidden[..., 0].size


def _through_layer(
    config: ModelConfig, index: int, layer: LayerParams, hidden: np.ndarray, gradients: np.ndarray
) -> tuple[np.ndarray, dict[str, jax.Array]]:
    """The gradients by `hidden`, and the mean squares of those by the outputs of the layer's matrices."""
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


@functools.partial(jax.jit, static_argnums=3)
def _loss_rows(frequencies: jax.Array, stream: jax.Array, off: jax.Array, step: int) -> jax.Array:
    """Of an embedding, whose rows are seen so often, and errors of whose columns cost `stream`."""
    return 0.5 * (frequencies[::step] * (jnp.square(off) * stream).sum(-1)).sum()


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
