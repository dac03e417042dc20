"""What a request may not bring: each abuse has one answer, and the next request is served."""

from __future__ import annotations

import json
import time

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from operations_stand_in import Model, connect, exchange, serving, status_of

from fusedllm.serve.limits import MOST_NESTED, is_nested_deeper

MOST_BODY = 2**18
# Long enough for an ordinary request on a busy machine, short enough to wait for.
SECONDS = 0.6

POST = b"POST /v1/completions HTTP/1.1\r\nhost: server\r\ncontent-type: application/json\r\n"


@pytest.fixture(scope="module")
def model():
    return Model()


@pytest.fixture(scope="module")
def handle(model):
    limits = {"max_body_bytes": MOST_BODY, "body_seconds": SECONDS}
    with serving(model, **limits) as handle:
        yield handle


@pytest.fixture(autouse=True)
def still_serves(handle):
    yield
    answer = httpx.post(f"{handle.url}/v1/completions", json={"events": 1})
    assert answer.status_code == 200


def post(handle, content, **headers):
    headers = {"content-type": "application/json", **headers}
    return httpx.post(f"{handle.url}/v1/completions", content=content, headers=headers)


def is_error(response, status, code=None):
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].endswith(".")
    assert error["code"] == code
    return True


def test_a_body_of_just_the_allowed_size_is_taken(handle):
    body = b"{" + b" " * (MOST_BODY - 2) + b"}"
    assert post(handle, body).json()["bytes"] == MOST_BODY
    assert post(handle, (body[at : at + 999] for at in range(0, len(body), 999))).json()["bytes"] == MOST_BODY


def test_a_body_that_says_it_is_too_large_is_refused_unread(handle):
    head = POST + b"content-length: 99999999999\r\n\r\n"
    started = time.perf_counter()
    response = exchange(handle, [head])
    assert status_of(response) == 413
    assert time.perf_counter() - started < 5


def test_a_whole_body_that_is_too_large_still_gets_its_answer(handle):
    """Closing at once would reset the connection under a client that is still sending."""
    assert is_error(post(handle, b" " * (20 * MOST_BODY)), 413, "body_too_large")


def test_a_streamed_body_that_becomes_too_large_is_refused(handle):
    assert is_error(post(handle, (b" " * 2**16 for _ in range(6))), 413, "body_too_large")


@pytest.mark.parametrize("head", [b"content-length: 100\r\n\r\n", b"transfer-encoding: chunked\r\n\r\n"])
def test_a_body_of_one_byte_at_a_time_runs_out_of_time(handle, head):
    byte = b"[" if head.startswith(b"content") else b"1\r\n[\r\n"
    started = time.perf_counter()
    response = exchange(handle, [POST + head, *[byte] * 40], pause=0.1)
    assert status_of(response) == 408
    assert b"body_timeout" in response
    assert time.perf_counter() - started < 40 * 0.1 + 2


def test_a_stranger_is_refused_before_the_body_is_read():
    """So that nobody without a key can make the server hold one."""
    with serving(api_keys=("a-key",)) as handle:
        response = exchange(handle, [POST + b"content-length: 4000000\r\n\r\n"])
        assert status_of(response) == 401


@pytest.mark.parametrize("body", [b"\xff" * 1000, bytes(range(256)), '{"a": 1}'.encode("utf-16"), b"\0" * 10])
def test_a_binary_body_is_refused(handle, body):
    assert is_error(post(handle, body), 400, "not_utf8")


@pytest.mark.parametrize("unit", [b"[", b'{"a":', b'[{"a":'])
def test_a_deeply_nested_body_is_refused(handle, unit):
    assert is_error(post(handle, unit * (MOST_BODY // len(unit))), 400, "nested_too_deeply")


def test_a_body_nested_as_deep_as_allowed_is_taken(handle):
    body = b'{"a":' + b"[" * (MOST_NESTED - 1) + b"]" * (MOST_NESTED - 1) + b"}"
    assert post(handle, body).status_code == 200


def test_brackets_in_texts_are_no_nesting(handle):
    assert post(handle, json.dumps({"prompt": '["{\\' * 1000}).encode()).status_code == 200


def depth(value):
    if isinstance(value, dict):
        return 1 + max(map(depth, value.values()), default=0)
    return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0


TEXTS = st.text(st.sampled_from('[]{}"\\,: aé'), max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=30,
)


@given(VALUES, st.integers(0, 6), st.booleans())
def test_nesting_is_what_a_parser_finds(value, most, ascii_only):
    text = json.dumps(value, ensure_ascii=ascii_only).encode()
    assert is_nested_deeper(text, most) == (depth(value) > most)


@pytest.mark.parametrize(
    "unit", [b'"', b'\\"', b'"\\', b"[]", b'["', b"[{}", b'"\\"\\"', b"]["], ids=lambda unit: unit.decode()
)
def test_no_body_takes_long_to_look_at(unit):
    body = b'["' + unit * (4 * 2**20 // len(unit))
    started = time.perf_counter()
    is_nested_deeper(body, MOST_NESTED)
    # Some 50 ms; a scan that goes back for each of a million quotes would take hours.
    assert time.perf_counter() - started < 5


def test_a_body_that_is_cut_off_is_nobodys_problem(handle, model):
    with connect(handle) as connection:
        connection.sendall(POST + b"content-length: 100\r\n\r\n{")
    assert model.running == 0


def test_a_request_keeps_its_id_where_that_is_well_formed(handle):
    given_id = httpx.get(f"{handle.url}/health", headers={"x-request-id": "trace-7:a.b_c"})
    assert given_id.headers["x-request-id"] == "trace-7:a.b_c"
    assert is_error(post(handle, b"[" * 100, **{"x-request-id": "mine"}), 400, "nested_too_deeply")
    assert post(handle, b"[" * 100, **{"x-request-id": "mine"}).headers.get_list("x-request-id") == ["mine"]


@pytest.mark.parametrize("wrong", ["", "a b", "x" * 65, 'quote"', "semi;colon"])
def test_any_other_id_is_replaced(handle, wrong):
    replaced = httpx.get(f"{handle.url}/health", headers={"x-request-id": wrong}).headers["x-request-id"]
    assert replaced.startswith("req-")
    assert replaced != httpx.get(f"{handle.url}/health").headers["x-request-id"]
