"""What a server must bear: abandoned streams, floods, and company, through a real port on the real model."""

from __future__ import annotations

import asyncio
import collections
import json
import time

import httpx
import pytest
from serving import MODEL, app_of, on_a_port, settle

from fusedllm.engine.config import EngineConfig
from fusedllm.llm import load

TEXT = "/v1/completions"
GREEDY = {"model": MODEL, "temperature": 0}


def together(url, work, count):
    """The results of `work(client, index)` for every index, all at once."""

    async def run():
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
            return await asyncio.gather(*(work(client, index) for index in range(count)))

    return asyncio.run(run())


@pytest.mark.slow
def test_two_hundred_abandoned_streams_leave_nothing_behind(served_llm):
    async def abandon(client, index):
        body = {**GREEDY, "prompt": f"{index} bottles", "max_tokens": 400, "stream": True, "ignore_eos": True}
        async with client.stream("POST", TEXT, json=body) as response:
            if response.status_code == 200:
                async for _ in response.aiter_lines():
                    break
            return response.status_code

    with on_a_port(app_of(served_llm, max_queue=64)) as url:
        for _ in range(4):
            assert set(together(url, abandon, 50)) <= {200, 503}
        started = time.monotonic()
        answer = httpx.post(url + TEXT, json={**GREEDY, "prompt": "One, two,", "max_tokens": 8}, timeout=30)
        assert answer.status_code == 200
        assert time.monotonic() - started < 5
        settle(lambda: served_llm.engine.stats().pages_in_use == 0)
        stats = served_llm.engine.stats()
        assert (stats.num_running, stats.num_waiting) == (0, 0)


@pytest.mark.slow
def test_of_two_thousand_at_once_those_beyond_the_queue_hear_so(served_llm):
    async def one(client, index):
        body = {**GREEDY, "prompt": [5, 6, index + 7], "max_tokens": 2}
        return await client.post(TEXT, content=json.dumps(body), headers={"content-type": "application/json"})

    served_llm.engine.stop()
    served_llm.engine.start(max_queue=64)
    try:
        with on_a_port(app_of(served_llm, max_queue=64)) as url:
            answers = together(url, one, 2000)
    finally:
        served_llm.engine.stop()
        served_llm.engine.start()
    counts = collections.Counter(answer.status_code for answer in answers)
    assert set(counts) == {200, 503}
    # The queue and four seats at least; who came when one of them had been answered took its place.
    assert counts[200] >= 68
    refused = next(answer for answer in answers if answer.status_code == 503)
    assert int(refused.headers["retry-after"]) > 0
    assert "wait already" in refused.json()["error"]["message"]


@pytest.mark.slow
def test_a_text_is_the_same_alone_and_among_sixteen_with_cancels_and_preemptions():
    # So few pages that not all of them fit at once.
    shapes = EngineConfig(
        max_context=256, cache_tokens=640, prefill_buckets=(16, 64), batch_buckets=(1, 2, 4, 8, 16), decode_steps=8
    )
    llm = load("smollm2-135m", dtype="float32", engine=shapes)
    prompts = [f"Here is a list of {index + 3} things about the number {index}:" for index in range(17)]
    alone = [answer.text for answer in llm.generate(prompts, max_tokens=60)]
    alone = [llm.generate([prompt], max_tokens=60)[0].text for prompt in prompts[:4]] + alone[4:]

    async def one(client, index):
        body = {**GREEDY, "prompt": prompts[index], "max_tokens": 60, "stream": True}
        text = ""
        async with client.stream("POST", TEXT, json=body) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                    if index % 5 == 4 and text:
                        return None
        return text

    llm.engine.start()
    try:
        with on_a_port(app_of(llm)) as url:
            texts = together(url, one, len(prompts))
        for index, text in enumerate(texts):
            assert text == (None if index % 5 == 4 else alone[index])
        settle(lambda: llm.engine.stats().pages_in_use == 0)
        assert llm.engine.stats().preemptions > 0
    finally:
        llm.engine.stop()
