"""Minutes of mixed load with random cancels on a running server: memory must stay flat, and no page may be lost.

    python benchmarks/soak.py
    python benchmarks/soak.py --minutes 1 --clients 12 --json FILE

Clients come and go: short and long prompts, shared and new ones, whole answers and streams, some of which are left in
the middle, grammars, log-probabilities, several answers at once, requests that are refused. Every `SAMPLE_SECONDS` the
server's memory is read. At the end, when nobody asks any more, no page may be in use, nothing may
have been compiled after the server was ready, and the memory of the last third may not be above that of the second by
more than `FLAT_MB`; otherwise the exit code is 1.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import random
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import environment, table, write_json
from http_stream import Connection
from serve_sides import Server, ours
from tqdm import tqdm

SAMPLE_SECONDS = 2.0

# The allocator of C keeps what it was given for a while.
FLAT_MB = 20.0

SETTLE_SECONDS = 30.0

WORDS = ("the", "of", "a", "language", "model", "runs", "on", "one", "compiled", "program", "and", "nothing", "calls")

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}

# Some requests that a server must refuse.
WRONG: tuple[dict[str, Any], ...] = (
    {"prompt": ""},
    {"prompt": "x", "temperature": -1},
    {"prompt": [10**9]},
    {"prompt": "x " * 20_000},
    {"prompt": "x", "tools": []},
    {"prompt": "x", "structured_outputs": {"regex": "("}},
)


def body_of(rng: random.Random) -> dict[str, Any]:
    """A request, of which some are wrong."""
    if rng.random() < 0.05:
        return {**rng.choice(WRONG), "stream": True}
    words = [rng.choice(WORDS) for _ in range(rng.choice([3, 20, 100, 300]))]
    start = WORDS * 12 if rng.random() < 0.4 else ()
    body: dict[str, Any] = {
        "prompt": " ".join([*start, *words]),
        "max_tokens": rng.choice([1, 8, 40, 120]),
        "temperature": rng.choice([0, 0.8]),
        "seed": rng.randrange(2**31),
        "stream": rng.random() < 0.8,
        "stream_options": None,
    }
    draw = rng.random()
    if draw < 0.1:
        body["n"] = rng.randrange(2, 5)
    elif draw < 0.2:
        body["logprobs"] = 3
    elif draw < 0.3:
        body["structured_outputs"] = rng.choice([{"regex": "[a-z]{3,30}"}, {"json": SCHEMA}, {"choice": ["yes", "no"]}])
    elif draw < 0.4:
        body |= {"frequency_penalty": 0.5, "repetition_penalty": 1.2, "stop": ["\n\n", "program"]}
    return body


async def client(port: int, rng: random.Random, end: float, counts: collections.Counter[str]) -> None:
    """Asks until `end`, and leaves a fourth of the answers in the middle."""
    connection = Connection(port)
    while time.monotonic() < end:
        body = body_of(rng)
        asking = asyncio.create_task(connection.complete(body))
        patience = rng.uniform(0, 1.5) if rng.random() < 0.25 else None
        done, _ = await asyncio.wait({asking}, timeout=patience)
        if not done:
            asking.cancel()
            await asyncio.wait({asking})
            connection.close()
            counts["left"] += 1
            continue
        error = asking.result().error
        # A whole answer is no stream of events, which is all that this client reads.
        kind = error[:10] if error.startswith("status") else "answered"
        counts[kind] += 1
        if error.startswith("status 503"):
            await asyncio.sleep(0.2)
    connection.close()


async def metrics_of(port: int) -> dict[str, float]:
    """The server's own figures, by name."""
    connection = Connection(port)
    _, content = await connection.get("/metrics")
    connection.close()
    lines = [line.rsplit(" ", 1) for line in content.decode().splitlines() if not line.startswith("#")]
    return {name.removeprefix("fusedllm:"): float(value) for name, value in lines}


async def soak(server: Server, arguments: argparse.Namespace) -> dict[str, Any]:
    """Loads the server; what was counted."""
    await server.wait_until_ready()
    counts: collections.Counter[str] = collections.Counter()
    begin = time.monotonic()
    end = begin + 60 * arguments.minutes
    rng = random.Random(arguments.seed)
    clients = [
        asyncio.create_task(client(server.port, random.Random(rng.random()), end, counts))
        for _ in range(arguments.clients)
    ]
    samples = []
    with tqdm(total=round(60 * arguments.minutes), unit="s", disable=None) as bar:
        while time.monotonic() < end:
            await asyncio.sleep(SAMPLE_SECONDS)
            seconds = time.monotonic() - begin
            bar.update(min(round(seconds), bar.total) - bar.n)
            samples.append((seconds, server.memory_bytes() / 1e6))
    await asyncio.gather(*clients)
    settled = time.monotonic() + SETTLE_SECONDS
    while True:
        figures = await metrics_of(server.port)
        idle = not figures["num_requests_running"] and not figures["num_requests_waiting"]
        if (idle and not figures["kv_cache_pages_in_use"]) or time.monotonic() > settled:
            break
        await asyncio.sleep(0.2)
    thirds = [
        statistics.median([mb for seconds, mb in samples if low <= seconds / (end - begin) < low + 1 / 3] or [0.0])
        for low in (0, 1 / 3, 2 / 3)
    ]
    return {
        "minutes": arguments.minutes,
        "clients": arguments.clients,
        "requests": dict(counts),
        "memory_mb_by_thirds": thirds,
        "pages_in_use_at_the_end": figures["kv_cache_pages_in_use"],
        "compiles_after_ready": figures["compiles_after_ready_total"],
        "failed_steps": figures["failed_steps_total"],
        "preemptions": figures["num_preemptions_total"],
        "generated_tokens": figures["generation_tokens_total"],
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    # So few pages that requests are preempted, too.
    options = "--max-batch 16 --max-context 1024 --cache-tokens 2048 --max-queue 8"
    command = f"{shlex.quote(sys.executable)} -m fusedllm serve --ckpt smollm2-135m --port {{port}} {options}"
    parser.add_argument("--server", default=command, metavar="COMMAND")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = Server(ours(arguments.server), Path(folder) / "log")
        try:
            result = asyncio.run(soak(server, arguments))
        finally:
            server.stop()
    result |= environment("jax", "fusedllm")
    print(table(["what", "found"], [[name, json.dumps(value)] for name, value in result.items()]))
    first, second, third = result["memory_mb_by_thirds"]
    flat = third <= second + FLAT_MB
    sound = not (result["pages_in_use_at_the_end"] or result["compiles_after_ready"] or result["failed_steps"])
    sound &= not any(kind.startswith("status 5") and kind != "status 503" for kind in result["requests"])
    print(f"memory {first:.0f}, {second:.0f}, {third:.0f} MB by thirds: {'flat' if flat else 'GROWING'}")
    if arguments.json:
        write_json(arguments.json, result)
    sys.exit(0 if flat and sound else 1)


if __name__ == "__main__":
    main()
