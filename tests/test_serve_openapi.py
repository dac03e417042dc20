"""Requests made up from the served OpenAPI: no server error, and no answer that the description does not know."""

from __future__ import annotations

import hypothesis
import pytest
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from serving import app_of

# Ours is stricter than the description can say (n and the queue, tokens and the vocabulary), so that what follows the
# description may be refused; and a body that is refused by one reading of it may be accepted by another.
CHECKED = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


EXAMPLES = 20

POSTS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
GETS = ("/v1/models", "/v1/models/{name}", "/tokenizer_info", "/version")


@pytest.mark.parametrize("mode", [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE])
def test_made_up_requests_are_answered_as_described(served_llm, mode):
    # Few tokens for each request: what is tried here is what surrounds them.
    api = schemathesis.openapi.from_asgi("/openapi.json", app_of(served_llm, max_tokens=2, max_n=2, min_priority=-1000))
    seen = set()
    for result in api.get_all_operations():
        operation = result.ok()
        # Any text may be a model's name, so that only bodies can be wrong.
        if operation.path not in (POSTS if mode.is_negative else POSTS + GETS):
            continue

        @hypothesis.settings(
            max_examples=EXAMPLES,
            derandomize=True,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(operation.as_strategy(generation_mode=mode))
        def answered(case):
            response = case.call_and_validate(checks=CHECKED)
            seen.add((case.operation.path, response.status_code))

        answered()
    expected = 400 if mode.is_negative else 200
    # (A conversation to be tokenized, or a prompt: the description can't say that it is one of both. Nor can it say
    # which of a completion's many parameters go together, so that of a few made-up ones all may be refused.)
    unsure = ("/tokenize",) if mode.is_negative else ("/tokenize", "/v1/completions")
    assert {(path, expected) for path in POSTS if path not in unsure} <= seen
