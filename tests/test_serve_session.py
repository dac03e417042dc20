"""Sessions that end in every other way than by an answer, and what is counted of them."""

from __future__ import annotations

import asyncio
import threading
import time

import httpx
import pytest
from serving import app_of, ask, events_of, on_a_port

from fusedllm.engine.request import Chunk
from fusedllm.serve import session as sessions

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
BODIES = {
    CHAT: {"messages": [{"role": "user", "content": "Say hello."}], "temperature": 0, "max_tokens": 8},
    TEXT: {"prompt": "One, two, three,", "temperature": 0, "max_tokens": 8},
}


@pytest.fixture(scope="module")
def app(served_llm):
    return app_of(served_llm)


class ScriptedEngine:
    """Delivers the given chunks from a thread, a moment apart; notes who is cancelled."""

    def __init__(self, llm, monkeypatch, chunks):
        self.cancelled = []
        self._chunks = chunks
        monkeypatch.setattr(llm.engine, "submit", self.submit)
        monkeypatch.setattr(llm.engine, "cancel", self.cancelled.append)

    def submit(self, sequence, deliver):
        def run():
            for chunk in self._chunks:
                time.sleep(0.01)
                sequence.finish_reason = chunk.finish_reason
                deliver(chunk)

        threading.Thread(target=run).start()


ENDS = [("deadline", 504, "timeout"), ("error", 500, "internal_error"), ("cancelled", 503, "engine_stopped")]


@pytest.mark.parametrize(("reason", "status", "code"), ENDS)
def test_an_end_that_is_no_answer_is_an_error(app, served_llm, monkeypatch, reason, status, code):
    ScriptedEngine(served_llm, monkeypatch, [Chunk((5,), (), None), Chunk((), (), reason)])
    response = ask(app, TEXT, {"prompt": "Hi"})
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert app.state.server.in_flight == set()


def test_a_grammar_that_can_not_be_followed_further_is_the_clients_fault(app, served_llm, monkeypatch):
    engine = ScriptedEngine(served_llm, monkeypatch, [Chunk((), (), "error")])
    scripted = engine.submit

    def submit(sequence, deliver):
        sequence.error = "the grammar takes too long to follow."
        scripted(sequence, deliver)

    monkeypatch.setattr(served_llm.engine, "submit", submit)
    response = ask(app, TEXT, {"prompt": "Hi"})
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "the grammar takes too long to follow."


@pytest.mark.parametrize(("reason", "status", "code"), ENDS)
def test_in_a_stream_the_error_is_an_event_after_what_was_said(app, served_llm, monkeypatch, reason, status, code):
    ScriptedEngine(served_llm, monkeypatch, [Chunk((5,), (), None), Chunk((6,), (), None), Chunk((), (), reason)])
    response = ask(app, TEXT, {"prompt": "Hi", "stream": True})
    *events, last = events_of(response)
    text = "".join(event["choices"][0]["text"] for event in events)
    assert text == served_llm.tokenizer.decode([5, 6], skip_special_tokens=True)
    assert last["error"]["code"] == code


def test_a_failure_of_one_answer_frees_the_others(app, served_llm, monkeypatch):
    engine = ScriptedEngine(served_llm, monkeypatch, [Chunk((), (), "error")])
    assert ask(app, TEXT, {"prompt": ["a", "b"], "n": 2}).status_code == 500
    assert len(engine.cancelled) == 4


def test_a_queue_that_fills_up_midway_admits_nobody(app, served_llm, monkeypatch):
    engine = ScriptedEngine(served_llm, monkeypatch, [])
    submit, places = engine.submit, iter([True, True, False])

    def full(sequence, deliver):
        from fusedllm.errors import QueueFullError

        if not next(places):
            raise QueueFullError("2 requests wait already.")
        submit(sequence, deliver)

    monkeypatch.setattr(served_llm.engine, "submit", full)
    notes = Notes()
    monkeypatch.setattr(app.state.server, "metrics", notes)
    response = ask(app, TEXT, {"prompt": ["a", "b", "c"]})
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert len(engine.cancelled) == 3
    # No request has begun, so that none has ended.
    assert notes.of("observe_request") == []
    assert app.state.server.in_flight == set()


def test_an_engine_that_dies_leaves_nobody_waiting(app, served_llm, monkeypatch):
    monkeypatch.setattr(sessions, "WATCH_SECONDS", 0.02)
    ScriptedEngine(served_llm, monkeypatch, [Chunk((5,), (), None)])
    monkeypatch.setattr(type(served_llm.engine), "alive", False)
    assert ask(app, TEXT, {"prompt": "Hi"}).status_code == 503


def test_a_deadline_that_the_engine_misses_is_kept_here(served_llm, monkeypatch):
    monkeypatch.setattr(sessions, "WATCH_SECONDS", 0.02)
    monkeypatch.setattr(sessions, "DEADLINE_GRACE", 0.05)
    engine = ScriptedEngine(served_llm, monkeypatch, [Chunk((5,), (), None)])
    app = app_of(served_llm, request_seconds=0.1)
    assert ask(app, TEXT, {"prompt": "Hi"}).status_code == 504
    assert len(engine.cancelled) == 1
    *_, last = events_of(ask(app, TEXT, {"prompt": "Hi", "stream": True}))
    assert last["error"]["code"] == "timeout"


def test_a_fault_of_ours_in_a_stream_is_logged_and_not_told(app, served_llm, monkeypatch, caplog):
    ScriptedEngine(served_llm, monkeypatch, [Chunk((5,), (), None)])

    def broken(self, piece):
        raise ZeroDivisionError("a secret of the house")

    monkeypatch.setattr("fusedllm.serve.completions.CompletionAnswer.piece", broken)
    response = ask(app, TEXT, {"prompt": "Hi", "stream": True})
    assert events_of(response)[-1]["error"]["code"] == "internal_error"
    assert "secret" not in response.text
    assert "a secret of the house" in caplog.text


def test_text_before_the_end_is_whole_though_the_engine_is_further(app, served_llm, monkeypatch):
    # All chunks arrive before the first is read, so that the sequence has ended long before its text.
    def submit(sequence, deliver):
        sequence.finish_reason = "stop"
        for chunk in (Chunk((19556,), (), None), Chunk((905,), (), None), Chunk((28, 2), (), "stop")):
            deliver(chunk)

    monkeypatch.setattr(served_llm.engine, "submit", submit)
    expected = served_llm.tokenizer.decode([19556, 905, 28])
    assert ask(app, TEXT, {"prompt": "Hi"}).json()["choices"][0]["text"] == expected
    events = events_of(ask(app, TEXT, {"prompt": "Hi", "stream": True}))
    assert "".join(event["choices"][0]["text"] for event in events) == expected


def test_a_session_that_is_cancelled_says_so(app, served_llm, monkeypatch):
    ScriptedEngine(served_llm, monkeypatch, [Chunk((5,), (), None)])

    async def run():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            waiting = asyncio.create_task(client.post(TEXT, json={"prompt": "Hi"}))
            while not app.state.server.in_flight:
                await asyncio.sleep(0.01)
            (session,) = app.state.server.in_flight
            session.cancel()
            return await waiting

    assert asyncio.run(run()).json()["error"]["code"] == "engine_stopped"


class Notes:
    """Metrics that note what they are told."""

    def __init__(self):
        self.heard = []

    def __getattr__(self, name):
        return lambda *values: self.heard.append((name, values))

    def of(self, name):
        return [values for heard, values in self.heard if heard == name]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_client_that_leaves_frees_its_pages(served_llm, path, stream):
    app = app_of(served_llm)
    notes = app.state.server.metrics = Notes()
    body = {**BODIES[path], "max_tokens": 450, "ignore_eos": True, "stream": stream, "n": 2}
    with on_a_port(app) as url:
        try:
            with (
                httpx.Client(base_url=url, timeout=30 if stream else 1.0) as client,
                client.stream("POST", path, json=body) as response,
            ):
                # Roles come at once; texts only from the engine.
                next(line for line in response.iter_lines() if '"text"' in line or '"delta":{"content"' in line)
                assert served_llm.engine.pages_in_use > 0
        except httpx.ReadTimeout:
            assert not stream
        left = time.monotonic()
        while served_llm.engine.pages_in_use or app.state.server.in_flight:
            # Much more than it takes, for a busy machine: what counts is how far the answers got.
            assert time.monotonic() - left < 30
            time.sleep(0.02)
        ends = notes.of("observe_request")
        assert [reason for reason, *_ in ends] == ["cancelled"] * 2
        assert all(completion_tokens < 450 for _, _, completion_tokens, _ in ends)
        answer = httpx.post(url + TEXT, json=BODIES[TEXT], timeout=30).json()
        assert answer["usage"]["completion_tokens"] == 8


def test_metrics_hear_of_every_request(served_llm):
    app = app_of(served_llm)
    notes = app.state.server.metrics = Notes()
    ask(app, TEXT, {**BODIES[TEXT], "max_tokens": 20, "ignore_eos": True})
    assert notes.heard[0][0] == "observe_first_token"
    ((reason, prompt_tokens, completion_tokens, seconds),) = notes.of("observe_request")
    assert (reason, completion_tokens) == ("length", 20)
    assert prompt_tokens == len(served_llm.encode("One, two, three,"))
    between = notes.of("observe_inter_token")
    # All but those of the first chunk, which is a single token.
    assert sum(tokens for _, tokens in between) == 19
    assert 0 < sum(gap for gap, _ in between) < seconds
