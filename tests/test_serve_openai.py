"""OpenAI's own client, with strict validation of every response, through a real port."""

from __future__ import annotations

import asyncio
import json
import re

import openai
import pytest
from serving import MODEL, app_of, on_a_port

MESSAGES = [{"role": "user", "content": "Say hello."}]
GREEDY = {"model": MODEL, "temperature": 0, "max_tokens": 8}
STRICT = {"api_key": "none", "_strict_response_validation": True, "max_retries": 0, "timeout": 60}


@pytest.fixture(scope="module")
def url(served_llm):
    with on_a_port(app_of(served_llm)) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", **STRICT) as client:
        yield client


@pytest.fixture(scope="module")
def texts_client(url):
    """For streams of /v1/completions: their `finish_reason` is null until the last, which the client's type forbids."""
    with openai.OpenAI(base_url=f"{url}/v1", **{**STRICT, "_strict_response_validation": False}) as client:
        yield client


def asynchronously(url, work):
    async def run():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", **STRICT) as client:
            return await work(client)

    return asyncio.run(run())


def test_models_are_listed_and_found_by_name(client):
    (model,) = client.models.list().data
    assert model.id == MODEL
    assert client.models.retrieve(MODEL) == model
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-5")
    assert caught.value.code == "model_not_found"


def test_a_chat_is_answered(client, served_llm):
    answer = client.chat.completions.create(messages=MESSAGES, **GREEDY)
    expected = served_llm.chat(MESSAGES, max_tokens=8)
    assert answer.choices[0].message.content == expected.text
    assert answer.usage.total_tokens == expected.usage.total_tokens
    # Whole pages, of which other tests may have cached some; the last token is always computed.
    assert answer.usage.prompt_tokens_details.cached_tokens in range(0, answer.usage.prompt_tokens, 16)


def test_a_chat_is_streamed_with_its_usage(client, served_llm):
    stream = client.chat.completions.create(
        messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    expected = served_llm.chat(MESSAGES, max_tokens=8)
    assert text == expected.text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage.completion_tokens == expected.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_clients_own_reading_of_a_stream_makes_a_whole_answer(client, served_llm):
    # It takes an answer that was cut for an error, so this one may come to its end.
    options = {**GREEDY, "max_tokens": 60}
    with client.chat.completions.stream(messages=MESSAGES, logprobs=True, top_logprobs=1, **options) as stream:
        answer = stream.get_final_completion()
    assert answer.choices[0].message.content == served_llm.chat(MESSAGES, max_tokens=60).text
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].logprobs.content[0].top_logprobs[0].bytes


def test_log_probabilities_of_a_chat_are_read(client):
    answer = client.chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=3, **GREEDY)
    entries = answer.choices[0].logprobs.content
    assert all(len(entry.top_logprobs) == 3 for entry in entries)
    assert "".join(entry.token for entry in entries) == answer.choices[0].message.content


def test_completions_are_answered_and_streamed_with_log_probabilities(client, texts_client, served_llm):
    answer = client.completions.create(prompt="One, two,", logprobs=2, n=2, seed=1, **GREEDY)
    expected = served_llm.generate("One, two,", max_tokens=8)[0].text
    assert [choice.text for choice in answer.choices] == [expected] * 2
    assert len(answer.choices[1].logprobs.top_logprobs) == 8
    chunks = list(texts_client.completions.create(prompt="One, two,", logprobs=2, stream=True, **GREEDY))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    ids = served_llm.encode("One, two,")
    assert client.completions.create(prompt=[ids, ids], **GREEDY).choices[1].text == expected


def test_sampling_parameters_of_the_api_and_ours_pass(client):
    answer = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        max_completion_tokens=4,
        top_p=0.9,
        presence_penalty=0.5,
        frequency_penalty=0.5,
        logit_bias={"5": -100},
        seed=7,
        stop=["never said"],
        user="me",
        extra_body={"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.1, "ignore_eos": True, "priority": 1},
    )
    assert answer.usage.completion_tokens == 4


def test_an_async_client_has_many_answers_at_once(url, served_llm):
    async def work(client):
        async def streamed(number):
            chunks = await client.chat.completions.create(messages=MESSAGES, stream=True, **GREEDY)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

        async def whole(number):
            answer = await client.completions.create(prompt=f"{number}, {number + 1},", **GREEDY)
            return answer.choices[0].text

        return await asyncio.gather(*map(streamed, range(4)), *map(whole, range(4)))

    answers = asynchronously(url, work)
    # The same request has the same answer, whoever else asks: these are of one length and in one bucket.
    assert len(set(answers[:4])) == 1
    assert all(answers)


def test_refusals_are_the_clients_exceptions(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            messages=MESSAGES, tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}], **GREEDY
        )
    assert (caught.value.param, caught.value.code) == ("tools", "unsupported_parameter")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(prompt="word " * 600, **GREEDY)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(**{**GREEDY, "model": "gpt-5"}, prompt="Hi")


def test_an_error_in_a_stream_is_the_clients_exception(texts_client, served_llm, monkeypatch):
    from fusedllm.engine.request import Chunk

    def submit(sequence, deliver):
        deliver(Chunk((19556,), (), None))
        deliver(Chunk((), (), "error"))

    monkeypatch.setattr(served_llm.engine, "submit", submit)
    texts = []
    with pytest.raises(openai.APIError, match="failed"):  # noqa: PT012, the stream fails while it is read
        for chunk in texts_client.completions.create(prompt="Hi", stream=True, **GREEDY):
            texts.append(chunk.choices[0].text)
    assert texts == ["Hello"]


def test_a_stream_may_be_closed_midway(client, texts_client):
    stream = texts_client.completions.create(
        prompt="Hi", stream=True, model=MODEL, max_tokens=300, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    assert client.completions.create(prompt="Hi", **GREEDY).usage.completion_tokens == 8


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0, 1])
def test_an_answer_follows_its_schema_whole_and_streamed(client, temperature):
    asked = {
        "model": MODEL, "messages": [{"role": "user", "content": "Describe a person."}], "temperature": temperature,
        "seed": 5, "max_tokens": 200,
        "response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}},
    }  # fmt: skip
    answer = client.chat.completions.create(**asked)
    assert answer.choices[0].finish_reason == "stop"
    person = json.loads(answer.choices[0].message.content)
    assert set(person) == {"name", "age"}
    assert isinstance(person["age"], int)
    pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**asked, stream=True)]
    assert "".join(pieces) == answer.choices[0].message.content


def test_two_answers_to_one_prompt_follow_the_schema_each(client):
    answers = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, n=2, seed=1, temperature=1, max_tokens=60,
        extra_body={"structured_outputs": {"regex": "(yes|no), [a-z]{3,5}!"}},
    )  # fmt: skip
    assert all(re.fullmatch(r"(yes|no), [a-z]{3,5}!", choice.message.content) for choice in answers.choices)
