"""`fusedllm serve` as a user meets it, with a model behind it."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import jax
import pytest
from conftest import TINY, TINY_ENGINE
from operations_stand_in import serving, wait_until
from reference import tiny

from fusedllm.cli import serve
from fusedllm.cli.main import build_parser, main
from fusedllm.config import SamplingParams
from fusedllm.engine.compile_guard import ENGINE_THREAD, watch_compiles
from fusedllm.errors import SettingsError
from fusedllm.llm import LLM
from fusedllm.serve.app import create_app
from fusedllm.serve.settings import KEYS_VARIABLE, ServerSettings
from fusedllm.weights.random import random_params

ROOT = Path(__file__).parent.parent


def options(*words):
    return build_parser().parse_args(["serve", *words])


@pytest.fixture(autouse=True)
def no_keys(monkeypatch):
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)


def test_without_options_the_settings_are_the_defaults():
    assert serve.settings_of(options()) == ServerSettings(model_name="smollm2-135m")


def test_every_option_reaches_its_setting(tmp_path, monkeypatch):
    certificate, key, keys = (tmp_path / name for name in ("c.pem", "k.pem", "keys"))
    for file in (certificate, key):
        file.write_text("")
    keys.write_text("of-file\n")
    monkeypatch.setenv(KEYS_VARIABLE, "of-environment")
    words = (
        f"--host 0.0.0.0 --port 1234 --api-key of-flag --api-key another --api-key-file {keys} "
        f"--cors-origin https://a.example --cors-origin https://b.example --certificate {certificate} "
        f"--private-key {key} --max-queue 5 --max-body 2M --max-prompt-tokens 100 --max-tokens 50 --max-n 2 "
        "--request-seconds 60 --drain-seconds 3 --requests-per-minute 30 --log-prompts --log-format json "
        "--served-model-name mine"
    ).split()
    assert serve.settings_of(options(*words)) == ServerSettings(
        host="0.0.0.0", port=1234, api_keys=("of-flag", "another", "of-file", "of-environment"),
        cors_origins=("https://a.example", "https://b.example"), certificate=certificate, private_key=key, max_queue=5,
        max_body_bytes=2 * 2**20, max_prompt_tokens=100, max_tokens=50, max_n=2, request_seconds=60.0,
        drain_seconds=3.0, requests_per_minute=30, log_prompts=True, log_format="json", model_name="mine",
    )  # fmt: skip


def test_a_path_is_served_by_its_last_name(tmp_path):
    file = tmp_path / "my-model.gguf"
    file.touch()
    assert serve.settings_of(options("--ckpt", str(file))).model_name == "my-model.gguf"


@pytest.mark.parametrize(
    ("text", "expected"), [("4194304", 2**22), ("4M", 2**22), ("4MiB", 2**22), ("1.5g", 3 * 2**29), ("2 KB", 2**11)]
)
def test_sizes_are_written_with_units(text, expected):
    assert options("--cache-memory", text).cache_memory == expected


@pytest.mark.parametrize("text", ["", "M", "4X", "a lot", "1e999", "nan"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(SystemExit, match="2"):
        options("--max-body", text)


def test_the_cache_is_sized_in_one_way_only():
    with pytest.raises(SystemExit, match="2"):
        options("--memory-fraction", "0.5", "--cache-tokens", "100")


@pytest.mark.parametrize(
    ("most", "buckets"), [(1, (1,)), (2, (1, 2)), (6, (1, 2, 4, 6)), (16, (1, 2, 4, 8, 16)), (17, (1, 2, 4, 8, 16, 17))]
)
def test_batch_buckets_are_powers_of_two_up_to_the_most(most, buckets):
    assert serve.batch_buckets(most) == buckets


def test_no_batch_is_refused():
    with pytest.raises(SettingsError, match="--max-batch"):
        serve.batch_buckets(0)


@pytest.mark.parametrize(
    ("words", "part"),
    [(["--port", "99999"], "port"), (["--max-batch", "0"], "--max-batch"), (["--api-key-file", "/nowhere"], "API keys"),
     (["--ckpt", "no-such-model"], "no-such-model"), (["--certificate", "/nowhere.pem"], "/nowhere.pem"),
     (["--cache-tokens", "10", "--max-context", "64"], "64 tokens"),
     (["--cache-memory", "9999T", "--max-context", "64"], "more than there is")],
)  # fmt: skip
def test_what_is_wrong_is_one_sentence_before_anything_is_loaded(capfd, words, part):
    ckpt = [] if "--ckpt" in words else ["--ckpt", "smollm2-135m", "--random-weights"]
    assert main(["serve", *ckpt, *words]) == 2
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("fusedllm: ")
    assert part in last


def test_the_rooms_own_door_leads_to_the_same_command():
    command = [sys.executable, "-m", "fusedllm.serve", "--help"]
    shown = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "--drain-seconds" in shown


def test_the_terminal_serves_until_it_is_told_to_stop(tmp_path):
    checkpoint = tiny.write("llama2", tmp_path / "model")
    words = f"--ckpt {checkpoint} --port 0 --max-context 64 --max-batch 2 --cache-tokens 256 --token-budget 64".split()
    command = [sys.executable, "-m", "fusedllm", "serve", *words]
    environment = {**os.environ, KEYS_VARIABLE: "sesame-open"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            line = process.stdout.readline()
            assert line.startswith("ready at http://127.0.0.1:"), process.stderr.read()
            with httpx.Client(base_url=line.split()[-1]) as client:
                assert client.get("/ready").status_code == 200
                body = {"model": "model", "prompt": [1, 2, 3], "max_tokens": 5}
                assert client.post("/v1/completions", json=body).status_code == 401
                key = {"authorization": "Bearer sesame-open"}
                assert client.post("/v1/completions", json=body, headers=key).status_code == 200
                text = client.get("/metrics", headers=key).text
                assert "fusedllm:kv_cache_pages 16.0" in text
                assert "fusedllm:compiles_after_ready_total 0.0" in text
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=20) == 0
        finally:
            process.kill()


def test_a_compile_in_the_engines_thread_after_ready_is_counted_and_logged(capfd):
    llm = LLM(TINY, random_params(TINY, "float32", seed=1), engine=TINY_ENGINE)

    def compile_something(chunk):
        jax.jit(lambda x: x * 3 + 1)(1.0)

    def compiles():
        text = httpx.get(f"{handle.url}/metrics").text
        (line,) = [line for line in text.splitlines() if line.startswith("fusedllm:compiles_after_ready_total ")]
        return float(line.split()[-1])

    with serving(llm, create_app, model_name="m") as handle:
        body = {"model": "m", "prompt": [1, 2, 3], "max_tokens": 20, "stream": True}
        assert httpx.post(f"{handle.url}/v1/completions", json=body).text.endswith("data: [DONE]\n\n")
        # In this thread, as a notebook beside its server.
        jax.jit(lambda x: x * 5 + 1)(1.0)
        assert compiles() == 0
        stream = llm.prepare([1, 2, 3], SamplingParams(max_tokens=1))
        llm.engine.submit(stream.sequence, compile_something)
        wait_until(lambda: compiles() >= 1)
    assert "compiled after ready" in capfd.readouterr().err


def test_compiles_are_heard_of_in_threads_of_the_name_and_only_inside():
    heard = []
    with watch_compiles(lambda name, seconds: heard.append((name, seconds)), thread="MainThread"):
        jax.jit(lambda x: x * 7 + 1)(1.0)
    with watch_compiles(lambda name, seconds: heard.append((name, seconds)), thread=ENGINE_THREAD):
        jax.jit(lambda x: x * 9 + 1)(1.0)
    jax.jit(lambda x: x * 11 + 1)(1.0)
    assert len(heard) == 1
    assert heard[0][1] >= 0


def test_an_abandoned_stream_frees_its_pages():
    llm = LLM(TINY, random_params(TINY, "float32", seed=1), engine=TINY_ENGINE)
    with serving(llm, create_app, model_name="m") as handle:
        body = {"model": "m", "prompt": [1, 2, 3], "max_tokens": 100, "stream": True}
        for _ in range(10):
            with httpx.stream("POST", f"{handle.url}/v1/completions", json=body) as response:
                next(response.iter_bytes())
        wait_until(lambda: llm.engine.stats().pages_in_use == 0)
        assert httpx.post(f"{handle.url}/v1/completions", json=body).text.endswith("data: [DONE]\n\n")


def test_every_setting_of_the_issue_has_an_option():
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    named = {word for action in parser._actions for word in action.option_strings}
    assert named >= {
        "--ckpt", "--host", "--port", "--api-key", "--api-key-file", "--cors-origin", "--certificate", "--private-key",
        "--max-queue", "--max-body", "--max-prompt-tokens", "--max-tokens", "--max-n", "--request-seconds",
        "--drain-seconds", "--requests-per-minute", "--log-prompts", "--log-format", "--served-model-name",
        "--max-batch", "--token-budget", "--memory-fraction", "--cache-memory", "--cache-tokens",
    }  # fmt: skip
