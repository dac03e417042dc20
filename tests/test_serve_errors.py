"""The server's errors: always OpenAI's error object, with the right status."""

from __future__ import annotations

import pytest
from serving import JSON_TYPE, MODEL, app_of, ask, the_error

from fusedllm.errors import ConfigError, EngineStoppedError, QueueFullError
from fusedllm.serve.errors import MAX_MESSAGE, APIError, as_api_error

MESSAGES = [{"role": "user", "content": "Hi"}]
GOOD = {
    "/v1/completions": {"prompt": "Hi", "max_tokens": 1},
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 1},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [1]},
}


@pytest.fixture(scope="module")
def app(served_llm):
    return app_of(served_llm)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"prompt": NaN}',
        b"1" * 5000,
    ],
    ids=range(10),
)
@pytest.mark.parametrize("kind", ["application/json", "text/plain", ""])
def test_a_body_that_is_no_request_is_refused(app, content, kind):
    response = ask(app, "/v1/completions", content=content, headers={"content-type": kind} if kind else {})
    assert response.status_code == 400
    the_error(response)


def test_a_schema_that_is_nested_as_deeply_as_the_parser_allows_is_no_server_error(app):
    for depth in (100, 300, 500, 700, 800, 900, 950):
        schema = '{"a":' * depth + "1" + "}" * depth
        form = '{"type":"json_schema","json_schema":{"name":"x","schema":' + schema + "}}"
        content = f'{{"prompt":"Hi","max_tokens":1,"response_format":{form}}}'.encode()
        response = ask(app, "/v1/completions", content=content, headers=JSON_TYPE)
        # What the library can follow is answered.
        assert response.status_code in (200, 400), depth


def test_a_prompt_that_does_not_fit_has_openais_code(app):
    error = the_error(ask(app, "/v1/completions", {"prompt": "word " * 600}))
    assert error["code"] == "context_length_exceeded"
    assert "512" in error["message"]


def test_limits_of_the_server_are_told(served_llm):
    app = app_of(served_llm, max_prompt_tokens=3, max_tokens=5, max_n=2, max_queue=3)
    for body, word in [
        ({"prompt": "one two three four five"}, "at most 3"),
        ({"prompt": "a", "max_tokens": 6}, "at most 5"),
        ({"prompt": "a", "n": 3}, "at most 2"),
        ({"prompt": ["a", "b"], "n": 2}, "3 places"),
    ]:
        response = ask(app, "/v1/completions", body)
        assert response.status_code == 400
        assert word in the_error(response)["message"]


def test_the_servers_limit_of_tokens_is_also_the_default(served_llm):
    app = app_of(served_llm, max_tokens=3)
    body = {"temperature": 0, "ignore_eos": True}
    for path, prompt in (("/v1/completions", {"prompt": "Hi"}), ("/v1/chat/completions", {"messages": MESSAGES})):
        assert ask(app, path, {**body, **prompt}).json()["usage"]["completion_tokens"] == 3


def test_another_model_is_not_found(app):
    for path, body in GOOD.items():
        response = ask(app, path, {**body, "model": "gpt-5"})
        assert (response.status_code, the_error(response)["code"]) == (404, "model_not_found")
        assert MODEL in the_error(response)["message"]


def test_half_a_surrogate_pair_anywhere_is_no_server_error(app):
    for body in ({"prompt": "\ud800"}, {"prompt": "a", "model": "\ud800"}, {"prompt": "a", "\ud800": 1}):
        response = ask(app, "/v1/completions", body)
        assert response.status_code in (400, 404)
        the_error(response)


def test_unknown_paths_and_methods_are_error_objects(app):
    assert the_error(ask(app, "/nothing"))["code"] == "not_found"
    response = ask(app, "/v1/completions")
    assert (response.status_code, the_error(response)["code"]) == (405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (QueueFullError("64 requests wait already."), 503, "queue_full"),
        (EngineStoppedError("the engine has stopped."), 503, "engine_stopped"),
        (ConfigError("a secret of the house."), 500, "internal_error"),
        (ZeroDivisionError("a secret of the house"), 500, "internal_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_raises_has_its_status_streamed_or_not(served_llm, monkeypatch, error, status, code, stream):
    def submit(sequence, deliver):
        raise error

    monkeypatch.setattr(served_llm.engine, "submit", submit)
    response = ask(app_of(served_llm), "/v1/completions", {"prompt": "Hi", "stream": stream})
    assert (response.status_code, the_error(response)["code"]) == (status, code)
    assert ("retry-after" in response.headers) == (status == 503)
    if isinstance(error, ZeroDivisionError):
        assert "secret" not in response.text
        assert "Traceback" not in response.text


def test_a_server_that_is_not_ready_or_ends_admits_nobody(served_llm):
    app = app_of(served_llm)
    for state in ({"ready": False}, {"ready": True, "draining": True}):
        for name, value in state.items():
            setattr(app.state.server, name, value)
        response = ask(app, "/v1/completions", {"prompt": "Hi"})
        assert response.status_code == 503
        assert response.headers["retry-after"]


def test_a_message_is_never_as_long_as_a_body():
    assert len(APIError(400, "x" * 10**6, "t").message) == MAX_MESSAGE + 3


def test_an_expected_error_keeps_its_sentence():
    assert as_api_error(QueueFullError("no room")).message == "no room."
