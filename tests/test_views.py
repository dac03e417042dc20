"""The declared view of each policy holds: in the programs of the device, in what XLA made of them, and at run time."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, TINY_ENGINE
from test_masked import boundary_of

from fusedllm.engine.runner import orders
from fusedllm.errors import BoundaryError
from fusedllm.kernels.ring_linear import ring_linear
from fusedllm.llm import LLM, load
from fusedllm.model.placement import Site
from fusedllm.partition.hosted import Hosted
from fusedllm.partition.link import Driven
from fusedllm.partition.policies import POLICIES
from fusedllm.partition.views import DeviceProgram, Label, check_compiled, leaks, view
from fusedllm.weights.random import random_params

TRUSTED, DEVICE = jax.devices("cpu")[:2]
PROMPT = [5, 9, 3, 44, 17, 8]


@pytest.fixture(scope="module")
def models(w8a8):
    made = {name: load(w8a8, policy=name, engine=TINY_ENGINE) for name in POLICIES}
    yield made
    for llm in made.values():
        if llm.policy.crosses:
            boundary_of(llm).close()


def of_the_engine(llm: LLM) -> list[DeviceProgram]:
    """The programs of an engine all of which run on one device, with what their operands are."""
    runner = llm.engine.runner
    ids, start, table = np.zeros((1, 32), np.int32), np.zeros(1, np.int32), runner._table(())
    chunk = (runner._params, runner._cache, ids, start, table)
    labels = (Label.WEIGHTS, Label.KV_CACHE, Label.PROMPT, Label.LENGTHS, Label.LENGTHS)
    hidden, _ = runner._prefill.trace(*chunk, np.int32(0)).out_info
    seats = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype), runner._seats)
    # The frequencies of the rotary embedding are part of a program.
    named = functools.partial(DeviceProgram, device=runner._params.final_norm.device, captured=Label.WEIGHTS)
    return [
        named("prefill", runner._prefill, (*chunk, np.int32(0)), (*labels, Label.LENGTHS)),
        named("logits", runner._logits, chunk, labels),
        named("score", runner._score, (*chunk, ids[0]), (*labels, Label.PROMPT)),
        named(
            "admission", runner._admit,
            (runner._head, runner._seats, np.int32(0), seats, hidden, runner._all_allowed[1]),
            (Label.WEIGHTS, Label.OUTPUT, Label.LENGTHS, Label.OUTPUT, Label.ACTIVATIONS, Label.OUTPUT),
        ),
        named(
            "decode", runner._decode,
            (runner._params, runner._cache, runner._seats, orders(runner.engine, [], 1), np.int32(1),
             runner._all_allowed[1]),
            (Label.WEIGHTS, Label.KV_CACHE, Label.OUTPUT, Label.LENGTHS, Label.LENGTHS, Label.OUTPUT),
        ),
    ]  # fmt: skip


@pytest.mark.parametrize("name", [name for name, policy in POLICIES.items() if policy.crosses])
@pytest.mark.parametrize("rows", [1, 32])
def test_the_device_sees_what_the_policy_declares(models, name, rows):
    programs = boundary_of(models[name]).programs(rows, np.float32)
    assert len(programs) == 4 * models[name].config.num_layers + 1
    assert view(programs) == POLICIES[name].leaks


@pytest.mark.parametrize("crossing", ["callback", "ffi"])
@pytest.mark.parametrize("name", ["split", "masked"])
def test_a_program_that_asks_for_its_operands_sees_no_more(w8a8, name, crossing):
    llm = load(w8a8, policy=name, engine=TINY_ENGINE, crossing=crossing)
    programs = boundary_of(llm).programs(4, np.float32)
    assert len(programs) == 3
    assert view(programs) == POLICIES[name].leaks
    llm.close()


def test_plain_shows_everything(models):
    programs = of_the_engine(models["plain"])
    found = frozenset(label for program in programs for label in leaks(program))
    assert found == POLICIES["plain"].leaks
    assert {name for name, policy in POLICIES.items() if Label.PROMPT in policy.leaks} == {"plain"}


def test_trusted_has_no_program_on_the_device(models):
    """Every array that an answer needs is on the CPU, so that nothing can run elsewhere."""
    runner = models["trusted"].engine.runner
    arrays = jax.tree.leaves((runner._params, runner._cache, runner._seats))
    assert {device for array in arrays for device in array.devices()} == {TRUSTED}
    assert all(device == TRUSTED for program in of_the_engine(models["trusted"]) for device in [program.device])
    assert POLICIES["trusted"].leaks == frozenset()


# --- Broken policies, and what finds them. ---


def broken(product, weights=1) -> list[DeviceProgram]:
    link = Driven(DEVICE, product)
    link.place(Site("qkv", 0), tuple(np.ones((24, 16), np.int8) for _ in range(weights)))
    return link.programs(2, np.int32, Label.MASKED)


def test_a_program_that_has_captured_an_activation_is_found():
    secret = jnp.arange(16.0)
    programs = broken(lambda x, w: (ring_linear(x, w), secret * 2))
    assert view(programs) == {Label.UNDECLARED}


def test_a_program_that_calls_the_host_is_found():
    def chatty(x, w):
        jax.debug.callback(lambda x: None, x)
        return (ring_linear(x, w),)

    assert view(broken(chatty)) == {Label.UNDECLARED}


def test_an_operand_that_nobody_declared_is_found_in_the_compiled_program():
    there = jax.sharding.SingleDeviceSharding(DEVICE)
    launch = jax.jit(lambda x, w, scales: ring_linear(x, w) * scales, in_shardings=there)
    x, w = jax.ShapeDtypeStruct((2, 16), np.int32), jax.ShapeDtypeStruct((24, 16), np.int8)
    scales = jax.ShapeDtypeStruct((24,), np.float32)

    class Hiding:
        """Says that it takes two operands, and takes three."""

        def trace(self, *operands):
            return jax.jit(ring_linear).trace(*operands)

        def lower(self, *operands):
            return launch.lower(*operands, scales)

    program = DeviceProgram("a product", Hiding(), (x, w), (Label.MASKED, Label.WEIGHTS), DEVICE)
    with pytest.raises(BoundaryError, match=r"parameter 2 is f32\[24\], which nobody declared"):
        check_compiled(program)


def test_a_program_on_another_device_than_it_says_is_found():
    (program,) = broken(lambda x, w: (ring_linear(x, w),))
    elsewhere = DeviceProgram(program.name, program.function, program.operands, program.labels, TRUSTED)
    with pytest.raises(BoundaryError, match="is said to run on"):
        check_compiled(elsewhere)


class SendsTheEmbedding(Hosted):
    """Runs the embedding where the products run: token ids go there, as they did in this project's predecessor."""

    def protected(self, site, function, *operands, **static):
        if site.name == "embedding":
            operands = tuple(jax.device_put(operand, DEVICE) for operand in operands)
            return jax.device_put(jax.jit(functools.partial(function, **static))(*operands), TRUSTED)
        return super().protected(site, function, *operands, **static)


class SendsTheHead(Hosted):
    """Multiplies with the vocabulary on the device, past the boundary."""

    def linear(self, site, x, weights):
        if site.name == "head":
            return (jax.device_put(x, DEVICE) @ jnp.zeros((x.shape[-1], TINY.vocab_size)),)
        return super().linear(site, x, weights)


class NormsThere(Hosted):
    """Hands the device what the trusted side holds in NumPy's memory."""

    def protected(self, site, function, *operands, **static):
        if site.name == "final_norm":
            with jax.default_device(DEVICE):
                return jax.jit(functools.partial(function, **static))(*jax.tree.map(np.asarray, operands))
        return super().protected(site, function, *operands, **static)


@pytest.mark.parametrize("kind", [SendsTheEmbedding, SendsTheHead, NormsThere])
def test_a_policy_that_sends_anything_past_the_boundary_fails_at_run_time(kind):
    llm = LLM(TINY, random_params(TINY, "float32", seed=1), engine=TINY_ENGINE, policy="split")
    llm._applied.placement.__class__ = kind
    with pytest.raises(Exception, match=r"Disallowed (host|device)-to-device transfer"):
        llm.logits(PROMPT)
    llm._applied.placement.__class__ = Hosted
    assert np.isfinite(llm.logits(PROMPT)).all()
