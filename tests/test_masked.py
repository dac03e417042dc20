"""Masked and verified products under the whole engine: the same bits, pads used once, wrong products refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from conftest import TINY, TINY_ENGINE

from fusedllm.engine.config import EngineConfig
from fusedllm.errors import IntegrityError, PolicyError
from fusedllm.llm import LLM, load
from fusedllm.quantizing import quantize_file
from fusedllm.weights.random import random_params

POLICIES = ("verify", "masked", "masked+verify")


def under(w8a8, policy, **shapes) -> LLM:
    return load(w8a8, policy=policy, engine=dataclasses.replace(TINY_ENGINE, **shapes))


@pytest.fixture(scope="module")
def models(w8a8):
    made = {policy: under(w8a8, policy) for policy in POLICIES}
    yield made
    for llm in made.values():
        boundary_of(llm).close()


def boundary_of(llm):
    return llm._applied.placement.boundary


def prompts(llm):
    rng = np.random.default_rng(4)
    return [rng.integers(3, llm.config.vocab_size, length).tolist() for length in (1, 16, 37)]


def test_every_policy_gives_the_same_bits(models):
    for prompt in prompts(models["verify"]):
        unmasked = models["verify"].logits(prompt)
        for policy in ("masked", "masked+verify"):
            np.testing.assert_array_equal(models[policy].logits(prompt), unmasked)


def test_and_they_are_those_of_the_one_fused_program(models, w8a8):
    """Up to what XLA makes of float32 sums that it fuses in one program and not in several."""
    plain = load(w8a8, engine=TINY_ENGINE)
    for prompt in prompts(plain):
        np.testing.assert_allclose(models["masked"].logits(prompt), plain.logits(prompt), atol=1e-5)


def test_a_trained_model_is_bit_for_bit_the_same_hidden_or_not(tmp_path_factory):
    path = tmp_path_factory.mktemp("smollm2") / "w8a8.arrow"
    quantize_file("smollm2-135m", path, "w8a8")
    shapes = EngineConfig(max_context=128, cache_tokens=512, prefill_buckets=(16, 64), batch_buckets=(1, 2))
    plain, masked = (load(path, policy=policy, engine=shapes) for policy in ("plain", "masked"))
    ids = plain.encode("The trust boundary of a computer is where")
    np.testing.assert_array_equal(masked.logits(ids), plain.logits(ids))
    for parameters in ({}, {"temperature": 0.8, "seed": 11}):
        texts = [
            [answer.text for answer in llm.generate([ids, ids[:5]], max_tokens=12, ignore_eos=True, **parameters)]
            for llm in (plain, masked)
        ]
        assert texts[0] == texts[1]
    masked.close()


def test_and_the_same_text_in_company(models):
    def answers(policy, **parameters):
        asked = prompts(models[policy])
        return [a.token_ids for a in models[policy].generate(asked, max_tokens=10, ignore_eos=True, **parameters)]

    for parameters in ({}, {"temperature": 0.9, "seed": 5}):
        expected = answers("verify", **parameters)
        assert answers("masked", **parameters) == answers("masked+verify", **parameters) == expected


def test_the_same_prompt_never_looks_the_same_twice(models, monkeypatch):
    boundary = boundary_of(models["masked"])
    sent: list[list[np.ndarray]] = []
    exchange = boundary.link.exchange

    def seen(placed, numbers):
        sent[-1].append(numbers.copy())
        return exchange(placed, numbers)

    monkeypatch.setattr(boundary.link, "exchange", seen)
    for _ in range(2):
        sent.append([])
        models["masked"].logits(prompts(models["masked"])[2])
    first, second = (np.concatenate([part.ravel() for part in parts]) for parts in sent)
    assert first.shape == second.shape
    assert (first == second).mean() < 1e-3
    # 256 values a byte; the statistic has a mean of 255 and a standard deviation of 23, and is below 400 but for one
    # time in ten million.
    for numbers in (first, second, first - second):
        counts = np.bincount(numbers.view(np.uint8), minlength=256)
        expected = counts.sum() / 256
        assert ((counts - expected) ** 2 / expected).sum() < 400


def test_every_row_of_pads_is_burned_sent_and_wiped_once(models):
    llm = models["masked"]
    pool = boundary_of(llm).pool
    names = {supply.name for supply in pool._supplies.values()}
    before = {name: pool.ledger.counts(pool.session, name) for name in names}
    llm.generate([prompts(llm)[0]], max_tokens=5, ignore_eos=True)
    for name in names:
        burned, sent, wiped = np.subtract(pool.ledger.counts(pool.session, name), before[name])
        assert burned == sent == wiped > 0


@pytest.mark.parametrize("policy", ["verify", "masked+verify"])
def test_a_wrong_product_ends_the_request_and_the_next_one_is_answered(models, monkeypatch, policy):
    llm = models[policy]
    boundary = boundary_of(llm)
    prompt = prompts(llm)[1]
    expected = llm.generate([prompt], max_tokens=4, ignore_eos=True)[0].token_ids
    exchange = boundary.link.exchange

    def tampered(placed, numbers):
        (received,) = exchange(placed, numbers)
        received = received.copy()
        if placed.site.name == "down":
            received[-1, -1] += 1
        return (received,)

    with monkeypatch.context() as patch:
        patch.setattr(boundary.link, "exchange", tampered)
        with pytest.raises(IntegrityError, match="down of layer 0"):
            llm.generate([prompt], max_tokens=4)
    assert llm.generate([prompt], max_tokens=4, ignore_eos=True)[0].token_ids == expected


def test_weights_of_other_schemes_are_refused_with_what_to_do():
    with pytest.raises(PolicyError, match=r"qkv of layer 0|head.*--scheme w8a8"):
        LLM(TINY, random_params(TINY, "float32", seed=1), engine=TINY_ENGINE, policy="masked")


def test_crossings_are_counted_as_those_of_split_are(models):
    llm = models["masked"]
    before = {name: dataclasses.replace(found) for name, found in llm.boundary.sites.items()}
    llm.generate([prompts(llm)[0]], max_tokens=3, ignore_eos=True)
    layers = llm.config.num_layers
    counts = {name: found.count - before[name].count for name, found in llm.boundary.sites.items()}
    assert counts == {"qkv": 3 * layers, "o": 3 * layers, "gate_up": 3 * layers, "down": 3 * layers, "head": 3}
