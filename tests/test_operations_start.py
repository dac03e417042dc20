"""How a server starts, in a thread: ready when it says so, and refused with one sentence where it can't listen."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from operations_stand_in import Model, create_app, exchange, serving, status_of, wait_until

from fusedllm.errors import SettingsError
from fusedllm.serve import Handle, lifecycle, run


def test_the_server_answers_probes_while_it_warms_up_and_says_ready_after_the_last_program(capfd):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    model = Model(programs=5, seconds=0.2)
    with ThreadPoolExecutor(1) as pool, pytest.MonkeyPatch.context() as patch:
        patch.setattr(lifecycle, "create_app", create_app)
        started = time.perf_counter()
        starting = pool.submit(run, model, port=port, drain_seconds=0.0)
        url = f"http://127.0.0.1:{port}"
        statuses = []
        while not starting.done():
            try:
                statuses.append(
                    (httpx.get(f"{url}/ready").status_code, httpx.get(f"{url}/health").status_code,
                     httpx.post(f"{url}/v1/completions", json={}).status_code)
                )  # fmt: skip
            except httpx.TransportError:
                time.sleep(0.01)
        assert (503, 200, 503) in statuses
        assert time.perf_counter() - started > 1
        with starting.result() as handle:
            assert httpx.get(f"{handle.url}/ready").status_code == 200
            assert capfd.readouterr().out == f"ready at {handle.url}\n"


def test_a_thread_gets_a_handle_that_stops_the_server():
    with serving() as handle:
        assert isinstance(handle, Handle)
        assert handle.alive
        assert handle.url in repr(handle)
        handle.stop()
        assert not handle.alive
        with pytest.raises(httpx.ConnectError):
            httpx.get(handle.url)


def test_a_failure_of_the_warm_up_is_the_callers():
    class Broken(Model):
        def warm_up(self, on_program):
            raise SettingsError("no program compiles.")

    threads = threading.active_count()
    with pytest.raises(SettingsError, match="no program compiles"), serving(Broken()):
        pass
    wait_until(lambda: threading.active_count() <= threads)


def test_a_port_that_is_taken_is_one_sentence():
    with serving() as handle:
        port = int(handle.url.rsplit(":", 1)[1])
        with pytest.raises(SettingsError, match=rf"port {port} of 127\.0\.0\.1: address already in use"):
            run(Model(), port=port, block=False)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "256.1.1.1", "192.0.2.1"])
def test_a_host_that_is_not_here_is_one_sentence(host):
    with pytest.raises(SettingsError, match="can't listen at"):
        run(Model(), host=host, port=0, block=False)


def test_the_world_is_warned_of_a_server_without_a_key(capfd):
    with serving(host="0.0.0.0") as handle:
        assert status_of(exchange(handle, [b"GET /health HTTP/1.1\r\nconnection: close\r\n\r\n"])) == 200
    assert "no API key is set" in capfd.readouterr().err
    with serving(host="0.0.0.0", api_keys=("a-key",)):
        pass
    with serving():
        pass
    assert "no API key is set" not in capfd.readouterr().err


def test_in_a_notebook_a_server_leaves_the_cells_loop_alone():
    """A cell runs in the main thread, inside a loop."""

    async def cell():
        with serving() as handle:
            assert httpx.get(f"{handle.url}/ready").status_code == 200
        with pytest.raises(SettingsError, match="event loop"):
            run(Model(), port=0, block=True)

    asyncio.run(cell())
