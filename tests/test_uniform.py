"""What the device sees under `masked` tells nothing; three wrong ways to mask are seen through by the same code.

Evidence beside the proof, which is in `ring.py`: a number of the ring plus a uniform one is uniform. Figures are drawn
anew each time, so that a test of what is right can fail by chance.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence

import distinguishers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, TINY_ENGINE
from distinguishers import Forward

from fusedllm.config import ModelConfig
from fusedllm.engine.config import EngineConfig
from fusedllm.kernels.quantize import quantize
from fusedllm.llm import LLM, load
from fusedllm.partition import ring
from fusedllm.partition.pad_pool import PadPool
from fusedllm.partition.pad_supply import PoolLimits
from fusedllm.quant.schemes import SCHEMES
from fusedllm.weights.checkpoint import LazyTensor
from fusedllm.weights.random import random_checkpoint

# A p-value of `masked` below this is an alarm. There are fewer than a hundred p-values of it in this file, so that one
# run in ten million gives a false one, at most.
ALARM = 1e-9
# As wide as LLaMA-1B, as whether a mask hides a row depends on that; the rest is small. All have the same width.
WIDE = dataclasses.replace(TINY, hidden_size=2048, intermediate_size=2048, num_heads=32, num_kv_heads=2, head_dim=64)
TOKENS = 16
# What a chat template begins every prompt with. Attention is causal and weights are public, so that anybody can compute
# the activations of these tokens in all layers.
PREFIX = 4

FORWARDS = 80
# For statistics of single numbers that many are enough.
FEW = 4

# Of R.
DEVIATION = 0.1

# What an attack has to reach, as the mean correlation of rows at each crossing. Q + R, as it is seen, has 0.995 with Q
# already: 1 / sqrt(1 + 0.1^2).
RECOVERED = {"reused": 0.999, "stacked": 0.999, "permuted": 0.999, "rank one": 0.99}


def integer_model(config: ModelConfig, policy: str, engine: EngineConfig) -> LLM:
    """Random weights in w8a8, under a policy."""
    checkpoint = random_checkpoint(config, "float32", 1)
    quantized = {
        name: dataclasses.replace(tensor, quantization="w8a8", read_quantized=functools.partial(_codes, tensor))
        for name, tensor in checkpoint.tensors.items()
        if len(tensor.shape) == 2
    }
    tensors = {**checkpoint.tensors, **quantized}
    return load(dataclasses.replace(checkpoint, tensors=tensors), policy=policy, engine=engine)


def _codes(tensor: LazyTensor):
    return jax.tree.map(np.asarray, quantize(jnp.asarray(tensor.read()), SCHEMES["w8a8"]))


def prompts(config: ModelConfig) -> tuple[list[int], list[int]]:
    """Two that begin alike."""
    first, second = np.random.default_rng(3).integers(3, config.vocab_size, (2, TOKENS))
    second[:PREFIX] = first[:PREFIX]
    return first.tolist(), second.tolist()


@contextlib.contextmanager
def watched(llm: LLM) -> Iterator[list[list[np.ndarray]]]:
    """What the device gets, a list for each forward; whoever runs a forward appends an empty one first."""
    link = llm._applied.placement.boundary.link
    exchange = link.exchange
    seen: list[list[np.ndarray]] = []

    def exchanged(placed, sent):
        seen[-1].append(sent.copy())
        return exchange(placed, sent)

    link.exchange = exchanged
    try:
        yield seen
    finally:
        del link.exchange


@pytest.fixture(scope="module")
def activations() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Of the two prompts: what `masked` has to hide, at every crossing of a forward."""
    llm = integer_model(WIDE, "verify", TINY_ENGINE)
    boundary = llm._applied.placement.boundary
    cross = boundary.cross
    found: list[list[np.ndarray]] = []

    def crossed(group, x):
        found[-1].append(np.asarray(x, np.float32).reshape(-1, x.shape[-1]))
        return cross(group, x)

    boundary.cross = crossed
    for prompt in prompts(WIDE):
        found.append([])
        llm.logits(prompt)
    assert {x.shape for x in found[0]} == {(TOKENS, 2048)}
    for one, other in zip(*found, strict=True):
        # A mask by which both prompts look the same would be no wonder if they were the same.
        np.testing.assert_array_equal(one[:PREFIX], other[:PREFIX])
        assert (one[PREFIX:] != other[PREFIX:]).any(axis=1).all()
    return found[0], found[1]


# A session of a scheme: makes what the device sees of a forward from its activations.
Session = Callable[[Forward], list[np.ndarray]]


def masked() -> Session:
    """The real one: codes and pads over the ring. What the pads are multiplied with does not cross."""
    weights = {crossing: np.ones((1, WIDE.hidden_size), np.int8) for crossing in range(4 * WIDE.num_layers + 1)}
    pool = PadPool(weights, PoolLimits(capacity=TOKENS, exhausted="make"), background=False)

    def send(forward: Forward) -> list[np.ndarray]:
        sent = []
        for crossing, x in enumerate(forward):
            with pool.take(crossing, len(x)) as pads:
                sent.append(ring.encode(x, pads.outgoing()).sent)
        return sent

    return send


def reused() -> Session:
    """(i) Float Gaussian masks, drawn once and reused by the next forward.

    It breaks because what two forwards have in common cancels: their difference is that of their activations. That the
    masks are ten times as large as these, and would hide one forward well enough, is no help.
    """
    rng = np.random.default_rng(1)
    masks: dict[int, np.ndarray] = {}

    def send(forward: Forward) -> list[np.ndarray]:
        for crossing, x in enumerate(forward):
            masks.setdefault(crossing, 10 * rng.standard_normal(x.shape, np.float32))
        return [x + masks[crossing] for crossing, x in enumerate(forward)]

    return send


def stacked(permuted: bool) -> Session:
    """(ii) [Q + R; aR] with R = 0.1 * randn and a secret a, all drawn anew for each crossing; maybe rows shuffled.

    It breaks because the lower half is the mask. Its size tells a, and then it can be subtracted. Of shuffled rows
    those that belong together have a product that no others have. And R is so small that Q + R is nearly Q.
    """
    rng = np.random.default_rng(2)

    def send(forward: Forward) -> list[np.ndarray]:
        sent = []
        for x in forward:
            mask = np.float32(DEVIATION) * rng.standard_normal(x.shape, np.float32)
            rows = np.concatenate([x + mask, np.float32(rng.uniform(20, 80)) * mask])
            sent.append(rng.permutation(rows) if permuted else rows)
        return sent

    return send


def rank_one() -> Session:
    """(iii) x M with one secret M = D + alpha beta^T for every layer.

    It breaks because M has three numbers for each column, and a few rows that are known determine two of them: of a row
    that isn't known one number of 2,048 stays hidden. One M for every layer lets what is known of any layer count for
    all of them. (And a device that multiplies with M^-1 W, where anybody knows W, has M by a division.)
    """
    rng = np.random.default_rng(3)
    width = WIDE.hidden_size
    diagonal = rng.choice([-1, 1], width) * rng.uniform(0.5, 2, width)
    alpha, beta = rng.standard_normal((2, width))
    return lambda forward: [np.float32(x * diagonal + np.outer(x @ alpha, beta)) for x in forward]


WRONG = {
    "reused": reused,
    "stacked": functools.partial(stacked, False),
    "permuted": functools.partial(stacked, True),
    "rank one": rank_one,
}


@dataclasses.dataclass
class Views:
    """What the device saw of forwards of either prompt."""

    labels: np.ndarray
    forwards: Sequence[Forward]


def coin_flips() -> np.ndarray:
    """By coins that nothing else depends on, so that a guess is right in exactly half of all cases by chance."""
    return np.frombuffer(os.urandom(FORWARDS), np.uint8) & 1


@pytest.fixture(scope="module")
def views(activations) -> Callable[[str], Views]:
    """By the name of a scheme, on the same activations."""

    @functools.cache
    def seen(name: str) -> Views:
        session = masked() if name == "masked" else WRONG[name]()
        labels = coin_flips()
        return Views(labels, [session(activations[label]) for label in labels])

    return seen


@pytest.fixture(scope="module")
def model_views() -> Callable[[str], Views]:
    """By the name of a policy: what crosses under the whole engine."""

    @functools.cache
    def seen(policy: str) -> Views:
        llm = integer_model(TINY, policy, TINY_ENGINE)
        labels, both = coin_flips(), prompts(TINY)
        with watched(llm) as forwards:
            for label in labels:
                forwards.append([])
                llm.logits(both[label])
        llm.close()
        return Views(labels, forwards)

    return seen


def statistics(of: Views) -> dict[str, float]:
    """All p-values."""
    correlations = distinguishers.serial_correlations(of.forwards[:FEW])
    guesses = distinguishers.classify(of.forwards, of.labels)
    return {
        "bytes": distinguishers.byte_chi_square(of.forwards[:FEW]),
        **{name: distinguishers.two_sided(z) for name, z in correlations.items()},
        **{f"guessed by {name}": p for name, (_, p) in guesses.items()},
    }


def attack(name: str, seen: Views, activations) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """What is recovered of the second prompt by who knows the first one and its activations, and the truth."""
    known, hidden = activations
    first, second = (seen.forwards[seen.labels.tolist().index(label)] for label in (0, 1))
    if name == "reused":
        return distinguishers.undo_reuse(first, second, known), hidden
    if name == "rank one":
        prefix, seen_of_it = (np.concatenate([x[:PREFIX] for x in of]) for of in (known, first))
        undo = distinguishers.undo_rank_one(prefix, seen_of_it)
        return [undo(x[PREFIX:]) for x in second], [x[PREFIX:] for x in hidden]
    undo_of = {"stacked": distinguishers.undo_stack, "permuted": distinguishers.undo_permuted_stack}
    found = [undo_of[name](x, DEVIATION) for x in second]
    # What is no stack has half as many rows as the attack takes it for.
    return found, hidden if name == "permuted" else [x[: len(rows)] for x, rows in zip(hidden, found, strict=True)]


def likeness(name: str, found: list[np.ndarray], truth: list[np.ndarray]) -> tuple[float, float]:
    """The correlation, and its p-value where nothing was found."""
    compare = distinguishers.likeness_in_any_order if name == "permuted" else distinguishers.likeness
    return compare(found, truth)


def test_what_masked_sends_is_uniform_and_tells_nothing_of_the_prompt(views):
    seen = views("masked")
    assert all(array.dtype == np.int32 for forward in seen.forwards for array in forward)
    for name, p in statistics(seen).items():
        assert p > ALARM, name


def test_neither_does_what_crosses_under_the_whole_engine(model_views):
    seen = model_views("masked")
    assert {len(forward) for forward in seen.forwards} == {4 * TINY.num_layers + 1}
    for name, p in statistics(seen).items():
        assert p > ALARM, name


def test_the_same_crossings_without_pads_are_seen_through(model_views):
    found = statistics(model_views("verify"))
    for name in ("bytes", "numbers and the next row", "numbers and the next forward", "guessed by values"):
        assert found[name] < ALARM, name


@pytest.mark.parametrize(("draw", "seen_by"), [("again", "numbers and the next forward"), ("31 bits", "bytes")])
def test_pads_of_the_ring_that_are_reused_or_not_of_all_of_it_are_noticed(activations, draw, seen_by):
    def pads(forward: int, shape: tuple[int, ...]) -> np.ndarray:
        rng = np.random.default_rng(0 if draw == "again" else forward)
        return rng.integers(0 if draw == "31 bits" else -(2**31), 2**31, shape).astype(np.int32)

    forwards = [[ring.encode(x, pads(index, x.shape)).sent for x in activations[index % 2]] for index in range(FEW)]
    found = {name: distinguishers.two_sided(z) for name, z in distinguishers.serial_correlations(forwards).items()}
    found["bytes"] = distinguishers.byte_chi_square(forwards)
    assert found[seen_by] < ALARM


@pytest.mark.parametrize("scheme", WRONG)
def test_statistics_break_a_wrong_scheme(views, scheme):
    seen = views(scheme)
    # Floats are not uniform whatever they hide: this sees the encoding, and the others what is behind it.
    assert distinguishers.byte_chi_square(seen.forwards[:FEW]) < ALARM
    correlations = distinguishers.serial_correlations(seen.forwards[:FEW])
    assert distinguishers.two_sided(max(correlations.values(), key=abs)) < ALARM
    rate, p = max(distinguishers.classify(seen.forwards, seen.labels).values())
    assert rate >= 0.95
    assert p < ALARM


@pytest.mark.parametrize("scheme", WRONG)
def test_an_attack_recovers_the_activations_that_a_wrong_scheme_hides(views, activations, scheme):
    found, truth = attack(scheme, views(scheme), activations)
    for rows, right in zip(found, truth, strict=True):
        correlation, _ = likeness(scheme, [rows], [right])
        assert correlation > RECOVERED[scheme]


@pytest.mark.parametrize("scheme", WRONG)
def test_and_with_them_the_prompt(views, activations, scheme):
    found, _ = attack(scheme, views(scheme), activations)
    embedding = random_checkpoint(WIDE, "float32", 1).tensors["model.embed_tokens.weight"].read()
    tokens = (distinguishers.ranks(found[0]) @ distinguishers.ranks(embedding).T).argmax(axis=1).tolist()
    right = prompts(WIDE)[1]
    if scheme == "permuted":
        assert sorted(tokens) == sorted(right)
    else:
        assert tokens == right[-len(tokens) :]


@pytest.mark.parametrize("scheme", WRONG)
def test_the_same_attack_recovers_nothing_that_pads_hide(views, activations, scheme):
    found, truth = attack(scheme, views("masked"), activations)
    correlation, p = likeness(scheme, found, truth)
    assert p > ALARM
    # Of 9 x 12 rows of 2,048 numbers or so the mean has a standard deviation of 0.002 to 0.003; matching rows in any
    # order adds the largest of sixteen, 1.8 standard deviations of one row.
    assert abs(correlation) < (0.1 if scheme == "permuted" else 0.02)


def test_p_values_are_what_they_say():
    rng = np.random.default_rng(0)
    found: dict[str, list[float]] = {}
    for _ in range(300):
        forwards = rng.integers(-(2**31), 2**31, (3, 2, 16, 128)).astype(np.int32)
        correlations = distinguishers.serial_correlations(forwards)
        p_values = {name: distinguishers.two_sided(z) for name, z in correlations.items()}
        for name, p in {**p_values, "bytes": distinguishers.byte_chi_square(forwards)}.items():
            found.setdefault(name, []).append(p)
    for name, p in found.items():
        # 30 are expected, with a standard deviation of 5.2; the numbers are always the same ones.
        assert 10 < sum(np.array(p) < 0.1) < 50, name
