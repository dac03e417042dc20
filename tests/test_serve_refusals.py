"""What the two endpoints refuse: every wrong type and value of every parameter, told with the parameter's name."""

from __future__ import annotations

import json
import math

import pytest
from serving import JSON_TYPE, app_of, ask, the_error, with_client

MESSAGES = [{"role": "user", "content": "Hi"}]
NOT_NUMBERS = ["1", True, [], {}, "NaN"]
NOT_INTEGERS = [*NOT_NUMBERS, 1.5, 1e300]
NOT_FLAGS = ["true", 1, [], {}]
NOT_TEXTS = [1, True, [], {}]

# What can't be, in both endpoints.
WRONG = {
    "model": NOT_TEXTS,
    "n": [*NOT_INTEGERS, 0, -1, 9, 10**30],
    "stream": NOT_FLAGS,
    "stream_options": ["x", [], {"include_usage": 1}, {"x": 1}, {"include_obfuscation": True}],
    "temperature": [*NOT_NUMBERS, -0.1, 101, 10**400],
    "top_p": [*NOT_NUMBERS, 0, 1.1],
    "top_k": [*NOT_INTEGERS, -2, 2**31],
    "min_p": [*NOT_NUMBERS, -1, 2],
    "frequency_penalty": [*NOT_NUMBERS, 101],
    "presence_penalty": [*NOT_NUMBERS, -101],
    "repetition_penalty": [*NOT_NUMBERS, 0],
    "logit_bias": ["x", [], {"x": 1}, {"-1": 1}, {"5": "1"}, {"5": True}, {"5": 1e9}, {"49152": 1}],
    "seed": [*NOT_INTEGERS, 2**64, -(2**63) - 1],
    "stop": [1, True, {}, "", [""], ["a", 1], ["a"] * 17],
    "stop_token_ids": ["x", 1, ["1"], [True], [-1], [49152], [1] * 17],
    "ignore_eos": NOT_FLAGS,
    "response_format": [
        "json",
        [],
        {},
        {"type": "xml"},
        {"type": "json_schema"},
        {"type": "text", "x": 1},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"minimum": math.inf}}},
    ],
    "structured_outputs": [
        "x",
        {},
        {"regex": 1},
        {"choice": []},
        {"choice": "a"},
        {"json": {}, "regex": "a"},
        {"json": {"minimum": math.nan}},
    ],
    "priority": [*NOT_INTEGERS, 1001],
    "cache_salt": [*NOT_TEXTS, "x" * 257],
    "user": NOT_TEXTS,
    "metadata": ["x", [], {"a": 1}],
    "max_tokens": [*NOT_INTEGERS, -1, 2**31],
    "colour": ["blue", None],
    # Known, and not supported.
    "audio": [{}],
    "best_of": [2, "1", True],
    "function_call": ["f", {}],
    "functions": [[{}], {}],
    "modalities": [["text", "audio"], "text"],
    "prediction": [{}],
    "reasoning_effort": ["high"],
    "store": [True, 0],
    "suffix": ["x", 1],
    "tool_choice": ["required", {}],
    "tools": [[{}], {}],
    "web_search_options": [{}],
}
WRONG_COMPLETION = {
    "prompt": [None, 1, {}, [], [[]], ["a", 1], [1, "a"], [True], [1.5], [[1], "a"], [-1], [49152], [[1], [2**70]]],
    "echo": NOT_FLAGS,
    "logprobs": [*NOT_INTEGERS, -1, 21],
    "messages": [MESSAGES],
    "max_completion_tokens": [1],
}
WRONG_CHAT = {
    "messages": [
        None,
        "x",
        [],
        [1],
        [{}],
        [{"role": "user"}],
        [{"role": "robot", "content": "x"}],
        [{"role": "tool", "content": "x", "tool_call_id": "1"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": 1}],
        [{"role": "user", "content": []}],
        [{"role": "user", "content": [1]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": [{"type": "text", "text": 1}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": "x", "colour": 1}],
        [{"role": "assistant", "content": "x", "tool_calls": [{}]}],
        [{"role": "user", "content": "x", "name": 1}],
    ],
    "max_completion_tokens": [*NOT_INTEGERS, 0],
    "logprobs": NOT_FLAGS,
    "top_logprobs": [*NOT_INTEGERS, 0, 21],
    "prompt": ["x"],
    "echo": [True],
}
TABLE = [
    *(
        (path, name, value)
        for path in ("/v1/completions", "/v1/chat/completions")
        for name in WRONG
        for value in WRONG[name]
    ),
    *(("/v1/completions", name, value) for name, values in WRONG_COMPLETION.items() for value in values),
    *(("/v1/chat/completions", name, value) for name, values in WRONG_CHAT.items() for value in values),
    *(("/tokenize", "prompt", value) for value in [None, 1, [], {}]),
    *(("/tokenize", "add_special_tokens", value) for value in NOT_FLAGS),
    *(("/tokenize", "colour", value) for value in [1]),
    *(("/detokenize", "tokens", value) for value in [None, 1, "x", {}, ["1"], [-1], [True], [49152], [2**70]]),
]
GOOD = {
    "/v1/completions": {"prompt": "Hi", "max_tokens": 1},
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 1},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [1]},
}


@pytest.fixture(scope="module")
def app(served_llm):
    return app_of(served_llm)


@pytest.fixture(scope="module")
def refusals(app):
    """The responses to all of the table, by one client."""

    async def work(client):
        answers = []
        for path, name, value in TABLE:
            body = json.dumps({**GOOD[path], name: value})
            answers.append(await client.post(path, content=body, headers=JSON_TYPE))
        return answers

    return with_client(app, work)


def test_every_wrong_value_of_every_parameter_is_refused_with_400(refusals):
    for (path, name, value), response in zip(TABLE, refusals, strict=True):
        what = f"{path} {name}={str(value)[:60]} -> {response.text[:300]}"
        expected = 404 if name == "model" and isinstance(value, str) else 400
        assert response.status_code == expected, what
        error = the_error(response)
        assert error["type"] == "invalid_request_error", what


def test_a_refusal_names_the_parameter(refusals):
    for (path, name, value), response in zip(TABLE, refusals, strict=True):
        error = the_error(response)
        # What only the engine knows (the vocabulary) has the name in its sentence, or is about token ids.
        named = error["param"] is not None and error["param"].split(".")[0] == name
        said = name in error["message"] or "token ids" in error["message"]
        assert named or said, f"{path} {name}={value!s:.60} -> {error}"


@pytest.mark.parametrize("path", list(GOOD)[:2])
@pytest.mark.parametrize(
    "neutral",
    [
        {name: None for name in WRONG if name not in ("colour", "max_tokens")},
        {"best_of": 1, "n": 1, "user": "me", "metadata": {"a": "b"}, "stream_options": {"include_usage": True}},
        {
            "tools": [],
            "tool_choice": "none",
            "store": False,
            "suffix": "",
            "modalities": ["text"],
            "service_tier": "auto",
        },
        {"top_k": -1, "stop": [], "logit_bias": {}, "seed": 2**64 - 1, "response_format": {"type": "text"}},
    ],
)
def test_values_that_ask_for_nothing_are_accepted(app, path, neutral):
    response = ask(app, path, {**GOOD[path], **neutral})
    assert response.status_code == 200, response.text


def test_best_of_as_many_as_are_answered_is_no_choice(app):
    response = ask(app, "/v1/completions", {"prompt": "Hi", "max_tokens": 1, "best_of": 2, "n": 2})
    assert [choice["index"] for choice in response.json()["choices"]] == [0, 1]


@pytest.mark.parametrize("name", ["tools", "suffix", "best_of", "store"])
def test_an_unsupported_parameter_is_told_apart_from_an_unknown_one(app, name):
    body = {**GOOD["/v1/completions"], name: WRONG[name][0]}
    assert the_error(ask(app, "/v1/completions", body))["code"] == "unsupported_parameter"
    body = {**GOOD["/v1/completions"], "colour": "blue"}
    assert the_error(ask(app, "/v1/completions", body))["code"] == "unknown_parameter"


@pytest.mark.parametrize("body", [{}, {"metadata": {}}, {"stream_options": {}}])
def test_hundreds_of_thousands_of_names_are_refused_together(served_llm, body):
    (inner,) = [*body.values()] or [body]
    inner |= {f"k{number}": 1 for number in range(200_000)}
    response = ask(app_of(served_llm), "/v1/completions", {"prompt": "a", **body})
    assert response.status_code == 400
    # Of all of them together: an error for each would take seconds, for which everybody waits.
    assert "200" in the_error(response)["message"]


def test_only_a_server_that_allows_it_lets_requests_go_before_others(served_llm):
    body = {"prompt": "Hi", "max_tokens": 1, "priority": -2}
    refused = ask(app_of(served_llm), "/v1/completions", body)
    assert refused.status_code == 400
    assert the_error(refused)["param"] == "priority"
    assert ask(app_of(served_llm), "/v1/completions", {**body, "priority": 2}).status_code == 200
    assert ask(app_of(served_llm, min_priority=-2), "/v1/completions", body).status_code == 200


def test_a_list_of_more_prompts_than_any_queue_has_is_refused_as_a_whole(served_llm):
    refused = ask(app_of(served_llm), "/v1/completions", {"prompt": [[1]] * 5000})
    assert refused.status_code == 400
    assert "5000" in the_error(refused)["message"]


def test_a_path_with_a_slash_too_many_is_no_redirect(served_llm):
    response = ask(app_of(served_llm), "/v1/completions/", {"prompt": "Hi"})
    assert (response.status_code, the_error(response)["code"]) == (404, "not_found")
