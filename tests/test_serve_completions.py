"""/v1/completions says what `LLM.generate` says, in OpenAI's words."""

from __future__ import annotations

import pytest
from conftest import TINY, TINY_ENGINE
from serving import MODEL, app_of, ask, events_of, settle

from fusedllm.engine.request import Chunk, TokenLogprob
from fusedllm.llm import LLM
from fusedllm.serve.logprobs import token_label
from fusedllm.serve.schemas_completions import CompletionBody
from fusedllm.weights.random import random_params

PATH = "/v1/completions"
PROMPT = "The capital of France is"
GREEDY = {"prompt": PROMPT, "temperature": 0, "max_tokens": 8}


@pytest.fixture(scope="module")
def app(served_llm):
    return app_of(served_llm)


def answer_of(app, body):
    response = ask(app, PATH, body)
    assert response.status_code == 200, response.text
    # As strict as can be: what OpenAPI says of the answer is true.
    CompletionBody.model_validate_json(response.text, strict=True, extra="forbid")
    return response.json()


def joined(events, index=0):
    """The text of a streamed choice."""
    return "".join(choice["text"] for event in events for choice in event["choices"] if choice["index"] == index)


def test_a_text_is_continued_as_the_model_does(app, served_llm):
    answer = answer_of(app, {**GREEDY, "model": MODEL})
    expected = served_llm.generate(PROMPT, max_tokens=8)[0]
    assert answer["choices"] == [{"index": 0, "text": expected.text, "logprobs": None, "finish_reason": "length"}]
    assert answer["usage"] == {
        "prompt_tokens": expected.usage.prompt_tokens,
        "completion_tokens": 8,
        "total_tokens": expected.usage.prompt_tokens + 8,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert (answer["model"], answer["object"]) == (MODEL, "text_completion")


def test_token_ids_are_as_good_as_their_text(app, served_llm):
    text = answer_of(app, GREEDY)["choices"][0]["text"]
    ids = served_llm.encode(PROMPT)
    assert answer_of(app, {**GREEDY, "prompt": ids})["choices"][0]["text"] == text
    assert [choice["text"] for choice in answer_of(app, {**GREEDY, "prompt": [ids, ids]})["choices"]] == [text, text]


def test_several_prompts_are_answered_in_their_order_n_times_each(app, served_llm):
    prompts = ["One, two,", "The sky is"]
    answer = answer_of(app, {**GREEDY, "prompt": prompts, "n": 2, "max_tokens": 3})
    expected = [result.text for result in served_llm.generate(prompts, max_tokens=3)]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in answer["choices"]] == [expected[0]] * 2 + [expected[1]] * 2
    # A prompt counts once however many answers it gets.
    assert answer["usage"]["prompt_tokens"] == sum(len(served_llm.encode(prompt)) for prompt in prompts)
    assert answer["usage"]["completion_tokens"] == 12


def test_the_default_is_sixteen_tokens_at_a_temperature_of_one(app):
    answer = answer_of(app, {"prompt": PROMPT, "seed": 3, "ignore_eos": True})
    assert answer["usage"]["completion_tokens"] == 16
    assert answer == {
        **answer_of(app, {"prompt": PROMPT, "seed": 3, "ignore_eos": True, "temperature": 1.0}),
        **differing(answer),
    }
    assert answer["choices"] != answer_of(app, {"prompt": PROMPT, "seed": 4, "ignore_eos": True})["choices"]


def differing(answer):
    """What is another in every answer."""
    return {"id": answer["id"], "created": answer["created"]}


def test_each_of_n_answers_has_the_next_seed(app):
    body = {"prompt": PROMPT, "max_tokens": 6, "seed": 2**64 - 1}
    texts = [choice["text"] for choice in answer_of(app, {**body, "n": 3})["choices"]]
    # The seed after the greatest is zero.
    assert texts[1] == answer_of(app, {**body, "seed": 0})["choices"][0]["text"]
    assert len(set(texts)) == 3


def test_a_stop_string_ends_an_answer_and_is_no_part_of_it(app, served_llm):
    text = served_llm.generate(PROMPT, max_tokens=8)[0].text
    stop = text[4:7]
    answer = answer_of(app, {**GREEDY, "stop": stop})
    assert answer["choices"][0]["text"] == text[: text.index(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop"
    events = events_of(ask(app, PATH, {**GREEDY, "stop": ["never said", stop], "stream": True}))
    assert joined(events) == text[: text.index(stop)]
    assert events[-1]["choices"][0]["finish_reason"] == "stop"
    # The engine hears of a stop string when its next step begins.
    settle(lambda: served_llm.engine.pages_in_use == 0)


def test_a_stop_token_ends_an_answer(app, served_llm):
    ids = served_llm.generate(PROMPT, max_tokens=8)[0].token_ids
    answer = answer_of(app, {**GREEDY, "stop_token_ids": [ids[2]], "logprobs": 0})
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["text"] == served_llm.tokenizer.decode(ids[:2])
    # The token that ended it was drawn, and is counted and scored.
    assert answer["usage"]["completion_tokens"] == 3
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == 3


def test_a_bias_moves_the_answer(app, served_llm):
    token = served_llm.encode(" London")[0]
    text = answer_of(app, {**GREEDY, "max_tokens": 1, "logit_bias": {str(token): 100}})["choices"][0]["text"]
    assert text == " London"


def test_penalties_reach_the_engine(app):
    plain = answer_of(app, {**GREEDY, "max_tokens": 24, "ignore_eos": True})
    for name, value in (("frequency_penalty", 2.0), ("presence_penalty", 2.0), ("repetition_penalty", 1.8)):
        moved = answer_of(app, {**GREEDY, "max_tokens": 24, "ignore_eos": True, name: value})
        assert moved["choices"][0]["text"] != plain["choices"][0]["text"], name


def test_log_probabilities_are_those_of_the_model_with_offsets_into_the_text(app, served_llm):
    choice = answer_of(app, {**GREEDY, "logprobs": 3})["choices"][0]
    expected = served_llm.generate(PROMPT, max_tokens=8, logprobs=3)[0]
    found = choice["logprobs"]
    assert found["token_logprobs"] == [entry.logprob for entry in expected.logprobs]
    assert [len(top) for top in found["top_logprobs"]] == [3] * 8
    assert "".join(found["tokens"]) == choice["text"]
    for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
        assert choice["text"][offset:].startswith(token)
    # Greedy: the drawn token is the likeliest, and by the same number.
    assert all(
        max(top.values()) == own for top, own in zip(found["top_logprobs"], found["token_logprobs"], strict=True)
    )
    assert answer_of(app, {**GREEDY, "logprobs": 0})["choices"][0]["logprobs"]["top_logprobs"] is None


def test_streamed_log_probabilities_are_the_same_and_their_offsets_go_on(app):
    body = {**GREEDY, "logprobs": 2, "max_tokens": 20}
    whole = answer_of(app, body)["choices"][0]
    parts = [event["choices"][0] for event in events_of(ask(app, PATH, {**body, "stream": True}))]
    assert "".join(part["text"] for part in parts) == whole["text"]
    for name, values in whole["logprobs"].items():
        assert [value for part in parts if part["logprobs"] for value in part["logprobs"][name]] == values


def test_the_prompt_is_echoed_as_it_was_given(app, served_llm):
    text = answer_of(app, GREEDY)["choices"][0]["text"]
    assert answer_of(app, {**GREEDY, "echo": True})["choices"][0]["text"] == PROMPT + text
    ids = served_llm.encode(PROMPT)
    assert answer_of(app, {**GREEDY, "prompt": ids, "echo": True})["choices"][0]["text"] == PROMPT + text
    events = events_of(ask(app, PATH, {**GREEDY, "prompt": ["A", PROMPT], "echo": True, "stream": True}))
    assert joined(events, 1) == PROMPT + text


@pytest.mark.parametrize("stream", [False, True])
def test_no_tokens_and_an_echo_are_the_prompt(app, stream):
    body = {"prompt": [PROMPT, "B"], "echo": True, "max_tokens": 0}
    if stream:
        options = {"stream": True, "stream_options": {"include_usage": True}}
        events = events_of(ask(app, PATH, {**body, **options}))
        assert [joined(events, index) for index in (0, 1)] == [PROMPT, "B"]
        usage = events[-1]["usage"]
    else:
        answer = answer_of(app, body)
        assert [choice["text"] for choice in answer["choices"]] == [PROMPT, "B"]
        assert [choice["finish_reason"] for choice in answer["choices"]] == ["length"] * 2
        usage = answer["usage"]
    assert usage["completion_tokens"] == 0


@pytest.fixture
def scored(served_llm, monkeypatch):
    """An engine that answers with the token 42 and scores every token of the prompt by its id."""

    def submit(sequence, deliver):
        top = ((1, -0.5), (2, -1.5))
        prompt = tuple(TokenLogprob(token, -float(token), top) for token in sequence.prompt[1:])
        drawn = TokenLogprob(42, -0.25, ((42, -0.25), (7, -3.0)))
        sequence.finish_reason = "length"
        deliver(Chunk((42,), (drawn,), "length", prompt))

    monkeypatch.setattr(served_llm.engine, "submit", submit)
    return served_llm


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 1])
def test_an_echo_with_log_probabilities_scores_the_prompt(app, scored, stream, max_tokens):
    body = {"prompt": PROMPT, "echo": True, "logprobs": 2, "max_tokens": max_tokens, "stream": stream}
    ids = scored.encode(PROMPT)
    if stream:
        found = events_of(ask(app, PATH, body))[0]["choices"][0]["logprobs"]
    else:
        found = answer_of(app, body)["choices"][0]["logprobs"]
    # Nothing comes before the first token, so it has no probability.
    assert found["token_logprobs"] == [None, *(-float(token) for token in ids[1:]), *[-0.25] * max_tokens]
    assert found["top_logprobs"][0] is None
    # The token itself is among the likely ones, also where it is not likely.
    assert found["top_logprobs"][1] == {
        token_label(scored.tokenizer, 1): -0.5,
        token_label(scored.tokenizer, 2): -1.5,
        token_label(scored.tokenizer, ids[1]): -float(ids[1]),
    }
    assert "".join(found["tokens"][: len(ids)]) == PROMPT
    assert found["text_offset"][: len(ids)] == [len("".join(found["tokens"][:n])) for n in range(len(ids))]
    assert found["text_offset"][len(ids) :] == [len(PROMPT)] * max_tokens


def test_the_engine_scores_an_echoed_prompt(app, served_llm):
    body = {"prompt": PROMPT, "echo": True, "logprobs": 1, "max_tokens": 1}
    found = answer_of(app, body)["choices"][0]["logprobs"]["token_logprobs"]
    expected = served_llm.engine.score(served_llm.encode(PROMPT))
    # Two programs of the same float32 arithmetic in another order.
    assert found[1:-1] == pytest.approx(list(expected), abs=1e-3)


def test_a_model_without_a_tokenizer_answers_ids():
    llm = LLM(TINY, random_params(TINY, "float32", seed=1), engine=TINY_ENGINE)
    llm.engine.start()
    app = app_of(llm)
    answer = answer_of(app, {"prompt": [5, 6, 7], "max_tokens": 3, "temperature": 0, "logprobs": 1})
    expected = llm.generate([5, 6, 7], max_tokens=3)[0]
    labels = [f"token_id:{token}" for token in expected.token_ids]
    assert answer["choices"][0]["logprobs"]["tokens"] == labels
    assert ask(app, PATH, {"prompt": "text"}).status_code == 400
    assert ask(app, "/tokenize", {"prompt": "text"}).status_code == 400
    llm.engine.stop()
