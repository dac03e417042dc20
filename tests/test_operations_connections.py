"""What a client may not do to a connection: headers, slow senders, slow readers, too many of them."""

from __future__ import annotations

import contextlib
import json
import time

import httpx
import pytest
from operations_stand_in import Model, connect, exchange, serving, status_of, wait_until

from fusedllm.serve.connection import MOST_HEADER_BYTES, MOST_HEADERS

# Long enough for an ordinary request on a busy machine, short enough to wait for.
SECONDS = 0.6

POST = b"POST /v1/completions HTTP/1.1\r\nhost: server\r\ncontent-type: application/json\r\n"


@pytest.fixture(scope="module")
def model():
    return Model()


@pytest.fixture(scope="module")
def handle(model):
    limits = {"body_seconds": SECONDS, "send_seconds": SECONDS, "max_connections": 50}
    with serving(model, **limits) as handle:
        yield handle


@pytest.fixture(autouse=True)
def still_serves(handle):
    yield
    answer = httpx.post(f"{handle.url}/v1/completions", json={"events": 1})
    assert answer.status_code == 200


def test_headers_of_one_byte_at_a_time_run_out_of_time(handle):
    started = time.perf_counter()
    response = exchange(handle, (bytes([byte]) for byte in POST), pause=0.1)
    assert status_of(response) == 408
    assert time.perf_counter() - started < len(POST) * 0.1


def test_a_connection_that_never_says_anything_is_closed(handle):
    assert exchange(handle, []) == b""


def test_too_many_headers_are_refused(handle):
    response = exchange(handle, [POST + b"x: y\r\n" * (MOST_HEADERS + 1) + b"\r\n"])
    assert status_of(response) == 431
    assert b"headers_too_large" in response


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "endless"])
def test_a_header_that_is_too_long_is_refused(handle, whole):
    header = b"x-long: " + b"y" * (2 * MOST_HEADER_BYTES) + (b"\r\n\r\n" if whole else b"")
    assert status_of(exchange(handle, [POST + header])) == 431


def test_an_endless_header_is_refused_before_it_ends(handle):
    response = exchange(handle, [POST + b"x-long: ", *[b"y" * 4096] * 100])
    # Sending into the closed connection may have lost the answer; it was closed in any case.
    assert status_of(response) in (431, 0)


def test_a_target_that_is_too_long_is_refused(handle):
    assert status_of(exchange(handle, [b"GET /" + b"a" * (2 * MOST_HEADER_BYTES) + b" HTTP/1.1\r\n\r\n"])) == 431


def test_trailers_count_as_headers(handle):
    trailers = b"".join(b"x-%d: y\r\n" % number for number in range(MOST_HEADERS + 1))
    response = exchange(
        handle, [POST + b"transfer-encoding: chunked\r\n\r\n", b"2\r\n{}\r\n0\r\n" + trailers + b"\r\n"]
    )
    assert status_of(response) in (0, 431)


@pytest.mark.parametrize("noise", [b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"\r\n" * 5000, b"PRI * HTTP/2.0\r\n\r\n"])
def test_what_is_not_http_is_refused(handle, noise):
    response = exchange(handle, [noise])
    assert status_of(response) in (0, 400, 408)
    assert not response or b'"error"' in response


def test_a_reader_that_takes_nothing_is_cut_off(handle, model):
    body = json.dumps({"stream": True, "events": 2000, "bytes": 50_000}).encode()
    with connect(handle, window=4096) as connection:
        connection.sendall(POST + b"content-length: %d\r\n\r\n" % len(body) + body)
        wait_until(lambda: model.running == 1)
        started = time.perf_counter()
        wait_until(lambda: model.running == 0)
        # All of it would be 200 MB; ending it took no longer than the reader was given, and a little.
        assert time.perf_counter() - started < 5


def test_a_slow_reader_who_reads_on_gets_everything(handle):
    body = json.dumps({"stream": True, "events": 20, "bytes": 100_000}).encode()
    received = 0
    with connect(handle) as connection:
        connection.sendall(POST + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        while part := connection.recv(2**18):
            received += len(part)
            time.sleep(0.05)
    assert received > 20 * 100_000


def test_an_answer_that_is_not_taken_does_not_keep_the_connection(handle):
    """It is complete for the app, and lies in the transport's buffer."""
    size = 30_000_000
    body = b'{"padding": %d}' % size
    received = 0
    with connect(handle, window=4096) as connection:
        connection.sendall(POST + b"content-length: %d\r\n\r\n" % len(body) + body)
        time.sleep(3 * SECONDS)
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(2**20):
                received += len(part)
    # What the kernels between had taken.
    assert received < size / 2


def test_connections_beyond_the_limit_are_turned_away(handle):
    open_ones = [connect(handle) for _ in range(55)]
    try:
        for connection in open_ones:
            connection.settimeout(5)
        last = open_ones[-1].recv(2**16)
        assert status_of(last) == 503
        assert b"retry-after" in last
    finally:
        for connection in open_ones:
            connection.close()
    wait_until(lambda: status_of(exchange(handle, [b"GET /health HTTP/1.1\r\nconnection: close\r\n\r\n"])) == 200)


def test_one_connection_serves_many_requests(handle):
    with httpx.Client(base_url=handle.url) as client:
        for _ in range(20):
            assert client.post("/v1/completions", json={}).status_code == 200
            assert client.post("/v1/completions", content=b"\xff").status_code == 400
        pool = client._transport._pool
        assert len(pool.connections) == 1


def test_pipelined_requests_are_answered_in_order(handle):
    one = POST + b"content-length: 2\r\n\r\n{}"
    last = POST + b"connection: close\r\ncontent-length: 2\r\n\r\n{}"
    response = exchange(handle, [one + one + last])
    assert response.count(b"HTTP/1.1 200") == 3


def test_line_breaks_after_an_answer_do_not_keep_the_connection(handle):
    with connect(handle) as connection:
        connection.settimeout(10)
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: server\r\n\r\n")
        assert status_of(connection.recv(2**16)) == 200
        connection.sendall(b"\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1) == b""
