"""Under a constraint's mask every output is what was asked for, and no grammar takes the process or its time."""

from __future__ import annotations

import json
import random
import re
import threading
import time
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_reference import load, tiny_metadata

from fusedllm.errors import RequestError
from fusedllm.text.constraint import MAX_SOURCE, Constraint
from fusedllm.text.constraint_trial import TRIAL_SECONDS, Tokens
from fusedllm.text.gguf_vocab import tokenizer_from_gguf
from fusedllm.text.tokenizer import Tokenizer
from fusedllm.weights.checkpoint import Checkpoint

VOCABULARIES = ["bpe:smollm", "spm:prefix", "spm:plain"]
EOS = (0, 2)
# Compilation in the trial's process ends after two seconds, and on a busy machine somewhat later.
BOUND_SECONDS = 10

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "é", 'quo"te']}, "maxItems": 3},
        "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
REGEXES = ["[a-c]{2,5}x?", "(foo|ba+r)[0-9]{1,3}", r"[0-9]{4}(-[0-9]{2}){2}", "(é|ü)+!", r"a/b\\c|\n", ".{3}"]
# The small BPE vocabulary has no token for three bytes; these characters are written without them.
CHARACTERS = st.characters(exclude_categories=["Cs"], max_codepoint=0xFFFF, exclude_characters="\v")


@cache
def tiny(name: str) -> Tokenizer:
    data = tokenizer_from_gguf(tiny_metadata(load("tiny_vocabularies"), name))
    assert data is not None
    return Tokenizer(data)


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_checkpoint: Checkpoint) -> Tokenizer:
    assert smollm2_checkpoint.tokenizer is not None
    return Tokenizer(smollm2_checkpoint.tokenizer)


def allowed(constraint: Constraint) -> list[int]:
    bits = np.unpackbits(constraint.mask().view(np.uint8), bitorder="little")
    return [int(token) for token in np.flatnonzero(bits)]


def walk(constraint: Constraint, tokenizer: Tokenizer, rng: random.Random, patience: int = 12) -> list[int]:
    """Random tokens under the mask, up to the end token; past its patience it takes what closes something."""
    ids: list[int] = []
    while True:
        choices = allowed(constraint)
        assert choices, "nothing may come, not even the end"
        ends = [token for token in choices if token in EOS]
        assert not ends or set(ends) == set(EOS), "one end token is as good as another"
        assert constraint.finished == (len(ends) == len(choices))
        late = len(ids) >= patience
        if ends and (late or len(ends) == len(choices) or rng.random() < 0.3):
            constraint.accept(ends[0])
            return ids
        choices = [token for token in choices if token not in EOS]
        if late:
            choices.sort(key=lambda token: (tokenizer.token_bytes(token)[:1] not in b'"}]', token))
            choices = choices[: 1 + rng.randrange(3)]
        ids.append(rng.choice(choices))
        constraint.accept(ids[-1])
        assert len(ids) < 2000


def written(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Every byte of the tokens; an output must be UTF-8."""
    return b"".join(tokenizer.token_bytes(token) for token in ids).decode()


@given(name=st.sampled_from(VOCABULARIES), seed=st.integers(0, 2**32))
@settings(max_examples=40)
def test_what_the_mask_of_json_allows_is_an_object(name: str, seed: int) -> None:
    tokenizer = tiny(name)
    constraint = Constraint.compile("json_object", None, tokenizer, EOS)
    text = written(tokenizer, walk(constraint, tokenizer, random.Random(seed)))
    assert isinstance(json.loads(text), dict)


def follows_schema(value: Any) -> bool:
    return (
        set(value) <= set(SCHEMA["properties"])  # type: ignore[arg-type, call-overload]
        and isinstance(value["name"], str)
        and len(value["name"]) <= 5
        and 0 <= value["age"] <= 120
        and all(tag in ("a", "é", 'quo"te') for tag in value.get("tags", []))
        and len(value.get("tags", [])) <= 3
        and (value.get("next") is None or follows_schema(value["next"]))
    )


@given(name=st.sampled_from(VOCABULARIES), seed=st.integers(0, 2**32), as_text=st.booleans())
@settings(max_examples=40)
def test_what_the_mask_of_a_schema_allows_follows_it(name: str, seed: int, as_text: bool) -> None:
    tokenizer = tiny(name)
    schema = json.dumps(SCHEMA) if as_text else SCHEMA
    constraint = Constraint.compile("json_schema", schema, tokenizer, EOS)
    assert follows_schema(json.loads(written(tokenizer, walk(constraint, tokenizer, random.Random(seed)))))


@given(name=st.sampled_from(VOCABULARIES), seed=st.integers(0, 2**32), regex=st.sampled_from(REGEXES))
@settings(max_examples=60)
def test_what_the_mask_of_a_regular_expression_allows_matches_it(name: str, seed: int, regex: str) -> None:
    tokenizer = tiny(name)
    constraint = Constraint.compile("regex", regex, tokenizer, EOS)
    assert re.fullmatch(regex, written(tokenizer, walk(constraint, tokenizer, random.Random(seed))))


@given(
    name=st.sampled_from(VOCABULARIES),
    seed=st.integers(0, 2**32),
    texts=st.lists(st.text(CHARACTERS, min_size=1, max_size=8), min_size=1, max_size=5),
)
@settings(max_examples=60)
def test_a_choice_gives_one_of_its_texts_whatever_is_in_them(name: str, seed: int, texts: list[str]) -> None:
    tokenizer = tiny(name)
    constraint = Constraint.compile("choice", texts, tokenizer, EOS)
    assert written(tokenizer, walk(constraint, tokenizer, random.Random(seed))) in texts


def test_what_the_vocabulary_can_not_write_is_refused() -> None:
    with pytest.raises(RequestError, match="no text that it allows"):
        Constraint.compile("choice", ["\v"], tiny("bpe:smollm"), EOS)


def test_a_grammar_gives_what_its_rules_derive() -> None:
    lark = 'start: sum\nsum: NUMBER ("+" NUMBER)*\nNUMBER: /[1-9][0-9]{0,2}/'
    tokenizer = tiny("bpe:smollm")
    for seed in range(10):
        constraint = Constraint.compile("grammar", lark, tokenizer, EOS)
        text = written(tokenizer, walk(constraint, tokenizer, random.Random(seed)))
        assert re.fullmatch(r"[1-9]\d{0,2}(\+[1-9]\d{0,2})*", text)


def test_a_real_vocabulary_follows_json_in_tokens_that_its_model_knows(smollm2_tokenizer: Tokenizer) -> None:
    for seed in range(5):
        constraint = Constraint.compile("json_schema", SCHEMA, smollm2_tokenizer, EOS)
        ids = walk(constraint, smollm2_tokenizer, random.Random(seed))
        assert follows_schema(json.loads(written(smollm2_tokenizer, ids)))
    # What is forced is forced in the tokens that the model's own tokenizer makes, not byte by byte.
    constraint = Constraint.compile("choice", ["The answer is forty-two"], smollm2_tokenizer, EOS)
    ids = walk(constraint, smollm2_tokenizer, random.Random(0))
    assert ids == smollm2_tokenizer.encode("The answer is forty-two", add_special=False)


def test_blanks_can_not_go_on_forever() -> None:
    tokenizer = tiny("bpe:smollm")
    constraint = Constraint.compile("json_object", None, tokenizer, EOS)
    constraint.accept(byte(tokenizer, "{"))
    blank = byte(tokenizer, "\n")
    for _ in range(65):
        constraint.accept(blank)
    assert blank not in allowed(constraint)


def byte(tokenizer: Tokenizer, character: str) -> int:
    wanted = character.encode()
    return next(token for token in range(tokenizer.vocab_size) if tokenizer.token_bytes(token) == wanted)


def test_a_token_that_may_not_come_is_refused_and_changes_nothing() -> None:
    tokenizer = tiny("bpe:smollm")
    constraint = Constraint.compile("regex", "ab+", tokenizer, EOS)
    before = allowed(constraint)
    for token in (byte(tokenizer, "b"), EOS[0], 10**6):
        with pytest.raises(RequestError, match="may not come"):
            constraint.accept(token)
    assert allowed(constraint) == before
    constraint.accept(byte(tokenizer, "a"))
    constraint.accept(byte(tokenizer, "b"))
    assert not constraint.finished
    constraint.accept(EOS[1])
    assert constraint.finished
    assert allowed(constraint) == list(EOS)
    with pytest.raises(RequestError, match="may not come"):
        constraint.accept(byte(tokenizer, "b"))


def test_special_tokens_are_no_text() -> None:
    tokenizer = tiny("bpe:smollm")
    constraint = Constraint.compile("regex", "(.|\n)+", tokenizer, EOS)
    assert not tokenizer.special_ids & set(allowed(constraint))
    # The user-defined token is shown as text, so that it counts as text.
    assert tokenizer.id_of("<tool>") in allowed(constraint)


def test_rows_of_logits_without_a_token_are_never_allowed() -> None:
    tokenizer = tiny("spm:plain")
    padded = tokenizer.vocab_size + 77
    constraint = Constraint.compile("regex", "(.|\n)*", tokenizer, EOS, vocab_size=padded)
    mask = constraint.mask()
    assert mask.dtype == np.uint32
    assert mask.shape == (-(-padded // 32),)
    assert max(allowed(constraint)) < tokenizer.vocab_size
    constraint.accept(EOS[0])
    assert constraint.mask().shape == mask.shape


def test_copies_go_their_own_ways() -> None:
    tokenizer = tiny("bpe:smollm")
    one = Constraint.compile("regex", "a[bc]d", tokenizer, EOS)
    a, b, c, d = (byte(tokenizer, character) for character in "abcd")
    one.accept(a)
    other, anew = one.copy(), one.fresh()
    one.accept(b)
    assert allowed(one) == [d]
    assert c in allowed(other)
    assert a in allowed(anew)
    assert d not in allowed(anew)
    other.accept(c)
    other.accept(d)
    other.accept(EOS[0])
    assert other.copy().finished
    assert not one.finished


def test_constraints_of_one_tokenizer_run_in_several_threads() -> None:
    tokenizer = tiny("bpe:smollm")
    start = Constraint.compile("json_schema", SCHEMA, tokenizer, EOS)
    results: list[bool] = []

    def run(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(5):
            shared = written(tokenizer, walk(start.fresh(), tokenizer, rng))
            own = Constraint.compile("regex", REGEXES[seed % 3], tokenizer, EOS)
            matched = re.fullmatch(REGEXES[seed % 3], written(tokenizer, walk(own, tokenizer, rng)))
            results.append(follows_schema(json.loads(shared)) and matched is not None)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 20


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        ("regex", "(a", "regular expression.*unclosed group"),
        ("regex", 5, "must be a text, and is a int"),
        ("regex", "a\ud800", "surrogate"),
        ("regex", "a" * (MAX_SOURCE + 1), "65537 characters; at most 65536"),
        ("grammar", 'start: "a" b', 'grammar.*unknown name: "b"'),
        ("grammar", "start: <|nope|>", "unknown special token"),
        ("json_schema", '{"type":', "is not JSON"),
        ("json_schema", {"type": "nope"}, "JSON schema can't be followed: Invalid type: nope"),
        ("json_schema", {"not": {"type": "string"}}, "Unimplemented keys"),
        ("json_schema", {"enum": [{1, 2}]}, "can't be written as JSON"),
        ("json_schema", {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "no text that it allows"),
        ("json_schema", {"$ref": "https://example.com/schema.json"}, "does not fetch"),
        ("choice", [], "at least one text"),
        ("choice", ["a", ""], "at least one character"),
        ("choice", "ab", "must be a list"),
        ("xml", "<a/>", "no constraint of the kind 'xml'; known are json_object"),
    ],
)
def test_what_can_not_be_followed_is_refused_in_one_sentence(kind: Any, source: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as error:
        Constraint.compile(kind, source, tiny("bpe:smollm"), EOS)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 450


def test_a_model_without_an_end_token_can_not_follow_a_grammar() -> None:
    for ends in ((), (-1,), (10**6,)):
        with pytest.raises(RequestError, match="end token"):
            Constraint.compile("json_object", None, tiny("bpe:smollm"), ends)


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


def chained(length: int, **between: Any) -> dict[str, Any]:
    definitions = {f"n{i}": {"properties": {"l": {"$ref": f"#/$defs/n{i + 1}"}}, **between} for i in range(length)}
    return {"$ref": "#/$defs/n0", "$defs": {**definitions, f"n{length}": {"type": "string"}}}


def rules(length: int) -> str:
    return "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(length)) + f'\nr{length}: "a"'


# Each of these ends the process, takes minutes, or takes gigabytes where it is not bounded.
HOSTILE: dict[str, tuple[Any, Any]] = {
    "a million repetitions": ("regex", "(a{1000}){1000}"),
    "an intersection of many": ("grammar", "start: R\nR: " + " & ".join(f"/.*a{i}.*/" for i in range(100))),
    "a chain of references": ("json_schema", chained(1000)),
    "nested schemas": ("json_schema", nested(4000)),
    "a chain of rules": ("grammar", rules(4000)),
    "parentheses": ("regex", "(" * 20000 + ")" * 20000),
    "doubling tokens": (
        "grammar",
        "start: R0\n" + "".join(f"R{i}: R{i + 1} R{i + 1}\n" for i in range(30)) + 'R30: "a"',
    ),
    "doubling rules": (
        "grammar",
        "start: r0\n" + "".join(f"r{i}: r{i + 1} r{i + 1}\n" for i in range(60)) + 'r60: "a"',
    ),
    "many patterns": ("json_schema", {"allOf": [{"type": "string", "pattern": f".*{i}.*"} for i in range(200)]}),
    "ten thousand objects": ("json_schema", {"anyOf": [{"required": [f"p{i}"]} for i in range(10000)]}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_source_is_refused_in_time(name: str) -> None:
    tokenizer = tiny("bpe:smollm")
    Constraint.compile("json_object", None, tokenizer, EOS)  # Whoever comes next may have to start the other process.
    began = time.perf_counter()
    with pytest.raises(RequestError):
        Constraint.compile(*HOSTILE[name], tokenizer, EOS)
    assert time.perf_counter() - began < BOUND_SECONDS
    assert Constraint.compile("regex", "ab", tokenizer, EOS).mask().any()


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("json_schema", {"anyOf": [{"const": f"v{i}"} for i in range(2000)]}),
        ("json_schema", {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(300)}}),
        ("json_schema", chained(50)),
        ("choice", [f"word {i}" for i in range(4000)]),
        ("regex", r"(\p{L}|\w){1,5000}"),
    ],
)
def test_a_large_source_is_followed(kind: Any, source: Any) -> None:
    constraint = Constraint.compile(kind, source, tiny("bpe:smollm"), EOS)
    assert constraint.mask().any()


def test_a_constraint_whose_masks_take_too_long_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    constraint = Constraint.compile("regex", "a{100}", tiny("bpe:smollm"), EOS)
    now = iter(range(0, 1000, 10))
    monkeypatch.setattr(time, "thread_time", lambda: next(now))
    with pytest.raises(RequestError, match="too long"):
        constraint.mask()


@given(text=st.text(CHARACTERS))
def test_the_longest_tokens_that_fit_write_any_text(text: str) -> None:
    tokenizer = tiny("spm:plain")  # It has a token for every byte.
    texts = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
    tokens = Tokens(texts, sorted(tokenizer.special_ids), [0])
    assert b"".join(texts[token] for token in tokens.longest_first(text)) == text.encode()
    assert Tokens.from_json(tokens.to_json()) == tokens


def test_a_grammar_that_takes_too_long_holds_up_neither_itself_again_nor_those_that_are_known() -> None:
    tokenizer = tiny("bpe:smollm")
    known = ("regex", "ab")
    Constraint.compile(*known, tokenizer, EOS)
    kind, source = HOSTILE["an intersection of many"]
    source += " & /.*b.*/"
    seconds: list[float] = []

    def refused() -> None:
        began = time.perf_counter()
        with pytest.raises(RequestError):
            Constraint.compile(kind, source, tokenizer, EOS)
        seconds.append(time.perf_counter() - began)

    thread = threading.Thread(target=refused)
    thread.start()
    time.sleep(0.3)
    began = time.perf_counter()
    assert Constraint.compile(*known, tokenizer, EOS).mask().any()
    # The trial of the other goes on for more than a second.
    assert time.perf_counter() - began < TRIAL_SECONDS / 2
    thread.join()
    refused()
    assert seconds[1] < TRIAL_SECONDS / 2 < seconds[0]
