"""Policies over one and the same layer: equal answers, and exactly the crossings that they declare."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import TINY, TINY_ENGINE
from test_engine import ids

from fusedllm.cli.options import POLICIES as CLI_POLICIES
from fusedllm.errors import PolicyError
from fusedllm.llm import LLM, load
from fusedllm.partition.hosted import PRODUCTS
from fusedllm.partition.ledger import Ledger
from fusedllm.partition.link import Placed
from fusedllm.partition.policies import NO_CLAIM, POLICIES, find
from fusedllm.weights.random import random_params


def under(policy, **changes) -> LLM:
    config = dataclasses.replace(TINY, **changes)
    return LLM(config, random_params(config, "float32", seed=1), engine=TINY_ENGINE, policy=policy)


@pytest.fixture(scope="module")
def split() -> LLM:
    return under("split")


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False}, {"attention_bias": True, "qk_norm": True}])
def test_split_computes_what_plain_does(changes):
    prompt = ids(37)
    # The same kernels in programs that XLA fuses otherwise.
    np.testing.assert_allclose(
        under("split", **changes).logits(prompt), under("plain", **changes).logits(prompt), atol=1e-4
    )


def test_split_answers_as_plain_does_in_company(split, tiny_llm):
    prompts = [ids(length, seed=length) for length in (1, 16, 40, 5, 70)]
    for parameters in ({}, {"temperature": 0.8, "seed": 3, "top_p": 0.9}, {"repetition_penalty": 1.3, "logprobs": 2}):
        expected = tiny_llm.generate(prompts, max_tokens=12, ignore_eos=True, **parameters)
        found = split.generate(prompts, max_tokens=12, ignore_eos=True, **parameters)
        assert [answer.token_ids for answer in found] == [answer.token_ids for answer in expected]


@pytest.mark.parametrize("tokens", [1, 16])
def test_four_crossings_a_layer_and_one_for_the_head(tokens):
    llm = under("split")
    llm.generate([ids(tokens)], max_tokens=4, ignore_eos=True)
    sites = llm.boundary.sites
    # A prefill and three steps of decoding; the head draws four times.
    assert {name: crossings.count for name, crossings in sites.items()} == {
        "qkv": 4 * TINY.num_layers, "o": 4 * TINY.num_layers, "gate_up": 4 * TINY.num_layers,
        "down": 4 * TINY.num_layers, "head": 4,
    }  # fmt: skip
    assert llm.boundary.total().count == 4 * (4 * TINY.num_layers + 1)
    # One row of the hidden state went there each time, one of the vocabulary came back, in float32.
    assert sites["head"].bytes_to_device == 4 * 4 * TINY.hidden_size
    assert sites["head"].bytes_to_host == 4 * 4 * TINY.vocab_size


def test_only_the_matrices_of_the_products_are_on_the_device(split):
    trusted, device = jax.devices("cpu")
    params = split.engine.runner._params
    for layer in params.layers:
        for field in dataclasses.fields(layer):
            value = getattr(layer, field.name)
            if isinstance(value, Placed):
                assert all(weight.devices() == {device} for weight in value.weights), field.name
                assert len(value.weights) == len(PRODUCTS[value.site.name])
            elif value is not None:
                assert value.ndim < 2
                assert value.devices() == {trusted}, field.name
    assert params.head.weights[0].devices() == {device}
    assert params.embedding.devices() == params.final_norm.devices() == {trusted}
    assert jax.tree.leaves(split.engine.runner._cache)[0].devices() == {trusted}


def test_a_policy_says_what_it_does_not_claim(split, tiny_llm):
    assert NO_CLAIM in split.boundary_report()
    assert NO_CLAIM in tiny_llm.boundary_report()
    assert "in the clear" in split.boundary_report()
    assert tiny_llm.boundary.total().count == 0
    for name, policy in POLICIES.items():
        assert (NO_CLAIM in policy.claim) == (name in ("plain", "split", "verify"))
    assert set(CLI_POLICIES) == set(POLICIES)


def test_trusted_answers_as_plain_does(tiny_llm):
    found = under("trusted").generate([ids(9)], max_tokens=8, ignore_eos=True)
    assert found[0].token_ids == tiny_llm.generate([ids(9)], max_tokens=8, ignore_eos=True)[0].token_ids


def test_beside_an_accelerator_the_trusted_side_chooses_what_its_cpu_has(monkeypatch, w8a8):
    """Without an accelerator the default backend's name is all of it that there is."""
    prompt = list(range(3, 20))

    def answers(policy):
        llm = load(w8a8, policy=policy, engine=TINY_ENGINE)
        tokens = llm.generate([prompt], max_tokens=5, ignore_eos=True)[0].token_ids
        llm.close()
        return tokens

    names = [name for name in POLICIES if name != "plain"]
    expected = [answers(name) for name in names]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert [answers(name) for name in names] == expected


@pytest.mark.parametrize("name", [name for name, policy in POLICIES.items() if policy.platform])
def test_nothing_of_the_trusted_side_goes_to_the_default_device(w8a8, name):
    """As where the default backend is an accelerator: the second device of the CPU is the default one here."""
    trusted, device = jax.devices("cpu")
    with jax.default_device(device):
        llm = load(w8a8, policy=name, engine=TINY_ENGINE)
        prompts = [list(range(3, 20)), [5, 9]]
        made = llm.generate(
            prompts, max_tokens=6, ignore_eos=True, temperature=0.7, seed=1, repetition_penalty=1.3,
            presence_penalty=0.2, logprobs=2, logit_bias={7: -3.0},
        )  # fmt: skip
        assert [len(answer.token_ids) for answer in made] == [6, 6]
        assert np.isfinite(llm.logits(prompts[0])).all()
        runner = llm.engine.runner
        kept = (runner._cache, runner._seats, runner._no_token, runner._no_count, runner._all_allowed)
        params = dataclasses.replace(runner._params, head=None) if llm.policy.crosses else runner._params
        weights = [leaf for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array) and leaf.ndim < 2]
        assert {place for array in [*jax.tree.leaves(kept), *weights] for place in array.devices()} == {trusted}
        llm.close()


def test_an_unknown_policy_is_refused_by_name():
    with pytest.raises(PolicyError, match="no policy 'secret'; known are plain, split, masked, verify"):
        find("secret")


def test_without_a_second_device_it_is_said_how_to_get_one():
    code = (
        "from fusedllm.partition.policies import devices\n"
        "from fusedllm.errors import PolicyError\n"
        "try:\n    devices('split')\nexcept PolicyError as error:\n    print(error)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={"JAX_PLATFORMS": "cpu", "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "set XLA_FLAGS=--xla_force_host_platform_device_count=2" in found.stdout


def test_a_crossing_that_fails_counts_as_its_bytes_may_have_left():
    ledger = Ledger()

    def fails():
        with ledger.crossing("down") as crossing:
            crossing.bytes_to_device = 7
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fails()
    assert ledger.total().count == 1
    assert ledger.total().bytes_to_device == 7
    with ledger.crossing("o") as crossing:
        crossing.bytes_to_device, crossing.bytes_to_host = 3_000_000, 1_000_000
    assert "o                     1         3.000       1.000" in ledger.table()
