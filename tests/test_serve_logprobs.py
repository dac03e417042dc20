"""Names and numbers of tokens in answers with log-probabilities."""

from __future__ import annotations

import math

from fusedllm.engine.request import TokenLogprob
from fusedllm.serve.logprobs import FLOOR, LegacyFormat, finite, token_label


def test_tokens_that_are_no_text_have_labels_that_differ(served_llm):
    tokenizer = served_llm.tokenizer
    halves = tokenizer.encode("\U0001f9ff")
    assert len(halves) > 1
    labels = [token_label(tokenizer, token) for token in halves]
    assert len(set(labels)) == len(labels)
    assert all(label.startswith("bytes:\\x") for label in labels)
    assert token_label(None, 7) == "token_id:7"


def test_offsets_count_characters_that_are_complete(served_llm):
    halves = served_llm.tokenizer.encode("a\U0001f9ffb")
    form = LegacyFormat(served_llm.tokenizer, 0)
    offsets = form.answer([TokenLogprob(token, -1.0) for token in halves])["text_offset"]
    assert offsets == [0, *[1] * (len(halves) - 2), 2]


def test_numbers_that_json_does_not_have_become_the_floor():
    assert finite(-math.inf) == finite(math.nan) == FLOOR
    assert finite(-1.5) == -1.5
