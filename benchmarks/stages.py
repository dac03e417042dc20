"""What each room of the house costs: the same request through more and more of fusedllm, in one interleaved run.

    python benchmarks/stages.py
    python benchmarks/stages.py --json benchmarks/results/stages.json --plot docs/stages.svg

0 is the compiled decode program, launched in a loop that nobody reads; 1 adds the runner, which fetches tokens; 2 the
scheduler; 3 the engine in its thread; 4 `LLM.stream`, which makes text; 5 the HTTP server in a process of its own, with
one streaming client in this one. Each makes the same number of tokens after the same prompt, greedily, and is timed
from its first token to its last. They take turns at being first; a figure is the median over the repetitions, a loss
the median of each repetition's.

"Host time" is by how much a token takes longer than in stage 0 of the same repetition. Bytes are what the runner counts
of arrays that cross between host and device for decoding. The server's are not seen from here: they are its engine's,
as in stage 3. The picture has beside it the server that this one replaces.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import serve_sides
from common import Spread, environment, significant, table, warn_if_busy, write_json
from http_stream import Connection
from serve_sides import Server
from stages_engine import Rooms, Run

SERVER = "{python} -m fusedllm serve --ckpt {ckpt} --port {{port}} --max-context {context}"
SETTLE_SECONDS = 0.2
# As the table has them, and as the picture does.
SHORT_NAMES = {
    "0 compiled program": "program",
    "1 + runner": "runner",
    "2 + scheduler": "scheduler",
    "3 + engine's thread": "engine",
    "4 + LLM.stream": "LLM",
    "5 + HTTP streaming": "HTTP server",
}
NAMES = tuple(SHORT_NAMES)
# Tokens a second of the layered C++ server in its own staged test; its batch manager made 20 to 27.
PREDECESSOR = {
    "direct": 131.0,
    "backend": 120.0,
    "engine": 116.0,
    "executor": 71.0,
    "batch manager": 23.5,
    "whole server": 46.0,
}


class Client:
    """Stage 5: one streaming client of a server."""

    def __init__(self, server: Server, prompt: list[int], tokens: int) -> None:
        self._server = server
        self._body = {
            "prompt": prompt,
            "max_tokens": tokens + 1,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **server.side.body,
        }
        self.cpu_share = 0.0

    def run(self) -> Run:
        """One request. Its first event has a token, as stage 3's first chunk; the others those of a launch each."""
        connection = Connection(self._server.port)
        cpu, began = time.process_time(), time.perf_counter()

        async def complete() -> Any:
            answer = await connection.complete(self._body)
            connection.close()
            return answer

        answer = asyncio.run(complete())
        self.cpu_share = (time.process_time() - cpu) / (time.perf_counter() - began)
        if answer.error:
            raise SystemExit(f"the server fails: {answer.error}")
        seconds = answer.events[-1][0] - answer.events[0][0]
        return Run(answer.tokens - 1, seconds, len(answer.events) - 1, 0, 0)


def measure(stages: dict[str, Callable[[], Run]], client: Client | None, repetitions: int) -> dict[str, Any]:
    """Every stage once per repetition, in turns at being first."""
    names = list(stages)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    shares = []
    for repetition in range(-1, repetitions):  # The first warms up, and is dropped.
        turn = repetition % len(names)
        for name in names[turn:] + names[:turn]:
            time.sleep(SETTLE_SECONDS)
            runs[name].append(stages[name]().figures())
        shares.append(client.cpu_share if client else 0.0)
        latest = ", ".join(f"{runs[name][-1]['speed']:.1f}" for name in names)
        print(f"{repetition + 1} of {repetitions}: {latest} tokens/s", file=sys.stderr)
    kept = {name: samples[1:] for name, samples in runs.items()}
    rows = []
    for index, name in enumerate(names):
        before = kept[names[max(index - 1, 0)]]
        pairs = list(zip(kept[name], kept[names[0]], before, strict=True))
        row: dict[str, Any] = {key: Spread.of([sample[key] for sample in kept[name]]) for key in kept[name][0]}
        row["kept"] = Spread.of([100 * own["speed"] / first["speed"] for own, first, _ in pairs])
        row["loss"] = Spread.of([100 - 100 * own["speed"] / first["speed"] for own, first, _ in pairs])
        row["step_loss"] = Spread.of([100 - 100 * own["speed"] / last["speed"] for own, _, last in pairs])
        row["host_seconds"] = Spread.of([own["seconds"] - first["seconds"] for own, first, _ in pairs])
        rows.append({"name": name, **row})
    return {"rows": rows, "client_cpu": Spread.of(shares[1:])}


def report(result: dict[str, Any]) -> str:
    """The staircase as a table."""
    columns = ["stage", "tokens/s", "loss", "of it here", "host time a token", "tokens a launch"]
    columns += ["bytes to device", "bytes to host, a token"]
    lines = []
    for row in result["rows"]:
        served = row["name"] == NAMES[5]
        crossed = ["-", "-"] if served else [significant(row[name].median) for name in ("to_device", "to_host")]
        losses = [f"{row[name].median:.1f} %" for name in ("loss", "step_loss")]
        host = f"{1e6 * row['host_seconds'].median:.0f} µs"
        lines.append([row["name"], str(row["speed"]), *losses, host, f"{row['launch_tokens'].median:.1f}", *crossed])
    share = f"The client of stage 5 took {100 * result['client_cpu'].median:.1f} % of a core."
    head = f"## {result['ckpt']}, {result['tokens']} tokens after {result['prompt']}, {result['threads']} threads"
    return "\n\n".join([head, table(columns, lines), share])


def plot(path: Path, result: dict[str, Any]) -> None:
    """Two staircases: what each room keeps of the program's speed, ours and the predecessor's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = result["rows"]
    first = PREDECESSOR["direct"]
    theirs = [(name, speed, 100 * speed / first) for name, speed in PREDECESSOR.items()]
    ours = [(SHORT_NAMES[row["name"]], row["speed"].median, row["kept"].median) for row in rows]
    figure, both = pyplot.subplots(1, 2, figsize=(12, 4), layout="constrained", sharey=True)
    for axes, title, steps, color in ((both[0], "fusedllm", ours, "C0"), (both[1], "its predecessor", theirs, "C1")):
        bars = axes.bar(range(len(steps)), [kept for _, _, kept in steps], 0.9, color=color)
        axes.bar_label(bars, labels=[f"{kept:.0f} %\n{significant(speed)}" for _, speed, kept in steps], padding=2)
        axes.set_xticks(range(len(steps)), [name.replace(" ", "\n") for name, _, _ in steps])
        axes.set_title(f"{title}: tokens/s, and what is left of the first")
    both[0].set_ylim(0, 20 + max(kept for _, _, kept in (*ours, *theirs)))
    both[0].set_ylabel("% of the first")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    print(f"wrote {path}")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", default="smollm2-135m")
    parser.add_argument("--prompt", type=int, default=16, help="tokens")
    parser.add_argument("--tokens", type=int, default=256, help="of an answer, a multiple of a launch's 16")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--server", metavar="COMMAND", help="another command for the server; {port} is the port")
    parser.add_argument("--http", action=argparse.BooleanOptionalAction, default=True, help="stage 5 too")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="the staircases, PNG or SVG (needs matplotlib)")
    arguments = parser.parse_args()
    warn_if_busy()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # Ends the servers too.
    if hasattr(os, "sched_setaffinity"):  # Inherited by the server; it sizes its thread pool by it.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    rooms = Rooms(arguments.ckpt, arguments.prompt, arguments.tokens, arguments.threads)
    rooms.settle()
    methods = (rooms.program, rooms.runner, rooms.scheduler, rooms.engine, rooms.stream)
    stages: dict[str, Callable[[], Run]] = dict(zip(NAMES, methods, strict=False))
    with tempfile.TemporaryDirectory() as logs:
        server = client = None
        try:
            if arguments.http:
                context = arguments.prompt + arguments.tokens + 64
                command = SERVER.format(python=sys.executable, ckpt=arguments.ckpt, context=context)
                server = Server(serve_sides.ours(arguments.server or command), Path(logs) / "server.log")
                asyncio.run(server.wait_until_ready())
                client = Client(server, rooms.ids, arguments.tokens)
                stages[NAMES[5]] = client.run
            result = measure(stages, client, arguments.repetitions)
        finally:
            if server:
                server.stop()
    result |= {name: getattr(arguments, name) for name in ("ckpt", "prompt", "tokens", "threads", "repetitions")}
    print(report(result))
    if arguments.json:
        write_json(arguments.json, {**environment("fusedllm", "jax", "jaxlib", "numpy"), **result})
    if arguments.plot:
        plot(arguments.plot, result)


if __name__ == "__main__":
    main()
