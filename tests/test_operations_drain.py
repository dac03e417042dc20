"""How a server ends: nothing is dropped without a word."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from operations_stand_in import Model, create_app, serving, wait_until
from starlette.responses import StreamingResponse

TESTS = Path(__file__).parent


class Process:
    """A server of `operations_stand_in.main` in a process of its own, as a terminal or a container has it."""

    def __init__(self, **words):
        # The paths of this process: its package is the one that is tested.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
        command = [
            sys.executable,
            str(TESTS / "operations_stand_in.py"),
            *(f"{name}={value}" for name, value in words.items()),
        ]
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.url = ""

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.process.kill()
        self.process.communicate()

    def wait_ready(self):
        line = self.process.stdout.readline()
        found = re.fullmatch(r"ready at (http://127\.0\.0\.1:\d+)\n", line)
        assert found, (line, self.process.stderr.read())
        self.url = found[1]
        return self

    def stream(self, events, pause):
        """The data of all events; what fails is raised."""
        body = {"stream": True, "events": events, "pause": pause}
        response = httpx.post(f"{self.url}/v1/completions", json=body, timeout=30)
        assert response.status_code == 200
        return [line.removeprefix("data: ") for line in response.text.splitlines() if line]


def start_streams(process, pool, specifications):
    """Asks for streams; returns when all of them run."""
    before = httpx.get(f"{process.url}/running").json()
    streams = [pool.submit(process.stream, events, pause) for events, pause in specifications]
    wait_until(lambda: httpx.get(f"{process.url}/running").json() == before + len(streams))
    return streams


def test_sigterm_under_load_ends_every_stream_whole_or_with_an_error_and_exits_with_0():
    with Process(drain_seconds=2.5) as process, ThreadPoolExecutor(8) as pool:
        process.wait_ready()
        streams = start_streams(process, pool, [(20, 0.1)] * 3 + [(1000, 0.05)] * 3)
        short, long = streams[:3], streams[3:]
        process.process.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(f"{process.url}/ready").status_code == 503)
        # Alive, and not to be given anything new.
        assert httpx.get(f"{process.url}/health").status_code == 200
        refused = httpx.post(f"{process.url}/v1/completions", json={})
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["message"] == "the server is stopping."
        for stream in short:
            data = stream.result()
            assert data == [*map(str, range(20)), "[DONE]"]
        for stream in long:
            data = stream.result()
            assert len(data) > 5
            assert data[:-2] == [str(number) for number in range(len(data) - 2)]
            assert json.loads(data[-2])["error"]["code"] == "server_stopped"
            assert data[-1] == "[DONE]"
        assert process.process.wait(timeout=10) == 0
        log = process.process.stderr.read()
        assert "requests=3" in log
        assert "Traceback" not in log


def test_a_request_that_has_not_begun_to_answer_gets_an_error_of_its_own():
    with Process(drain_seconds=0.2) as process, ThreadPoolExecutor(1) as pool:
        process.wait_ready()
        body = {"events": 100, "pause": 0.1}
        asked = pool.submit(httpx.post, f"{process.url}/v1/completions", json=body, timeout=30)
        wait_until(lambda: httpx.get(f"{process.url}/running").json() == 1)
        process.process.send_signal(signal.SIGTERM)
        response = asked.result()
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "server_stopped"
        assert process.process.wait(timeout=10) == 0


def test_an_idle_server_exits_at_once_with_0_on_sigint_too():
    with Process() as process:
        process.wait_ready()
        with httpx.Client(base_url=process.url) as client:
            # An idle connection is nobody in flight.
            client.get("/health")
            started = time.perf_counter()
            process.process.send_signal(signal.SIGINT)
            assert process.process.wait(timeout=10) == 0
            assert time.perf_counter() - started < 5


def test_a_second_signal_exits_at_once():
    with Process(drain_seconds=60) as process, ThreadPoolExecutor(1) as pool:
        process.wait_ready()
        (stream,) = start_streams(process, pool, [(1000, 0.1)])
        process.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert process.process.poll() is None
        process.process.send_signal(signal.SIGTERM)
        assert process.process.wait(timeout=5) == 128 + signal.SIGTERM
        assert isinstance(stream.exception(), httpx.TransportError)


def test_sigterm_while_warming_up_ends_the_server_without_a_word_of_readiness():
    with Process(programs=100, seconds=0.1) as process:
        # Its log line tells that signals are its own by now.
        assert "warming up" in process.process.stderr.readline()
        process.process.send_signal(signal.SIGTERM)
        out, err = process.process.communicate(timeout=10)
        assert process.process.returncode == 0, err
        assert out == ""


def test_a_handle_stops_with_what_is_in_flight():
    model = Model()
    with serving(model) as handle, ThreadPoolExecutor(1) as pool:
        body = {"stream": True, "events": 20, "pause": 0.05}
        asked = pool.submit(httpx.post, f"{handle.url}/v1/completions", json=body)
        wait_until(lambda: model.running == 1)
        handle.stop(drain_seconds=10)
        assert asked.result().text.endswith("data: [DONE]\n\n")
    assert not model.engine.alive


def test_abandoned_streams_are_not_in_flight():
    model = Model()
    with serving(model, drain_seconds=30.0) as handle:
        body = json.dumps({"stream": True, "events": 10_000, "pause": 0.01})
        for _ in range(20):
            with httpx.stream("POST", f"{handle.url}/v1/completions", content=body) as response:
                next(response.iter_bytes())
        wait_until(lambda: model.running == 0)
        started = time.perf_counter()
        handle.stop()
        assert time.perf_counter() - started < 5


def test_a_stream_that_is_cut_inside_an_event_ends_the_event_first():
    def app(llm, settings):
        made = create_app(llm, settings)

        async def pieces():
            yield b'data: {"half'
            await asyncio.sleep(60)

        @made.post("/half")
        async def half():
            llm.running += 1
            return StreamingResponse(pieces(), media_type="text/event-stream")

        return made

    model = Model()
    with serving(model, app) as handle, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(httpx.post, f"{handle.url}/half")
        wait_until(lambda: model.running == 1)
        time.sleep(0.1)
        handle.stop(drain_seconds=0.0)
        half, last, done, _ = asked.result().text.split("\n\n")
        assert half == 'data: {"half'
        assert done == "data: [DONE]"
        assert "error" in json.loads(last.removeprefix("data: "))
