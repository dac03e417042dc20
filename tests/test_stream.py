"""A stream shows whole characters, nothing of a stop string, and in the end everything that `decode` would."""

from __future__ import annotations

import time
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_reference import load, tiny_metadata

from fusedllm.errors import RequestError
from fusedllm.text.gguf_vocab import tokenizer_from_gguf
from fusedllm.text.stream import TextStream
from fusedllm.text.tokenizer import Tokenizer


@cache
def tiny(name: str) -> Tokenizer:
    data = tokenizer_from_gguf(tiny_metadata(load("tiny_vocabularies"), name))
    assert data is not None
    return Tokenizer(data)


NAMES = st.sampled_from(["bpe:smollm", "spm:prefix", "spm:plain"])
# The first few hundred ids are special tokens and single bytes, most of which are no character by themselves.
IDS = st.lists(st.one_of(st.integers(0, 270), st.integers(0, 720), st.just(10**6)), max_size=60)
STOPS = st.lists(st.text("ab c\ufffd", min_size=1, max_size=5), max_size=4)


def cut(text: str, stops: list[str]) -> str:
    """`text` before the stop string that is complete first."""
    ends = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    return text[: min(ends)[1]] if ends else text


def run(stream: TextStream, ids: list[int]) -> str:
    return "".join(stream.push([token_id]) for token_id in ids) + stream.finish()


@given(name=NAMES, ids=IDS)
@settings(deadline=None)
def test_the_pieces_together_are_what_decode_gives(name: str, ids: list[int]) -> None:
    stream = TextStream(tiny(name))
    assert run(stream, ids) == stream.text == tiny(name).decode(ids)
    assert stream.token_count == len(ids)


@given(ids=IDS)
@settings(deadline=None)
def test_special_tokens_are_shown_when_asked(ids: list[int]) -> None:
    tokenizer = tiny("bpe:smollm")
    stream = TextStream(tokenizer, skip_special_tokens=False)
    assert run(stream, ids) == tokenizer.decode(ids, skip_special_tokens=False)


@given(name=NAMES, ids=IDS)
@settings(deadline=None)
def test_decode_is_the_decode_of_the_library_wherever_the_bytes_are_text(name: str, ids: list[int]) -> None:
    tokenizer = tiny(name)
    theirs = tokenizer._library.decode([token_id for token_id in ids if token_id < tokenizer.vocab_size])
    # SentencePiece in the library gives up every byte of a run in which one is wrong; byte-level BPE does as we do.
    if name == "bpe:smollm" or "\ufffd" not in theirs:
        assert tokenizer.decode(ids) == theirs


@given(text=st.text("ab c", max_size=40), stops=STOPS, step=st.integers(1, 5))
@settings(deadline=None, max_examples=300)
def test_the_text_ends_before_the_stop_string_that_is_complete_first(text: str, stops: list[str], step: int) -> None:
    tokenizer = tiny("bpe:smollm")
    ids = tokenizer.encode(text)
    stream = TextStream(tokenizer, stops)
    pieces = [stream.push(ids[start : start + step]) for start in range(0, len(ids), step)]
    pieces.append(stream.finish())
    assert "".join(pieces) == stream.text == cut(text, stops)
    assert (stream.stopped is None) == (not any(stop in text for stop in stops))
    for count in range(1, len(pieces)):
        known, shown = tokenizer.decode(ids[: count * step]), "".join(pieces[:count])
        beginnings = [stop[:length] for stop in stops for length in range(1, len(stop))]
        if cut(known, stops) == known:
            assert all(len(shown) <= len(known) - len(part) for part in beginnings if known.endswith(part))


@given(ids=IDS, stops=STOPS)
@settings(deadline=None)
def test_stop_strings_among_broken_characters(ids: list[int], stops: list[str]) -> None:
    tokenizer = tiny("bpe:smollm")
    assert run(TextStream(tokenizer, stops), ids) == cut(tokenizer.decode(ids), stops)


@given(ids=IDS, stops=STOPS)
@settings(deadline=None)
def test_the_token_count_is_that_of_the_token_that_completed_the_stop_string(ids: list[int], stops: list[str]) -> None:
    tokenizer = tiny("bpe:smollm")
    stream = TextStream(tokenizer, stops)
    stream.push(ids)
    if stream.stopped is not None:
        again = TextStream(tokenizer, stops)
        again.push(ids[: stream.token_count - 1])
        assert again.stopped is None
        again.push([ids[stream.token_count - 1]])
        assert again.stopped == stream.stopped


def test_an_emoji_across_tokens_is_shown_whole() -> None:
    tokenizer = tiny("bpe:smollm")
    emoji = "\U0001f9a9\u200d\U0001f9c7"
    stream = TextStream(tokenizer)
    pieces = [stream.push([token_id]) for token_id in tokenizer.encode(emoji)]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == emoji
    assert "" in pieces


def test_a_held_beginning_is_shown_at_the_end() -> None:
    tokenizer = tiny("bpe:smollm")
    stream = TextStream(tokenizer, ["ab!"])
    assert stream.push(tokenizer.encode("c ab")) == "c "
    assert stream.finish() == "ab"
    assert stream.stopped is None


def test_nothing_follows_a_stop_string() -> None:
    tokenizer = tiny("bpe:smollm")
    stream = TextStream(tokenizer, "b")
    assert stream.push(tokenizer.encode("a b c")) == "a "
    assert stream.stopped == "b"
    count = stream.token_count
    assert stream.push(tokenizer.encode("more")) == stream.finish() == ""
    assert stream.token_count == count
    assert stream.text == "a "


def test_a_token_costs_the_same_after_a_hundred_thousand() -> None:
    # A first byte without its second: what holds a window over `decode` open for ever.
    tokenizer = tiny("bpe:smollm")
    lonely = next(token_id for token_id in range(300) if tokenizer.token_bytes(token_id) == b"\xe2")
    stream = TextStream(tokenizer, ["stop"])

    def seconds(count: int) -> float:
        start = time.process_time()
        for _ in range(count):
            stream.push([lonely])
        return time.process_time() - start

    early = seconds(20_000)
    seconds(60_000)
    # A cost that grew with the length would be five times as high by now.
    assert seconds(20_000) < 3 * early


@pytest.mark.parametrize("stop", [[""], ["a", ""], [5]])
def test_an_empty_stop_string_is_refused(stop: list[str]) -> None:
    with pytest.raises(RequestError, match="at least one character"):
        TextStream(tiny("bpe:smollm"), stop)
