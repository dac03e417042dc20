"""Server-sent events as OpenAI sends them."""

from __future__ import annotations

import json

import pytest
from serving import MODEL, app_of, ask, events_of

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
MESSAGES = [{"role": "user", "content": "Say hello."}]
BODIES = {
    CHAT: {"messages": MESSAGES, "temperature": 0, "max_tokens": 8},
    TEXT: {"prompt": "One, two, three,", "temperature": 0, "max_tokens": 8},
}
WITH_USAGE = {"stream": True, "stream_options": {"include_usage": True}}


@pytest.fixture(scope="module")
def app(served_llm):
    return app_of(served_llm)


def test_the_first_delta_of_a_chat_has_the_role_and_the_last_one_nothing(app, served_llm):
    events = events_of(ask(app, CHAT, {**BODIES[CHAT], "stream": True}))
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert all(set(delta) == {"content"} and delta["content"] for delta in deltas[1:-1])
    assert deltas[-1] == {}
    expected = served_llm.chat(MESSAGES, max_tokens=8)
    assert "".join(delta.get("content", "") for delta in deltas) == expected.text
    reasons = [event["choices"][0]["finish_reason"] for event in events]
    assert reasons == [None] * (len(events) - 1) + [expected.finish_reason]
    # An event may carry all tokens of a launch.
    assert len(deltas) - 2 < expected.usage.completion_tokens


def test_a_text_has_its_reason_in_a_last_event_of_its_own(app, served_llm):
    events = events_of(ask(app, TEXT, {**BODIES[TEXT], "stream": True}))
    choices = [event["choices"][0] for event in events]
    assert (
        "".join(choice["text"] for choice in choices) == served_llm.generate("One, two, three,", max_tokens=8)[0].text
    )
    assert all(choice["text"] and choice["finish_reason"] is None for choice in choices[:-1])
    assert choices[-1] == {"index": 0, "text": "", "logprobs": None, "finish_reason": "length"}


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_all_events_have_one_head(app, path):
    events = events_of(ask(app, path, {**BODIES[path], **WITH_USAGE}))
    kind = {CHAT: "chat.completion.chunk", TEXT: "text_completion"}[path]
    heads = [{name: value for name, value in event.items() if name not in ("choices", "usage")} for event in events]
    assert all(head == heads[0] for head in heads)
    assert set(heads[0]) == {"id", "object", "created", "model", "system_fingerprint"}
    assert (heads[0]["object"], heads[0]["model"]) == (kind, MODEL)


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_the_usage_comes_last_with_no_choices_and_only_where_asked_for(app, path):
    *events, last = events_of(ask(app, path, {**BODIES[path], **WITH_USAGE}))
    assert all(event["usage"] is None for event in events)
    assert last["choices"] == []
    whole = ask(app, path, BODIES[path]).json()
    assert last["usage"] == whole["usage"]
    assert not any("usage" in event for event in events_of(ask(app, path, {**BODIES[path], "stream": True})))


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_n_streams_are_told_apart_by_their_index(app, path):
    body = {**BODIES[path], "n": 2, "temperature": 1.3, "seed": 5}
    events = events_of(ask(app, path, {**body, "stream": True}))
    whole = ask(app, path, body).json()["choices"]
    for index in (0, 1):
        own = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        text = "".join(choice["delta"].get("content", "") if path == CHAT else choice["text"] for choice in own)
        assert text == (whole[index]["message"]["content"] if path == CHAT else whole[index]["text"])
        assert [choice["finish_reason"] for choice in own if choice["finish_reason"]] == [whole[index]["finish_reason"]]


def test_a_stream_is_ascii_and_not_to_be_kept(app):
    response = ask(app, TEXT, {"prompt": "caf\u00e9 \U0001f600", "echo": True, "max_tokens": 1, "stream": True})
    assert response.content.isascii()
    assert events_of(response)[0]["choices"][0]["text"].startswith("caf\u00e9 \U0001f600")
    assert response.headers["cache-control"] == "no-cache"
    assert "content-length" not in response.headers


def test_events_are_as_json_writes_them(app):
    response = ask(app, CHAT, {**BODIES[CHAT], **WITH_USAGE, "logprobs": True})
    for part in response.text.split("\n\n")[:-2]:
        text = part.removeprefix("data: ")
        assert text == json.dumps(json.loads(text), separators=(",", ":"))
