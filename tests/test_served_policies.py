"""Every policy under the whole server: warmed up, nothing compiles; what crosses is in `/metrics`."""

from __future__ import annotations

import httpx
import numpy as np
import pytest
from conftest import TINY_ENGINE
from test_operations_metrics import samples

from fusedllm.engine.compile_guard import forbid_compile
from fusedllm.llm import LLM, load
from fusedllm.partition.policies import POLICIES
from fusedllm.serve.server import run
from fusedllm.serve.settings import ServerSettings


@pytest.fixture(params=list(POLICIES))
def llm(request, w8a8) -> LLM:
    made = load(w8a8, policy=request.param, engine=TINY_ENGINE)
    yield made
    made.close()


def test_nothing_compiles_after_warm_up(llm):
    llm.warm_up()
    rng = np.random.default_rng(9)
    with forbid_compile():
        for _ in range(4):
            prompts = [rng.integers(3, llm.config.vocab_size, length).tolist() for length in rng.integers(1, 90, 6)]
            llm.generate(prompts, max_tokens=6, temperature=0.7, repetition_penalty=1.2, top_p=0.9, logprobs=2)


def test_a_server_answers_and_tells_what_crossed(llm):
    policy = llm.policy
    settings = ServerSettings(port=0, model_name="tiny")
    with run(llm, settings, block=False) as server, httpx.Client(base_url=server.url) as client:
        body = {"model": "tiny", "prompt": [5, 9, 3, 44], "max_tokens": 6, "temperature": 0, "ignore_eos": True}
        first, second = (client.post("/v1/completions", json=body, timeout=60).json() for _ in range(2))
        found = samples(client.get("/metrics").text)
    assert first["usage"]["completion_tokens"] == 6
    assert first["choices"] == second["choices"]
    assert found[("compiles_after_ready_total",)] == 0
    crossed = {key[2]: value for key, value in found.items() if key[0] == "boundary_crossings_total"}
    assert set(crossed) == ({"qkv", "o", "gate_up", "down", "head"} if policy.crosses else set())
    assert (found[("pad_rows_total",)] > 0) == ("masked" in policy.name)
