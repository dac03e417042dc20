"""The command line as a user meets it: its output, its exit codes, its one-sentence errors."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from reference import tiny

from fusedllm.backend import KV_DTYPES
from fusedllm.cli.environment import set_environment
from fusedllm.cli.main import main
from fusedllm.cli.options import add_model_arguments

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.write("llama2", tmp_path_factory.mktemp("cli") / "model")


def fails_with(capfd, arguments, *parts, code=2):
    """Runs the command line and asserts one sentence on standard error that has all of `parts`."""
    assert main(arguments) == code
    captured = capfd.readouterr()
    error = captured.err.strip().splitlines()[-1]
    assert error.startswith("fusedllm: ")
    assert "Traceback" not in captured.err
    for part in parts:
        assert part in error
    return error


def test_help_and_version_are_instant_and_list_the_commands(capfd):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    shown = capfd.readouterr().out
    assert all(name in shown for name in ("generate", "perplexity", "convert", "pull", "models"))
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capfd.readouterr().out.startswith("fusedllm 0.")


def test_generate_prints_only_the_answer_on_standard_output(capfd, checkpoint):
    arguments = ["generate", "--ckpt", str(checkpoint), "--prompt", "abc", "--max-tokens", "5", "--ignore-eos"]
    assert main([*arguments, "--max-context", "64", "--stats"]) == 0
    captured = capfd.readouterr()
    assert len([int(token) for token in captured.out.split()]) == 5
    assert "3 prompt tokens" in captured.err
    assert "5 tokens" in captured.err
    assert "first token" in captured.err
    assert "bytes a token" in captured.err
    assert "no confidentiality claim" in captured.err


def test_the_cache_dtypes_of_the_terminal_are_those_of_the_library():
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    (choices,) = (action.choices for action in parser._actions if action.dest == "kv_dtype")
    assert list(choices) == ["auto", *KV_DTYPES]


def test_generate_runs_with_a_cache_of_fp8(capfd, checkpoint):
    arguments = ["generate", "--ckpt", str(checkpoint), "--max-tokens", "3", "--ignore-eos", "--max-context", "64"]
    assert main([*arguments, "--kv-dtype", "fp8"]) == 0
    assert len(capfd.readouterr().out.split()) == 3


def test_generate_streams_the_real_models_answer():
    command = [
        sys.executable,
        "scripts/generate.py",
        "--prompt",
        "What is the capital of France?",
        "--max-tokens",
        "12",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "The capital of France is Paris.\n"
    assert "37 prompt tokens" in done.stderr
    assert "finish: stop" in done.stderr


def test_an_interrupted_stream_exits_130_with_one_sentence():
    command = [sys.executable, "-u", "-m", "fusedllm", "generate", "--prompt", "Tell me a long story.", "--ignore-eos"]
    process = subprocess.Popen(
        [*command, "--max-tokens", "2000"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.read(5)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.strip().splitlines()[-1] == "fusedllm: interrupted."
    assert "Traceback" not in error


def test_a_reader_that_leaves_is_no_error(checkpoint):
    command = f"{sys.executable} -m fusedllm generate --ckpt {checkpoint} --max-tokens 60 --ignore-eos | head -c 3"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=True)
    assert len(done.stdout) == 3
    assert "Traceback" not in done.stderr
    assert "rror" not in done.stderr


def test_perplexity_of_a_text(capfd, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    assert main(["perplexity", "--text", str(text), "--window", "64", "--windows", "2"]) == 0
    words = capfd.readouterr().out.split()
    assert words[0] == "perplexity"
    assert 1 < float(words[1]) < 50
    assert "128 tokens in windows of 64" in " ".join(words)


def test_convert_writes_what_generate_reads(capfd, checkpoint, tmp_path):
    target = tmp_path / "tiny.arrow"
    assert main(["convert", str(checkpoint), str(target)]) == 0
    fails_with(capfd, ["convert", str(checkpoint), str(target)], str(target), "--force")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.png").touch()
    os.mkfifo(tmp_path / "pipe")
    for name in ("photos", "pipe"):
        arguments = ["convert", str(checkpoint), str(tmp_path / name), "--format", "arrow", "--force"]
        fails_with(capfd, arguments, name, "--force does not replace it")
    assert (tmp_path / "photos" / "one.png").exists()
    arguments = ["--prompt", "abc", "--max-tokens", "5", "--max-context", "64"]
    assert main(["generate", "--ckpt", str(target), *arguments]) == 0
    from_arrow = capfd.readouterr().out
    assert main(["generate", "--ckpt", str(checkpoint), *arguments]) == 0
    assert capfd.readouterr().out == from_arrow


def test_models_lists_every_name(capfd):
    assert main(["models"]) == 0
    listed = capfd.readouterr().out
    for name in ("smollm2-135m", "llama-1b", "llama-3b", "llama-8b", "qwen3-0.6b", "qwen2.5-0.5b", "mistral-7b"):
        assert name in listed


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--ckpt", "/no/such/file.gguf"], ["/no/such/file.gguf"]),
        (["--ckpt", "lama-1b"], ["lama-1b", "llama-1b"]),
        (["--prompt", ""], ["prompt is empty"]),
        (["--temperature", "-1"], ["temperature", "-1"]),
        (["--max-tokens", "0"], ["max_tokens"]),
        (["--stop", ""], ["stop"]),
        (["--prompt", "half a pair \udcff"], ["not UTF-8"]),
        (["--ckpt", "no-such-model", "--random-weights"], ["no-such-model"]),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(capfd, arguments, parts):
    fails_with(capfd, ["generate", *arguments], *parts)


def test_a_context_that_is_too_short_names_both_numbers(capfd, checkpoint):
    arguments = ["generate", "--ckpt", str(checkpoint), "--prompt", "a" * 70]
    fails_with(capfd, [*arguments, "--max-context", "64"], "70 tokens", "64")
    fails_with(capfd, [*arguments, "--max-context", "1000"], "1000", "128")


def test_a_system_message_without_a_template_is_refused(capfd, checkpoint):
    arguments = ["generate", "--system", "Be brief."]
    fails_with(capfd, [*arguments, "--ckpt", str(checkpoint), "--max-context", "64"], "--system", "chat template")


def test_a_terminal_without_unicode_gets_the_answer_all_the_same():
    command = [sys.executable, "-m", "fusedllm", "generate", "--prompt", "Repeat: 日本語 é 😀", "--max-tokens", "20"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert "Traceback" not in done.stderr
    assert done.stdout.isascii()


def test_a_backend_that_is_not_there_is_one_sentence(checkpoint):
    command = [sys.executable, "-m", "fusedllm", "generate", "--ckpt", str(checkpoint)]
    environment = {**os.environ, "JAX_PLATFORMS": "cuda"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "JAX_PLATFORMS" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_text_that_is_not_text_is_refused(capfd, tmp_path):
    path = tmp_path / "noise.bin"
    path.write_bytes(b"ok \xff\xfe")
    fails_with(capfd, ["perplexity", "--text", str(path)], "not UTF-8", "byte 3")
    fails_with(capfd, ["perplexity", "--text", str(tmp_path / "missing")], "missing")
    path.write_text("text")
    fails_with(capfd, ["perplexity", "--text", str(path), "--windows", "-1"], "--windows", "-1")


def test_debug_brings_the_traceback_back(capfd):
    assert main(["generate", "--ckpt", "/no/such/file.gguf", "--debug"]) == 2
    assert "Traceback" in capfd.readouterr().err


def test_an_unusable_cache_directory_is_one_sentence(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    environment = {**os.environ, "FUSEDLLM_CACHE": str(blocked / "cache")}
    command = [sys.executable, "-m", "fusedllm", "pull", "smollm2-135m"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("fusedllm: ")
    assert "cache" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, None),
        ({"policy": "plain", "mesh": None}, None),
        ({"policy": "masked"}, "--xla_force_host_platform_device_count=2"),
        ({"policy": "plain", "mesh": "tp=2"}, "--xla_gpu_enable_latency_hiding_scheduler=true"),
    ],
)
@pytest.mark.parametrize("before", [None, "--xla_cpu_max_isa=AVX2"])
def test_flags_of_xla_are_set_before_jax_reads_them_and_the_users_come_last(monkeypatch, options, wanted, before):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    if before is not None:
        monkeypatch.setenv("XLA_FLAGS", before)
    set_environment(argparse.Namespace(**options))
    assert os.environ.get("XLA_FLAGS") == (" ".join(filter(None, (wanted, before))) or None)
