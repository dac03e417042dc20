"""Decode programs without branches (`EngineConfig.free_steps`): the same tokens, and nobody is asked for the way."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import TINY, TINY_ENGINE

from fusedllm.config import Sampler, SamplingParams
from fusedllm.engine.compile_guard import forbid_compile
from fusedllm.engine.flights import Flights
from fusedllm.engine.request import Sequence
from fusedllm.engine.scheduler import DecodeRow, Job, Plan
from fusedllm.engine.slots import NO_TOKEN
from fusedllm.llm import LLM
from fusedllm.weights.random import random_params


def ids(length, seed=0):
    return np.random.default_rng(seed).integers(3, TINY.vocab_size, length).tolist()


@pytest.mark.parametrize("steps", [2, 4])
def test_programs_without_branches_make_the_same_tokens(tiny_llm, steps):
    free = LLM(TINY, random_params(TINY, "float32", seed=1), engine=dataclasses.replace(TINY_ENGINE, free_steps=steps))
    for llm in (tiny_llm, free):
        llm.warm_up()
    launched = spy_on_samplers(free)
    with forbid_compile():
        for keywords, sampler in (
            ({}, Sampler.UNFILTERED),
            ({"temperature": 0.9}, Sampler.UNFILTERED),
            ({"temperature": 0.9, "top_p": 0.8}, Sampler.FILTERED),
            ({"temperature": 0.9, "top_k": 3, "frequency_penalty": 1.0}, Sampler.FULL),
            ({"logprobs": 2}, Sampler.FULL),
        ):
            # Budgets that end in the midst of a turn of the loop, rows that go on while others have ended.
            prompts = [ids(length, seed=length) for length in (1, 16, 17, 40, 5)]
            parameters = [SamplingParams(seed=3, max_tokens=many, **keywords) for many in (1, 2, 5, 9, 30)]
            wanted, found = (run_together(llm, prompts, parameters) for llm in (tiny_llm, free))
            assert [answer.token_ids for answer in found] == [answer.token_ids for answer in wanted]
            assert [answer.logprobs for answer in found] == [answer.logprobs for answer in wanted]
            assert max(launched) is sampler
            launched.clear()


class Clocked(SimpleNamespace):
    """A runner whose programs take a second a step, on a clock of its own."""

    def decode(self, orders, steps, allowed, sampler):
        made = np.full((self.engine.decode_steps, 1), NO_TOKEN)
        made[:1] = 5
        together = self.engine.free_steps if sampler < Sampler.FULL else 1
        self.now += -(-1 // together) * together
        return made

    def fetch(self, outputs, logprobs):
        return outputs, None


@pytest.mark.parametrize("sampler", Sampler)
def test_the_time_of_a_step_counts_those_that_made_no_token(sampler, monkeypatch):
    """A request that ends within steps that are made together does not make a step slower than it is."""
    config = dataclasses.replace(TINY_ENGINE, free_steps=4, latency_seconds=3.0, decode_steps=8)
    runner = Clocked(engine=config, lockstep=False, now=time.perf_counter())
    monkeypatch.setattr("time.perf_counter", lambda: runner.now)
    flights = Flights(runner, SimpleNamespace(accept=lambda *arguments: None), None)
    job = Job(Sequence((1,), SamplingParams(), frozenset(), budget=9, seed=0), [1], (0.0, 0))
    job.seat = 0
    for _ in range(2):
        flights.launch(Plan((DecodeRow(job, 0, ()),), 4, (), sampler))
        flights.read()
    assert flights.steps == 3
    # Of the three seconds the steps take four, which leaves the chunk the least that there is.
    assert flights.budget == config.prefill_buckets[0]


def run_together(llm, prompts, parameters):
    streams = [llm.stream(prompt, own) for prompt, own in zip(prompts, parameters, strict=True)]
    # The first one's pieces drive all of them.
    return [(list(stream), stream.result)[1] for stream in streams]


def spy_on_samplers(llm):
    """The sampler of each decode launch, in a list that grows."""
    launched, decode = [], llm.engine.runner.decode

    def spied(orders, steps, allowed=None, sampler=Sampler.FULL):
        launched.append(sampler)
        assert sampler is Sampler.FULL or steps % llm.engine.config.free_steps == 0
        return decode(orders, steps, allowed, sampler)

    llm.engine.runner.decode = spied
    return launched


def test_programs_without_branches_ask_the_host_for_nothing():
    """Neither a branch nor, but for the look at whether it goes on, a loop whose length is not known."""
    engine = dataclasses.replace(TINY_ENGINE, free_steps=2)
    llm = LLM(TINY, random_params(TINY, "float32", seed=1), engine=engine, implementation="xla")
    asked = {
        sampler: branches(llm.engine.runner.trace_decode(1, sampler).jaxpr.jaxpr)
        for sampler in (Sampler.UNFILTERED, Sampler.FILTERED, Sampler.FULL)
    }
    # The decode loop; attention's loops over pages, for which a GPU has kernels.
    assert asked[Sampler.UNFILTERED] == {"while": 1 + TINY.num_layers}
    # Where the candidates do not decide, the whole row does, by two bisections.
    assert asked[Sampler.FILTERED] == {"while": 1 + TINY.num_layers + 2, "cond": 1}
    assert asked[Sampler.FULL]["cond"] > 1


def branches(jaxpr):
    """How often a program asks which way to go, by primitive."""
    found = Counter()
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("cond", "while"):
            found[equation.primitive.name] += 1
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    found += branches(inner)
    return found
