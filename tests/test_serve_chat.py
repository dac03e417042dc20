"""/v1/chat/completions: conversations through the model's own template."""

from __future__ import annotations

import json
import math
import sys
import types

import pytest
from serving import MODEL, app_of, ask, events_of

from fusedllm.errors import RequestError
from fusedllm.serve.schemas_chat import ChatBody

PATH = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Say hello."}]
GREEDY = {"messages": MESSAGES, "temperature": 0, "max_tokens": 8}


@pytest.fixture(scope="module")
def app(served_llm):
    return app_of(served_llm)


def answer_of(app, body):
    response = ask(app, PATH, body)
    assert response.status_code == 200, response.text
    # As strict as can be: what OpenAPI says of the answer is true.
    ChatBody.model_validate_json(response.text, strict=True, extra="forbid")
    return response.json()


def test_a_conversation_is_answered_as_the_model_does(app, served_llm):
    answer = answer_of(app, {**GREEDY, "model": MODEL})
    expected = served_llm.chat(MESSAGES, max_tokens=8)
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected.text, "refusal": None}
    assert choice["finish_reason"] == expected.finish_reason
    assert answer["usage"]["prompt_tokens"] == expected.usage.prompt_tokens
    assert answer["usage"]["completion_tokens"] == expected.usage.completion_tokens


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_both_names_of_the_limit_mean_the_same(app, name):
    body = {"messages": MESSAGES, "temperature": 0, "ignore_eos": True, name: 3}
    assert answer_of(app, body)["usage"]["completion_tokens"] == 3


def test_limits_that_differ_are_refused(app):
    assert ask(app, PATH, {**GREEDY, "max_tokens": 3, "max_completion_tokens": 4}).status_code == 400
    answer_of(app, {**GREEDY, "max_tokens": 3, "max_completion_tokens": 3})


def test_an_answer_may_fill_the_context_and_no_more(app, served_llm):
    # Nearly all of the context is taken, so that filling it is quick.
    words = "word " * 460
    answer = answer_of(app, {"messages": [{"role": "user", "content": words}], "ignore_eos": True})
    assert answer["usage"]["total_tokens"] == served_llm.engine.config.max_context
    assert answer["choices"][0]["finish_reason"] == "length"


def test_text_parts_are_lines_and_developers_are_the_system(app, served_llm, monkeypatch):
    seen = []
    render = served_llm.render
    monkeypatch.setattr(served_llm, "render", lambda messages: seen.append(messages) or render(messages))
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "name": "Ada", "content": parts}]
    answer_of(app, {**GREEDY, "messages": messages})
    assert seen[0] == [
        {"role": "system", "content": "Be brief.", "name": None},
        {"role": "user", "content": "one\ntwo", "name": "Ada"},
    ]


def test_an_answers_message_may_be_sent_back(app):
    message = answer_of(app, GREEDY)["choices"][0]["message"]
    messages = [*MESSAGES, {**message, "tool_calls": None, "annotations": []}, {"role": "user", "content": "Again."}]
    answer_of(app, {**GREEDY, "messages": messages})


def test_log_probabilities_have_bytes_and_alternatives(app, served_llm):
    choice = answer_of(app, {**GREEDY, "logprobs": True, "top_logprobs": 2})["choices"][0]
    expected = served_llm.chat(MESSAGES, max_tokens=8, logprobs=2)
    content = choice["logprobs"]["content"]
    drawn = expected.logprobs[: len(content)]
    assert [entry["logprob"] for entry in content] == [entry.logprob for entry in drawn]
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == choice["message"]["content"]
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)
    assert content[0]["top_logprobs"][0] == {key: content[0][key] for key in ("token", "logprob", "bytes")}
    plain = answer_of(app, {**GREEDY, "logprobs": True})["choices"][0]["logprobs"]["content"]
    assert [entry["top_logprobs"] for entry in plain] == [[]] * len(content)


def test_a_token_that_only_ends_the_answer_is_no_part_of_the_message(app, served_llm):
    body = {**GREEDY, "max_tokens": 60, "logprobs": True}
    answer = answer_of(app, body)
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "stop"
    assert len(choice["logprobs"]["content"]) == answer["usage"]["completion_tokens"] - 1
    events = events_of(ask(app, PATH, {**body, "stream": True}))
    parts = [event["choices"][0]["logprobs"] for event in events]
    assert [entry for part in parts if part for entry in part["content"]] == choice["logprobs"]["content"]


def test_n_answers_are_as_many_and_numbered(app):
    answer = answer_of(app, {**GREEDY, "n": 3, "temperature": 1.5, "seed": 1})
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert len({choice["message"]["content"] for choice in answer["choices"]}) > 1


@pytest.fixture
def grammars(monkeypatch):
    """Stands in for the grammars' library: notes what it is asked for, and allows everything."""
    asked = []

    class Anything:
        @classmethod
        def compile(cls, kind, source, tokenizer, eos_token_ids, vocab_size=None):
            if source == "(":
                raise RequestError("the regex '(' can't be read.")
            asked.append((kind, source, tuple(eos_token_ids), vocab_size))
            return cls()

        def fresh(self):
            return type(self)()

    module = types.ModuleType("fusedllm.text.constraint")
    module.Constraint = Anything
    monkeypatch.setitem(sys.modules, "fusedllm.text.constraint", module)
    return asked


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("wish", "kind", "source"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object", ""),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "json_object", ""),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": SCHEMA, "strict": True},
                }
            },
            "json_schema",
            SCHEMA,
        ),
        ({"structured_outputs": {"json": SCHEMA}}, "json_schema", SCHEMA),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, "json_schema", SCHEMA),
        ({"structured_outputs": {"regex": "[ab]+"}}, "regex", "[ab]+"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "choice", ["yes", "no"]),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, "grammar", 'start: "a"'),
    ],
)
def test_a_grammar_is_compiled_once_and_followed_by_each_answer_for_itself(
    app, served_llm, grammars, monkeypatch, wish, kind, source
):
    prepared = []
    prepare = served_llm.prepare

    def noted(ids, sampling, *, constraint, **options):
        prepared.append(constraint)
        return prepare(ids, sampling, **options)

    monkeypatch.setattr(served_llm, "prepare", noted)
    answer_of(app, {**GREEDY, **wish, "n": 2})
    ((asked_kind, asked_source, *of_model),) = grammars
    assert asked_kind == kind
    assert (json.loads(asked_source) if kind == "json_schema" else asked_source) == source
    assert of_model == [served_llm.config.eos_token_ids, served_llm.config.vocab_size]
    assert None not in prepared
    assert len({id(constraint) for constraint in prepared}) == 2


def test_a_grammar_that_can_not_be_is_the_clients_mistake(app, grammars):
    response = ask(app, PATH, {**GREEDY, "structured_outputs": {"regex": "("}})
    assert response.status_code == 400
    assert "regex" in response.json()["error"]["message"]


def test_two_grammars_or_one_without_an_end_are_refused(app, grammars):
    regex = {"structured_outputs": {"regex": "a"}}
    for body in ({**regex, "response_format": {"type": "json_object"}}, {**regex, "ignore_eos": True}):
        assert ask(app, PATH, {**GREEDY, **body}).status_code == 400
    assert not grammars


def test_options_for_the_scheduler_reach_it(served_llm, monkeypatch):
    seen = []
    prepare = served_llm.prepare
    monkeypatch.setattr(
        served_llm,
        "prepare",
        lambda ids, sampling, **options: seen.append(options) or prepare(ids, sampling, **options),
    )
    app = app_of(served_llm, request_seconds=100.0)
    answer_of(app, {**GREEDY, "priority": 3, "cache_salt": "mine"})
    answer_of(app_of(served_llm, prefix_cache_per_key=False), {**GREEDY, "cache_salt": "mine"})
    assert seen[0]["priority"] == 3
    assert math.isfinite(seen[0]["deadline"])
    # With keys, the salt tells them apart; without, it is what was sent.
    assert seen[0]["cache_salt"] == "0:mine"
    assert seen[1]["cache_salt"] == "mine"


def test_the_callers_key_separates_their_prefixes(served_llm, monkeypatch):
    from fusedllm.serve import state

    salts = []
    prepare = served_llm.prepare
    monkeypatch.setattr(
        served_llm,
        "prepare",
        lambda ids, sampling, **options: salts.append(options["cache_salt"]) or prepare(ids, sampling, **options),
    )
    for key, salt in (("ab", "c"), ("a", "bc"), ("ab", "c")):
        monkeypatch.setattr(state, "caller", lambda request, key=key: key)
        answer_of(app_of(served_llm), {**GREEDY, "cache_salt": salt})
    assert salts[0] == salts[2] != salts[1]
