"""Who may ask, and how often."""

from __future__ import annotations

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from operations_stand_in import serving

from fusedllm.serve.keys import KeyDigest, Keys, Rates

KEYS = ("first-key-of-two", "second-key-of-two")


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def guarded():
    with serving(api_keys=KEYS) as handle, httpx.Client(base_url=handle.url) as client:
        yield client


def test_every_key_is_recognized_and_named_by_its_place():
    keys = Keys(KEYS)
    assert [keys.check(f"Bearer {key}") for key in KEYS] == ["key-1", "key-2"]
    assert keys.check(f"bearer  {KEYS[0]} ") == "key-1"


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", KEYS[0], f"Basic {KEYS[0]}", f"Bearer {KEYS[0]}x", "Bearer first-key"]
)
def test_nothing_but_a_whole_key_is_recognized(header):
    assert Keys(KEYS).check(header) is None


def test_without_keys_everybody_is_the_same_caller():
    assert Keys(()).check(None) == ""
    assert Keys(()).check("Bearer whatever") == ""
    assert not Keys(())


@given(st.text())
def test_any_text_is_checked_without_failing(header):
    Keys(KEYS).check(header)


def test_all_keys_are_compared_however_early_one_is_found(monkeypatch):
    compared = []
    keys = Keys(KEYS)
    monkeypatch.setattr("fusedllm.serve.keys.hmac.compare_digest", lambda a, b: compared.append(b) or a == b)
    assert keys.check(f"Bearer {KEYS[0]}") == "key-1"
    assert len(compared) == len(KEYS)


def test_digests_are_equal_in_one_process_and_hold_no_key():
    digest = KeyDigest.of(KEYS[0])
    assert digest == KeyDigest.of(KEYS[0])
    assert digest is KeyDigest.of(digest)
    assert KEYS[0].encode() not in digest.digest


@pytest.mark.parametrize("path", ["/", "/health", "/ready"])
def test_probes_and_the_page_need_no_key(guarded, path):
    assert guarded.get(path).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_probes_may_ask_for_the_head_alone(guarded, path):
    answer = guarded.head(path)
    assert (answer.status_code, answer.content) == (200, b"")


@pytest.mark.parametrize("path", ["/metrics", "/v1/models", "/docs", "/openapi.json", "/nothing/here"])
def test_everything_else_needs_one(guarded, path):
    refused = guarded.get(path)
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"] == "Bearer"
    error = refused.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == "invalid_api_key"
    assert guarded.get(path, headers=bearer("wrong-key")).status_code == 401
    assert guarded.get(path, headers=bearer(KEYS[1])).status_code in (200, 404)


def test_the_refusal_does_not_repeat_the_key(guarded):
    assert "wrong-key" not in guarded.get("/v1/models", headers=bearer("wrong-key")).text


def test_only_reading_is_open(guarded):
    assert guarded.post("/health").status_code == 401


def test_the_endpoint_knows_the_caller(guarded):
    assert guarded.get("/v1/models", headers=bearer(KEYS[1])).json() == {"caller": "key-2"}
    assert guarded.post("/v1/completions", json={}, headers=bearer(KEYS[0])).json()["caller"] == "key-1"


def test_cors_is_off_unless_an_origin_is_named():
    origin = {"origin": "https://chat.example.org"}
    preflight = {**origin, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    with serving(api_keys=KEYS) as handle:
        assert "access-control-allow-origin" not in httpx.get(f"{handle.url}/health", headers=origin).headers
    with serving(api_keys=KEYS, cors_origins=("https://chat.example.org",)) as handle:
        allowed = httpx.options(f"{handle.url}/v1/completions", headers=preflight)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://chat.example.org"
        # A page must be able to read why it was refused.
        refused = httpx.get(f"{handle.url}/v1/models", headers=origin)
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://chat.example.org"
        other = httpx.get(f"{handle.url}/health", headers={"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers


def test_a_key_that_asks_too_often_gets_429_and_others_go_on():
    with serving(api_keys=KEYS, requests_per_minute=3) as handle, httpx.Client(base_url=handle.url) as client:
        first = [client.get("/v1/models", headers=bearer(KEYS[0])) for _ in range(4)]
        assert [response.status_code for response in first] == [200, 200, 200, 429]
        assert 1 <= int(first[-1].headers["retry-after"]) <= 20
        assert first[-1].json()["error"]["code"] == "rate_limit_exceeded"
        assert client.get("/v1/models", headers=bearer(KEYS[1])).status_code == 200
        # A scraper is no user.
        assert all(client.get("/metrics", headers=bearer(KEYS[0])).status_code == 200 for _ in range(5))
        assert all(client.get("/health").status_code == 200 for _ in range(5))


@given(st.integers(1, 50), st.lists(st.floats(0, 30), max_size=200))
def test_no_caller_gets_more_than_the_rate_and_what_it_had_saved(per_minute, pauses):
    now = 0.0
    rates = Rates(per_minute, clock=lambda: now)
    admitted = 0
    for pause in pauses:
        now += pause
        wait = rates.admit("key-1")
        admitted += wait == 0
        assert admitted <= per_minute + now * per_minute / 60 + 1e-6
        if wait:
            # Who waits as long as told is let in; tried on a copy, so that the test goes on from here.
            later = Rates(per_minute, clock=lambda: now + wait)  # noqa: B023
            later._left = dict(rates._left)
            assert later.admit("key-1") == 0
