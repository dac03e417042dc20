"""Prefill and decode against HF transformers (torch), both in float32 with the same weights, in one interleaved run.

    python benchmarks/generate.py
    python benchmarks/generate.py --ckpt llama-1b --random-weights --json benchmarks/results/generate-1b.json

Each side lives in a process of its own, since the thread pools of jax and torch would take each other's cores; while
one is measured the other waits for its next command. Needs the extra `bench`; without torch there is no peer.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    ReadBandwidth,
    Spread,
    Worker,
    bar_chart,
    decode_bytes,
    environment,
    prefill_operations,
    seconds,
    serve,
    significant,
    sizes,
    table,
    warn_if_busy,
    write_json,
)

PREFILL_TOKENS = (128, 512, 1024)
DECODE_CONTEXTS = (16, 512, 1024)
DECODE_TOKENS = 32
MATMUL_SIZE = 2048
SETTLE_SECONDS = 0.2  # For the other side's threads to go from spinning to sleep.
NAMES = {"ours": "fusedllm", "peer": "transformers"}


def prompt(vocab_size: int, length: int) -> list[int]:
    """Token ids that are the same on both sides; what they say changes no time."""
    return np.random.RandomState(length).randint(0, vocab_size, length).tolist()


class Ours:
    """fusedllm, as a caller of `LLM.generate` sees it: the first token's sampling is part of the prefill."""

    def __init__(self, ckpt: str, random_weights: bool, exported: str) -> None:
        import fusedllm

        # No prompt is to be found half done.
        engine = fusedllm.EngineConfig(prefix_cache=False)
        self.llm = fusedllm.load(ckpt, random_weights=random_weights, dtype="float32", engine=engine)

    def prefill(self, tokens: int) -> float:
        """Seconds from the prompt to its first token."""
        return self._generate(tokens, 1).timings.prefill_seconds

    def decode(self, context: int) -> float:
        """Seconds for `DECODE_TOKENS` more tokens after the first."""
        return self._generate(context, DECODE_TOKENS + 1).timings.decode_seconds

    def matmul(self) -> float:
        """Seconds of the float32 matrix product that stands for the arithmetic limit."""
        import jax

        x = jax.numpy.ones((MATMUL_SIZE, MATMUL_SIZE))
        multiply = jax.jit(lambda x: jax.numpy.einsum("mk,nk->mn", x, x))  # Weights `[out, in]`, as the model's are.
        multiply(x).block_until_ready()
        return min(seconds(lambda: multiply(x).block_until_ready()) for _ in range(3))

    def config(self) -> dict[str, Any]:
        """The model's sizes, as `prefill_operations` and `decode_bytes` read them."""
        return sizes(self.llm.config)

    def _generate(self, context: int, count: int) -> Any:
        ids = prompt(self.llm.config.vocab_size, context)
        (result,) = self.llm.generate([ids], temperature=0, max_tokens=count, ignore_eos=True)
        if len(result.token_ids) != count:
            raise SystemExit(f"{count} tokens after {context} do not fit the context of this checkpoint.")
        return result


class Peer:
    """HF transformers: one forward pass with a key/value cache, then a greedy loop on it."""

    def __init__(self, ckpt: str, random_weights: bool, exported: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)
        torch.set_grad_enabled(False)
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()

    def prefill(self, tokens: int) -> float:
        """Seconds from the prompt to its first token."""
        return seconds(lambda: self._forward(self._prompt(tokens), None))

    def decode(self, context: int) -> float:
        """Seconds for `DECODE_TOKENS` more tokens after the first."""
        token, cache = self._forward(self._prompt(context), None)

        def loop() -> None:
            last = token
            for _ in range(DECODE_TOKENS):
                last, _ = self._forward(last, cache)
                last.item()  # As a caller who watches for the end of the text must.

        return seconds(loop)

    def matmul(self) -> float:
        """Seconds of the float32 matrix product that stands for the arithmetic limit."""
        x = self.torch.ones(MATMUL_SIZE, MATMUL_SIZE)
        x @ x.T
        return min(seconds(lambda: x @ x.T) for _ in range(3))

    def _prompt(self, length: int) -> Any:
        return self.torch.tensor([prompt(self.model.config.vocab_size, length)])

    def _forward(self, ids: Any, cache: Any) -> tuple[Any, Any]:
        out = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values


def export(arguments: argparse.Namespace, directory: str) -> None:
    """Writes the very weights that our side uses, in float32, as a HF directory. Runs in a process of its own."""
    from fusedllm.weights import open as opening
    from fusedllm.weights import random, registry, safetensors
    from fusedllm.weights.convert import cast

    if arguments.random_weights:
        checkpoint = random.random_checkpoint(registry.architecture(arguments.ckpt), np.float32)
    else:
        checkpoint = opening.open_checkpoint(registry.resolve(arguments.ckpt, progress=True))
    safetensors.write(cast(checkpoint, np.dtype(np.float32)), Path(directory))


def measure(workers: dict[str, Worker], repetitions: int, threads: int) -> dict[str, Any]:
    """Every row once per repetition and side, the sides taking turns at being first; limits in each repetition."""
    rows = [("prefill", tokens) for tokens in PREFILL_TOKENS] + [("decode", context) for context in DECODE_CONTEXTS]
    config, bandwidth = workers["ours"].ask("config"), ReadBandwidth(threads)
    speeds: dict[Any, dict[str, list[float]]] = {row: {side: [] for side in workers} for row in rows}
    reads, flops = [], []
    for repetition in range(-1, repetitions):  # The first compiles and warms up, and is dropped.
        reads.append(bandwidth.sample())
        flops.append(2 * MATMUL_SIZE**3 / min(worker.ask("matmul") for worker in workers.values()))
        for row in rows:
            for side in sorted(workers, reverse=bool(repetition % 2)):
                time.sleep(SETTLE_SECONDS)
                workers[side].ask("prefill", PREFILL_TOKENS[0])  # Unmeasured: wakes what has gone cold meanwhile.
                tokens = row[1] if row[0] == "prefill" else DECODE_TOKENS
                speeds[row][side].append(tokens / workers[side].ask(*row))
        print(f"repetition {repetition + 1} of {repetitions}", file=sys.stderr)
    result: dict[str, Any] = {"read_bandwidth": Spread.of(reads[1:]), "matmul": Spread.of(flops[1:]), "rows": []}
    for (kind, tokens), sides in speeds.items():
        kept = {side: samples[1:] for side, samples in sides.items()}
        # What one token costs: operations in a prefill, bytes in a decode (halfway through the measured tokens).
        each = prefill_operations(config, tokens) / tokens
        if kind == "decode":
            each = decode_bytes(config, tokens + DECODE_TOKENS // 2, itemsize=4)
        limits = flops[1:] if kind == "prefill" else reads[1:]
        entry = {"kind": kind, "tokens": tokens, **{side: Spread.of(samples) for side, samples in kept.items()}}
        entry["achieved"] = Spread.of([each * speed for speed in kept["ours"]])
        entry["share_of_limit"] = Spread.of(
            [each * speed / limit for speed, limit in zip(kept["ours"], limits, strict=True)]
        )
        if "peer" in kept:
            pairs = zip(kept["ours"], kept["peer"], strict=True)
            entry["ratio"] = Spread.of([ours / peer for ours, peer in pairs])
        result["rows"].append(entry)
    return result


def report(result: dict[str, Any]) -> str:
    """The table, and what limits which row."""
    rows = []
    for row in result["rows"]:
        prefill = row["kind"] == "prefill"
        unit, limit = ("GFLOP/s", result["matmul"]) if prefill else ("GB/s", result["read_bandwidth"])
        rows.append(
            [
                f"prefill {row['tokens']}" if prefill else f"decode at {row['tokens']}",
                str(row["ours"]),
                str(row.get("peer", "-")),
                significant(row["ratio"].median) if "ratio" in row else "-",
                f"{significant(row['achieved'].median / 1e9)} {unit}",
                f"{significant(limit.median / 1e9)} {unit}",
                f"{100 * row['share_of_limit'].median:.0f} %",
            ]
        )
    columns = ["row", "fusedllm tokens/s", "transformers tokens/s", "ratio", "fusedllm achieves", "limit", "share"]
    return (
        table(columns, rows) + "\n\nMedians ± half the distance between the quartiles.\nPrefill is limited by"
        f" arithmetic: a float32 product of {MATMUL_SIZE} x {MATMUL_SIZE} matrices, the faster side's.\nDecode is"
        " limited by memory: a token must read every weight and its KV cache; the limit is a plain read by as many"
        " threads."
    )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", default="smollm2-135m", help="as for `fusedllm generate` (default: %(default)s)")
    parser.add_argument("--random-weights", action="store_true", help="seeded random weights of that architecture")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="cores for each side (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a bar chart (needs matplotlib)")
    parser.add_argument("--worker", choices=["ours", "peer", "export"], help=argparse.SUPPRESS)
    parser.add_argument("--exported", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker == "export":
        return export(arguments, arguments.exported)
    if arguments.worker:
        side = Ours if arguments.worker == "ours" else Peer
        return serve(lambda: side(arguments.ckpt, arguments.random_weights, arguments.exported))
    warn_if_busy()
    if hasattr(os, "sched_setaffinity"):  # Inherited by the workers; both size their thread pools by it.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    sides = ["ours"] + ["peer"] * all(map(importlib.util.find_spec, ("torch", "transformers")))
    with tempfile.TemporaryDirectory() as exported:
        itself = [sys.executable, __file__, "--ckpt", arguments.ckpt, "--exported", exported]
        itself += ["--random-weights"] * arguments.random_weights
        if "peer" in sides:
            subprocess.run([*itself, "--worker", "export"], check=True)
        else:
            print("torch and transformers are not installed (extra `bench`): no peer in this run.", file=sys.stderr)
        workers = {side: Worker([*itself, "--worker", side]) for side in sides}
        try:
            result = measure(workers, arguments.repetitions, arguments.threads)
        finally:
            for worker in workers.values():
                worker.close()
    print(f"{arguments.ckpt}, float32, {arguments.threads} threads, {arguments.repetitions} repetitions\n")
    print(report(result))
    where = environment("fusedllm", "jax", "jaxlib", "numpy", "torch", "transformers")
    if arguments.json:
        write_json(arguments.json, {**where, "ckpt": arguments.ckpt, "threads": arguments.threads, **result})
    if arguments.plot:
        labels = [f"{row['kind']}\n{row['tokens']}" for row in result["rows"]]
        series = {NAMES[side]: [row[side] for row in result["rows"]] for side in sides}
        bar_chart(arguments.plot, f"{arguments.ckpt}, float32, {arguments.threads} threads", labels, series)
    return None


if __name__ == "__main__":
    main()
