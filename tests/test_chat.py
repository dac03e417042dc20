"""Chat templates render as Hugging Face renders them, and fail in sentences."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
from text_reference import BRACKETS, CHAT_CASES, CHATML, load

from fusedllm.errors import FusedLLMError, RequestError, TokenizerError
from fusedllm.text.chat import MAX_SOURCE, ChatTemplate
from fusedllm.text.data import TokenizerData
from fusedllm.text.tokenizer import Tokenizer

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": None}
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize("number", range(len(CHAT_CASES)))
def test_a_prompt_is_the_one_that_apply_chat_template_makes(number: int) -> None:
    case = CHAT_CASES[number]
    assert ChatTemplate(case.template, SPECIAL).render(case.messages, **case.variables) == load("chat")[number]


@pytest.mark.reference
def test_the_stored_prompts_are_those_of_the_installed_transformers() -> None:
    pytest.importorskip("transformers")
    from reference.make_tokenizer_reference import chat_cases

    assert chat_cases() == load("chat")


def test_the_clock_is_there() -> None:
    year = ChatTemplate("{{ strftime_now('%Y') }}").render(HELLO)
    assert int(year) - datetime.date.today().year in (-1, 0, 1)


def test_json_is_plain() -> None:
    source = (
        "{{ messages[0].content | tojson }} {{ {'b': 1, 'a': '<é>'} | tojson(separators=(',', ':'), sort_keys=true) }}"
    )
    assert ChatTemplate(source).render([{"role": "user", "content": "<b> & 'é'"}]) == '"<b> & \'é\'" {"a":"<é>","b":1}'


def test_a_template_may_refuse_the_messages() -> None:
    with pytest.raises(RequestError, match="refuses these messages: roles must alternate"):
        ChatTemplate(BRACKETS, SPECIAL).render([*HELLO, *HELLO])


@pytest.mark.parametrize("messages", [[], "Hello", {"role": "user"}, [1], [{"role": "user"}], [{"content": "a"}], None])
def test_messages_of_another_shape_are_refused(messages: Any) -> None:
    with pytest.raises(RequestError, match="message"):
        ChatTemplate(CHATML).render(messages)


@pytest.mark.parametrize("message", [{"role": 3, "content": "a"}, {"role": "user", "content": 3}])
def test_a_message_of_another_type_is_refused_by_number(message: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="message 1"):
        ChatTemplate(CHATML).render([*HELLO, message])


@pytest.mark.parametrize(
    "source",
    ["{% if %}", "{{ 'a }}", "{% endfor %}", "{% nonesuch %}", "{{ 1 | nonesuch }}", "{% generation %}", "(" * 5],
)
def test_a_source_that_is_no_template_is_refused_with_its_line(source: str) -> None:
    if source.startswith("("):
        source = "\n{{ " + source
    with pytest.raises(TokenizerError, match=r"line [12] of the chat template"):
        ChatTemplate(source).render(HELLO)


def test_a_template_without_end_is_refused() -> None:
    with pytest.raises(TokenizerError, match="longer than"):
        ChatTemplate("a" * (MAX_SOURCE + 1)).render(HELLO)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ 'a' * 10**9 }}",
        "{{ 10**9 * [0] }}",
        "{{ 10 ** (10 ** 9) }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ 'a' * 100000 }}{% endfor %}{% endfor %}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ messages[0]['content'] + 1 }}",
        "{{ nonesuch.attribute }}",
        "{{ 1 // 0 }}",
    ],
)
def test_a_hostile_or_broken_template_ends_in_one_sentence(source: str) -> None:
    with pytest.raises(FusedLLMError) as caught:
        ChatTemplate(source).render(HELLO)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_without_a_template_says_so() -> None:
    with pytest.raises(TokenizerError, match="no chat template"):
        Tokenizer(TokenizerData("{}")).chat_template()


def test_a_tokenizer_hands_its_special_tokens_to_its_template() -> None:
    data = TokenizerData("{}", "{{ bos_token }}{{ eot_token }}", bos_token="<s>", special_tokens={"eot_token": "<e>"})
    assert Tokenizer(data).chat_template().render(HELLO) == "<s><e>"
