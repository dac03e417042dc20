"""Ten thousand decode steps under each policy, on one core and on two, with a server's threads running: none hangs.

    python benchmarks/steps.py
    python benchmarks/steps.py --policies masked verify --cores 1 --steps 2000 --json FILE

The model is the first two layers of SmolLM2-135M in w8a8. Each combination is a process of its own that is bound to its
cores before jax starts; it serves over HTTP, one client asks for answers one after another, so that a token is a step,
and another asks for `/metrics` all the time. One that gets no whole answer for `STUCK_SECONDS`, or takes as long to
start or to end, is killed with the stacks of its threads on standard error, and the exit code is 1. The forms of the
crossing in which a program waits are run with `--crossings driven callback ffi`.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

STUCK_SECONDS = 60.0
# To load, to compile and to warm up.
START_SECONDS = 300.0
# For a process that hangs where its own watch does not reach, as at its exit.
MOST_SECONDS = 3600.0
LAYERS = 2
TOKENS = 200
FLAGS = "--xla_force_host_platform_device_count=2"


def one(checkpoint: Path, policy: str, crossing: str, cores: int, steps: int) -> None:
    """Makes the steps in this process, and prints what they took as JSON."""
    faulthandler.dump_traceback_later(START_SECONDS, exit=True)
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:cores]))
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
    import dataclasses

    import httpx

    import fusedllm.serve
    from fusedllm.engine.config import EngineConfig
    from fusedllm.llm import load
    from fusedllm.weights.open import open_checkpoint

    whole = open_checkpoint(checkpoint)
    windows = whole.config.sliding_windows[:LAYERS]
    config = dataclasses.replace(whole.config, num_layers=LAYERS, sliding_windows=windows)
    names = tuple(f"layers.{layer}." for layer in range(LAYERS, whole.config.num_layers))
    tensors = {name: each for name, each in whole.tensors.items() if not any(part in name for part in names)}
    shapes = EngineConfig(max_context=256, cache_tokens=1024, prefill_buckets=(16,), batch_buckets=(1, 2))
    short = dataclasses.replace(whole, config=config, tensors=tensors)
    llm = load(short, policy=policy, engine=shapes, **({"crossing": crossing} if crossing else {}))
    made, scrapes = 0, 0
    done = threading.Event()
    with fusedllm.serve.run(llm, port=0, model_name="short", block=False) as server:

        def scrape() -> None:
            nonlocal scrapes
            with httpx.Client(base_url=server.url, timeout=STUCK_SECONDS) as client:
                while not done.is_set():
                    client.get("/metrics").raise_for_status()
                    scrapes += 1
                    done.wait(0.05)

        other = threading.Thread(target=scrape)
        other.start()
        began = time.perf_counter()
        with httpx.Client(base_url=server.url, timeout=STUCK_SECONDS) as client:
            while made < steps:
                faulthandler.dump_traceback_later(STUCK_SECONDS, exit=True)
                body = {"model": "short", "prompt": "Once", "max_tokens": TOKENS, "ignore_eos": True, "seed": made}
                answer = client.post("/v1/completions", json=body)
                answer.raise_for_status()
                made += answer.json()["usage"]["completion_tokens"]
        faulthandler.dump_traceback_later(STUCK_SECONDS, exit=True)
        seconds = time.perf_counter() - began
        done.set()
        other.join()
    crossings = llm.boundary.total().count
    llm.close()
    print(json.dumps({"steps": made, "seconds": seconds, "crossings": crossings, "scrapes": scrapes}))


def main() -> None:
    """Runs every combination."""
    from common import environment, table, write_json

    from fusedllm.partition.policies import POLICIES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--crossings", nargs="+", default=[""], help="forms of the crossing; by default the default")
    parser.add_argument("--cores", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        checkpoint, policy, crossing, cores = options.one
        one(Path(checkpoint), policy, crossing, int(cores), options.steps)
        return
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        from fusedllm.quantizing import quantize_file

        checkpoint = Path(folder) / "w8a8.arrow"
        quantize_file("smollm2-135m", checkpoint, "w8a8")
        for policy in options.policies:
            for crossing in options.crossings if POLICIES[policy].crosses else [""]:
                for cores in options.cores:
                    print(f"{policy} {crossing} on {cores} cores ...", file=sys.stderr, flush=True)
                    command = [sys.executable, __file__, "--steps", str(options.steps)]
                    command += ["--one", str(checkpoint), policy, crossing, str(cores)]
                    try:
                        ended = subprocess.run(
                            command, stdout=subprocess.PIPE, text=True, check=False, timeout=MOST_SECONDS
                        )
                    except subprocess.TimeoutExpired:
                        ended = subprocess.CompletedProcess(command, 1, "")
                    found = json.loads(ended.stdout.splitlines()[-1]) if ended.returncode == 0 else {}
                    combination = {"policy": policy, "crossing": crossing, "cores": cores}
                    rows.append({**combination, "rc": ended.returncode, **found})
    columns = ["policy", "crossing", "cores", "steps", "ms a step", "crossings", "/metrics", "ended"]
    print(table(columns, [_row(row) for row in rows]))
    if options.json:
        write_json(options.json, {"environment": environment(), "rows": rows})
    sys.exit(1 if any(row["rc"] for row in rows) else 0)


def _row(row: dict[str, object]) -> list[str]:
    start = [str(row[name]) for name in ("policy", "crossing", "cores")]
    if row["rc"]:
        return [*start, "", "", "", "", f"STUCK OR FAILED ({row['rc']})"]
    each = 1e3 * float(str(row["seconds"])) / int(str(row["steps"]))
    return [*start, f"{row['steps']:,}", f"{each:.2f}", f"{row['crossings']:,}", str(row["scrapes"]), "well"]


if __name__ == "__main__":
    main()
