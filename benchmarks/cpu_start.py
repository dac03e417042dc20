"""How long the sides of `cpu.py` take from the start of their process to the first token, with warm caches."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cpu_peers
from common import Spread

PROMPT = "What is the capital of France?"


def first_tokens(
    path: Path, prompt: Sequence[int], llama: str, threads: int, samples: int
) -> dict[str, dict[str, Spread]]:
    """Seconds to the first byte of output and to the end of the process, by side, the sides taking turns.

    Ours is `fusedllm generate`, llama.cpp's a program that imports nothing beside NumPy; both get the same tokens, and
    an unmeasured start first, which fills caches of files and programs.
    """
    generate = [sys.executable, "-m", "fusedllm", "generate", "--ckpt", str(path), "--prompt", PROMPT]
    commands = {"ours": [*generate, "--max-tokens", "1"]}
    if b"--threads" in subprocess.run([*generate[:4], "--help"], capture_output=True, check=True).stdout:
        commands["ours"] += ["--threads", str(threads)]
    if llama:
        ids = [str(token) for token in prompt]
        commands["llama.cpp"] = [sys.executable, cpu_peers.__file__, llama, str(path), str(threads), *ids]
    took: dict[str, Any] = {side: [] for side in commands}
    for sample in range(-1, samples):
        for side in sorted(commands, reverse=bool(sample % 2)):
            took[side].append(_start(commands[side]))
    return {
        side: {
            "first_token": Spread.of([first for first, _ in pairs[1:]]),
            "whole": Spread.of([whole for _, whole in pairs[1:]]),
        }
        for side, pairs in took.items()
    }


def _start(command: Sequence[str]) -> tuple[float, float]:
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout
        found = os.read(process.stdout.fileno(), 1)
        first = time.perf_counter() - started
        process.stdout.read()
    if process.returncode or not found:
        raise SystemExit(f"{' '.join(command[:6])} has failed; run it to see why.")
    return first, time.perf_counter() - started
