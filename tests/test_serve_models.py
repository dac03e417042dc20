"""What the server says of its model, its tokenizer and its own interface."""

from __future__ import annotations

import pytest
from serving import MODEL, app_of, ask

import fusedllm
from fusedllm.serve.schemas_models import DetokenizeBody, ModelsBody, TokenizeBody, TokenizerInfoBody

MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def app(served_llm):
    return app_of(served_llm)


def answer_of(app, path, body=None, model=None):
    response = ask(app, path, body)
    assert response.status_code == 200, response.text
    if model is not None:
        model.model_validate_json(response.text, strict=True, extra="forbid")
    return response.json()


def test_the_served_model_is_listed_with_its_context(app):
    (model,) = answer_of(app, "/v1/models", model=ModelsBody)["data"]
    assert (model["id"], model["max_model_len"]) == (MODEL, 512)
    assert answer_of(app, f"/v1/models/{MODEL}") == model
    assert ask(app, "/v1/models/other/name").status_code == 404


def test_a_name_may_hold_a_slash(served_llm):
    app = app_of(served_llm)
    app.state.server.settings = type(app.state.server.settings)(model_name="owner/name")
    assert answer_of(app, "/v1/models/owner/name")["id"] == "owner/name"


def test_the_version_is_the_packages(app):
    assert answer_of(app, "/version") == {"version": fusedllm.__version__}


def test_a_text_is_tokenized_as_a_prompt_would_be(app, served_llm):
    answer = answer_of(app, "/tokenize", {"prompt": "Hello world", "return_token_strs": True}, TokenizeBody)
    ids = served_llm.encode("Hello world")
    assert answer == {
        "tokens": ids,
        "count": len(ids),
        "max_model_len": 512,
        "token_strs": [served_llm.tokenizer.token_text(token) for token in ids],
    }
    assert answer_of(app, "/tokenize", {"prompt": ""})["tokens"] == []


def test_a_conversation_is_tokenized_as_the_model_reads_it(app, served_llm):
    assert answer_of(app, "/tokenize", {"messages": MESSAGES})["tokens"] == served_llm.render(MESSAGES)
    open_ended = answer_of(app, "/tokenize", {"messages": MESSAGES, "add_generation_prompt": False})["tokens"]
    assert open_ended == served_llm.render(MESSAGES, add_generation_prompt=False)


@pytest.mark.parametrize("text", ["Hello world", "caf\u00e9 \U0001f600\n\n  x", "<|im_start|>user", ""])
@pytest.mark.parametrize("repeats", [1, 3000])
def test_detokenize_is_the_inverse(app, text, repeats):
    text *= repeats
    ids = answer_of(app, "/tokenize", {"prompt": text, "add_special_tokens": False})["tokens"]
    assert answer_of(app, "/detokenize", {"tokens": ids}, DetokenizeBody)["prompt"] == text


def test_either_a_prompt_or_messages(app):
    for body in ({}, {"prompt": "a", "messages": MESSAGES}, {"prompt": "a", "add_generation_prompt": True}):
        assert ask(app, "/tokenize", body).status_code == 400


def test_the_tokenizer_is_described(app, served_llm):
    info = answer_of(app, "/tokenizer_info", model=TokenizerInfoBody)
    assert info["eos_token"] == served_llm.tokenizer.data.eos_token
    assert info["chat_template"] == served_llm.tokenizer.data.chat_template
    assert info["vocab_size"] == served_llm.tokenizer.vocab_size


def test_openapi_describes_every_answer_and_knows_no_422(app):
    schema = answer_of(app, "/openapi.json")
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models", "/tokenize", "/version"} <= set(schema["paths"])
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            assert "422" not in operation["responses"], path
    answers = schema["paths"]["/v1/completions"]["post"]["responses"]
    assert {"200", "400", "401", "404", "413", "429", "500", "503", "504"} == set(answers)
    assert set(answers["200"]["content"]) == {"application/json", "text/event-stream"}
    request = schema["components"]["schemas"]["CompletionRequest"]
    assert request["additionalProperties"] is False
    assert "tools" not in request["properties"]


def test_there_is_no_page_that_loads_scripts_from_elsewhere(app):
    assert ask(app, "/docs").status_code == ask(app, "/redoc").status_code == 404
