"""The engine in a thread of its own: submit, cancel, deadlines, a full queue, failures, grammars, and company."""

from __future__ import annotations

import queue
import threading
import time

import numpy as np
import pytest
from conftest import TINY, TINY_ENGINE
from serving import settle

from fusedllm.config import Sampler, SamplingParams
from fusedllm.engine.compile_guard import forbid_compile
from fusedllm.engine.config import EngineConfig
from fusedllm.engine.engine import Engine
from fusedllm.errors import EngineStoppedError, QueueFullError, RequestError
from fusedllm.llm import LLM
from fusedllm.weights.random import random_params

# So long that a machine which does other things too is not taken for a hang.
PATIENCE = 60


def ids(length, seed=0):
    return np.random.default_rng(seed).integers(3, TINY.vocab_size, length).tolist()


def make(**engine) -> LLM:
    sizes = {"max_context": 128, "cache_tokens": 512, "prefill_buckets": (16, 32), "decode_steps": 4} | engine
    return LLM(TINY, random_params(TINY, "float32", seed=1), engine=EngineConfig(**sizes))


@pytest.fixture
def llm():
    llm = make()
    llm.engine.start(max_queue=4)
    yield llm
    llm.engine.stop()


class Client:
    """Submits a request and collects what comes back."""

    def __init__(self, engine: Engine, prompt, *, sampling=None, **options) -> None:
        sampling = sampling or SamplingParams(max_tokens=options.pop("max_tokens", 20), ignore_eos=True)
        self.sequence = engine.prepare(prompt, sampling, **options)
        self.chunks: queue.Queue = queue.Queue()
        engine.submit(self.sequence, self.chunks.put)

    def next(self):
        return self.chunks.get(timeout=PATIENCE)

    def all(self):
        chunks = [self.next()]
        while chunks[-1].finish_reason is None:
            chunks.append(self.next())
        return chunks

    def tokens(self) -> tuple[int, ...]:
        return tuple(token for chunk in self.all() for token in chunk.tokens)


def test_requests_from_many_threads_all_get_what_they_would_get_alone(tiny_llm):
    llm = make()
    prompts = [ids(3 + seed, seed) for seed in range(12)]
    alone = [answer.token_ids for answer in tiny_llm.generate(prompts, max_tokens=20, ignore_eos=True)]
    llm.engine.start()
    got = {}

    def ask(index):
        got[index] = Client(llm.engine, prompts[index]).tokens()

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert [got[index] for index in range(12)] == alone
    # The notebook's face goes on beside the thread.
    assert llm.generate([prompts[3]], max_tokens=20, ignore_eos=True)[0].token_ids == alone[3]
    stats = llm.engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.pages_in_use) == (0, 0, 0)
    assert stats.finished == {"length": 13}
    assert stats.generated_tokens == 13 * 20
    llm.engine.stop()


def test_a_cancelled_request_frees_its_pages_and_hears_nothing_more(llm):
    client = Client(llm.engine, ids(9), max_tokens=110)
    client.next()
    llm.engine.cancel(client.sequence)
    settle(lambda: llm.engine.stats().pages_in_use == 0)
    while not client.chunks.empty():
        client.chunks.get()
    Client(llm.engine, ids(5)).all()
    assert client.chunks.empty()
    assert client.sequence.finish_reason == "cancelled"


def test_a_deadline_ends_a_request_and_says_so(llm):
    late = Client(llm.engine, ids(9), deadline=time.perf_counter() - 1)
    assert [(chunk.tokens, chunk.finish_reason) for chunk in late.all()] == [((), "deadline")]
    assert llm.engine.stats().finished["deadline"] == 1


def test_a_full_queue_is_refused_at_once_and_the_others_are_answered(llm):
    accepted: list[Client] = []

    def flood():
        for seed in range(60):
            accepted.append(Client(llm.engine, ids(4, seed), max_tokens=60))

    with pytest.raises(QueueFullError, match="4 may"):
        flood()
    # Eight seats, four who wait, and those who were done meanwhile.
    assert len(accepted) >= 12
    assert all(len(client.tokens()) == 60 for client in accepted)


def test_a_failed_step_ends_those_who_were_part_of_it_and_the_engine_goes_on(llm, monkeypatch, caplog):
    runner = llm.engine.runner
    before = Client(llm.engine, ids(5)).tokens()
    decode = runner._decode[Sampler.FULL]

    def fails(*arguments):
        monkeypatch.setitem(runner._decode, Sampler.FULL, decode)
        raise RuntimeError("a fault of the device")

    monkeypatch.setitem(runner._decode, Sampler.FULL, fails)
    (*_, last) = Client(llm.engine, ids(5)).all()
    assert last.finish_reason == "error"
    assert Client(llm.engine, ids(5)).tokens() == before
    assert "a fault of the device" in caplog.text
    assert llm.engine.stats().failed_steps == 1
    assert llm.engine.alive


def test_an_engine_whose_memory_can_not_be_made_anew_says_that_it_is_dead(monkeypatch, caplog):
    llm = make()
    llm.engine.start()

    def fails(*arguments):
        raise RuntimeError("a fault of the device")

    monkeypatch.setattr(llm.engine.runner, "_prefill", fails)
    monkeypatch.setattr(llm.engine.runner, "recover", fails)
    (*_, last) = Client(llm.engine, ids(5)).all()
    assert last.finish_reason == "error"
    settle(lambda: not llm.engine.alive)
    with pytest.raises(EngineStoppedError):
        Client(llm.engine, ids(5))


def test_stopping_ends_what_is_in_flight_and_refuses_what_comes(llm):
    clients = [Client(llm.engine, ids(5, seed), max_tokens=100) for seed in range(10)]
    clients[0].next()
    llm.engine.stop()
    assert {client.all()[-1].finish_reason for client in clients} <= {"cancelled", "length"}
    with pytest.raises(EngineStoppedError, match="has stopped"):
        Client(llm.engine, ids(5))
    llm.engine.start()
    assert len(Client(llm.engine, ids(5)).tokens()) == 20


@pytest.mark.parametrize("length", [1, 2, 31, 64, 65, 100])
def test_prompt_logprobs_are_those_of_the_logits(tiny_llm, length):
    prompt = ids(length)
    rows = tiny_llm.logits(prompt).astype(np.float64)
    rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
    request = tiny_llm.engine.prepare(prompt, SamplingParams(max_tokens=2), prompt_logprobs=3)
    chunks = [chunk for _, chunk in tiny_llm.engine.run([request])]
    scores = chunks[0].prompt_logprobs
    assert [score.token_id for score in scores] == prompt[1:]
    for row, score in zip(rows, scores, strict=False):
        assert score.logprob == pytest.approx(row[score.token_id], abs=1e-4)
        assert [token for token, _ in score.top] == np.argsort(-row)[:3].tolist()
    assert chunks[0].tokens[0] == rows[-1].argmax()


class EvenThenOdd:
    """A grammar of even tokens, then odd ones, in turns."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    def mask(self) -> np.ndarray:
        bits = np.zeros(-(-TINY.vocab_size // 32) * 32, bool)
        bits[len(self.taken) % 2 : TINY.vocab_size : 2] = True
        return np.packbits(bits, bitorder="little").view(np.uint32)

    def accept(self, token: int) -> None:
        self.taken.append(token)


def test_a_grammar_is_followed_whatever_its_company_does(llm, tiny_llm):
    prompts = [ids(6, seed) for seed in range(5)]
    sampling = SamplingParams(max_tokens=30, ignore_eos=True, temperature=1.0, seed=3)
    free = tiny_llm.generate(prompts, sampling)
    grammars = [EvenThenOdd(), None, EvenThenOdd(), None, None]
    clients = [
        Client(llm.engine, prompt, sampling=sampling, constraint=grammar)
        for prompt, grammar in zip(prompts, grammars, strict=True)
    ]
    for client, grammar, alone in zip(clients, grammars, free, strict=True):
        tokens = client.tokens()
        if grammar is None:
            assert tokens == alone.token_ids
        else:
            assert [token % 2 for token in tokens] == [0, 1] * 15
            # The token that ends a request is nobody's business any more.
            assert tuple(grammar.taken) == tokens[:-1]


def test_nothing_compiles_after_warm_up_whatever_a_request_asks_for():
    llm = make()
    llm.warm_up()
    penalties = SamplingParams(
        max_tokens=40, ignore_eos=True, repetition_penalty=1.2, frequency_penalty=0.1, logprobs=2
    )
    requests = [
        llm.engine.prepare(ids(100, 1), penalties),
        llm.engine.prepare(ids(90, 2), penalties, constraint=EvenThenOdd()),
        llm.engine.prepare(ids(80, 3), SamplingParams(max_tokens=30), prompt_logprobs=2),
        *(llm.engine.prepare(ids(70, seed), penalties) for seed in range(7)),
    ]
    with forbid_compile():
        assert {chunk.finish_reason for _, chunk in llm.engine.run(requests)} <= {None, "length", "stop"}
    assert llm.engine.stats().preemptions > 0


class Panic(BaseException):
    """As native code raises where it has a bug."""


@pytest.mark.parametrize("when", [0, 2])
@pytest.mark.parametrize("kind", [AssertionError, Panic])
def test_a_grammar_that_breaks_ends_its_own_request_alone(llm, kind, when, caplog):
    class Breaks(EvenThenOdd):
        def mask(self):
            if len(self.taken) == when:
                raise kind("a bug in a library")
            return super().mask()

    before = Client(llm.engine, ids(5), max_tokens=60)
    broken = Client(llm.engine, ids(4), constraint=Breaks())
    behind = Client(llm.engine, ids(6))
    assert broken.all()[-1].finish_reason == "error"
    assert (len(before.tokens()), len(behind.tokens())) == (60, 20)
    assert llm.engine.stats().failed_steps == 0
    assert "a bug in a library" in caplog.text


def test_a_grammar_after_the_warm_up_compiles_nothing():
    llm = make(batch_buckets=(1, 2))
    llm.warm_up()
    requests = [
        llm.engine.prepare(ids(6, seed), SamplingParams(max_tokens=5, ignore_eos=True), constraint=EvenThenOdd())
        for seed in range(2)
    ]
    with forbid_compile():
        list(llm.engine.run(requests))
    assert [request.finish_reason for request in requests] == ["length", "length"]


def test_what_is_being_taken_in_counts_as_waiting(llm):
    class Slow(EvenThenOdd):
        def mask(self):
            begun.set()
            assert go_on.wait(PATIENCE)
            return super().mask()

    begun, go_on = threading.Event(), threading.Event()
    clients = [Client(llm.engine, ids(4), constraint=Slow())]
    try:
        assert begun.wait(PATIENCE)
        # Eight seats, and four who may wait.
        clients += [Client(llm.engine, ids(4, seed)) for seed in range(11)]
        with pytest.raises(QueueFullError):
            Client(llm.engine, ids(4))
    finally:
        go_on.set()
    assert all(len(client.tokens()) == 20 for client in clients)


def test_who_fails_to_take_tokens_loses_only_their_own_request(llm, caplog):
    def fails(chunk):
        raise RuntimeError("nobody reads this")

    broken = llm.engine.prepare(ids(7), SamplingParams(max_tokens=100, ignore_eos=True))
    good = Client(llm.engine, ids(5), max_tokens=60)
    llm.engine.submit(broken, fails)
    assert len(good.tokens()) == 60
    settle(lambda: llm.engine.stats().pages_in_use == 0)
    assert broken.finish_reason == "cancelled"
    assert "nobody reads this" in caplog.text
    assert llm.engine.stats().failed_steps == 0


def test_a_notebook_beside_the_thread_gets_the_last_tokens_too(llm, monkeypatch):
    """The thread says that a request has ended before it delivers the last tokens."""
    delivered = llm.engine._flights._deliver

    def late(sequence, chunk):
        if chunk.finish_reason:
            time.sleep(0.3)
        delivered(sequence, chunk)

    monkeypatch.setattr(llm.engine._flights, "_deliver", late)
    (answer,) = llm.generate([ids(5)], max_tokens=6, ignore_eos=True)
    assert len(answer.token_ids) == 6


def test_a_request_alone_equals_itself_among_others_with_cancels_and_preemptions():
    llm = make(cache_tokens=256, batch_buckets=(1, 2, 4, 8, 16))
    prompts = [ids(5 + 7 * seed % 60, seed) for seed in range(17)]
    alone = [llm.generate([prompt], max_tokens=50, ignore_eos=True)[0].token_ids for prompt in prompts]
    llm.engine.start()
    clients = [Client(llm.engine, prompt, max_tokens=50) for prompt in prompts]
    for client in clients[1::4]:
        client.next()
        llm.engine.cancel(client.sequence)
    for index, client in enumerate(clients):
        if index % 4 != 1:
            assert client.tokens() == alone[index]
    assert llm.engine.stats().preemptions > 0
    settle(lambda: llm.engine.stats().pages_in_use == 0)
    llm.engine.stop()


def test_penalties_survive_a_preemption():
    penalties = SamplingParams(
        max_tokens=50, ignore_eos=True, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.5
    )
    prompts = [ids(30, seed) for seed in range(6)]
    llm = make(cache_tokens=160)
    alone = [llm.generate([prompt], penalties)[0].token_ids for prompt in prompts]
    together = llm.generate(prompts, penalties)
    assert llm.engine.stats().preemptions > 0
    assert [answer.token_ids for answer in together] == alone


def test_a_shared_beginning_is_computed_once():
    llm = make()
    start = ids(70)
    first, second = (llm.engine.prepare([*start, tail], SamplingParams(max_tokens=2)) for tail in (5, 6))
    list(llm.engine.run([first, second]))
    assert (first.cached_tokens, second.cached_tokens) == (0, 64)
    stats = llm.engine.stats()
    assert (stats.prefix_queries, stats.prefix_hits) == (142, 64)
    assert stats.pages_cached > 0


@pytest.mark.parametrize("option", [{"priority": 10**9}, {"priority": 1.5}, {"prompt_logprobs": 21}])
def test_an_option_out_of_range_is_refused(tiny_llm, option):
    with pytest.raises(RequestError, match=next(iter(option))):
        tiny_llm.engine.prepare([1], SamplingParams(), **option)


def test_what_a_step_sends_to_the_device_does_not_grow_with_the_context():
    sent = []
    for max_context in (64, 256):
        llm = make(max_context=max_context, cache_tokens=512)
        stream = llm.engine.run([llm.engine.prepare(ids(5), SamplingParams(max_tokens=50, ignore_eos=True))])
        next(stream), next(stream)
        traffic = llm.engine.runner.traffic
        before = traffic.bytes_to_device, traffic.launches
        for _ in range(4):
            next(stream)
        sent.append((traffic.bytes_to_device - before[0]) / (traffic.launches - before[1]))
        stream.close()
    assert sent[0] == sent[1] <= 4 * (3 + TINY_ENGINE.new_pages + 1)
