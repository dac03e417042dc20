"""fusedllm's server under load beside llama.cpp's, on the same weights, in one interleaved run.

    python benchmarks/serve.py
    python benchmarks/serve.py --clients 1 8 --repetitions 3 --rates 1
    python benchmarks/serve.py --peer-python PYTHON --json benchmarks/results/serve.json --plot docs/serve.svg
    python benchmarks/serve.py --ours "fusedllm serve --ckpt smollm2-135m --port {port}"

Each row is a load: so many clients, each with a request at a time, or requests that arrive at random (Poisson) at a
rate; prompts that have nothing in common, or that begin with the same 512 tokens. Every request is a text, is answered
greedily, and makes the same number of tokens on each side. All servers run throughout and wait while another is loaded;
they take turns at being first. A figure is the median over the repetitions, a ratio the median of each repetition's.

The peer is found out first: of llama.cpp's own server (in `xllamacpp`, with its slots' KV caches apart or in one) and
that of `llama-cpp-python[server]`, whichever are installed, the one with the highest throughput at 8 clients.

The client shares the machine's cores with the server, so that its own share of the time is reported. A stream's events
may carry several tokens each. So there are two figures: the gap between events, which a reader sees, and that gap
divided over the event's tokens, as many as its share of the text's characters says.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import serve_sides
from common import Spread, environment, panels, warn_if_busy, write_json
from http_stream import Answer, Connection
from serve_report import report
from serve_sides import Server, Side

OURS = "{python} -m fusedllm serve --ckpt {ckpt} --port {{port}} --max-context {context}"
SHARED_TOKENS = 512
TAIL_TOKENS = 16
TRIAL_CLIENTS = 8
SETTLE_SECONDS = 0.3  # For the other side's threads to go from spinning to sleep.
PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class Load:
    """`clients` that each have a request at a time, or a Poisson process of `rate` requests a second."""

    clients: int = 0
    rate: float = 0.0
    shared: bool = False

    @property
    def name(self) -> str:
        """As it is shown."""
        load = f"{self.rate:g} requests/s" if self.rate else f"{self.clients} client" + "s" * (self.clients > 1)
        return f"{load}, shared prefix" if self.shared else load


class Prompts:
    """Texts of so many tokens, cut from the help texts that every CPython carries; none is given out twice."""

    def __init__(self, path: Path, seed: int) -> None:
        import pydoc_data.topics

        from fusedllm.text.tokenizer import Tokenizer
        from fusedllm.weights.open import open_checkpoint

        data = open_checkpoint(path).tokenizer
        if data is None:
            raise SystemExit(f"{path} has no tokenizer.")
        self._tokenizer = Tokenizer(data)
        self._ids = self._tokenizer.encode("\n".join(pydoc_data.topics.topics.values()), add_special=False)
        self._random = random.Random(seed)
        self.eos = sorted(self._tokenizer.stop_ids)

    def distinct(self, tokens: int) -> str:
        """A text that has nothing to do with the others: its first tokens are a number of its own."""
        head = self._tokenizer.encode(f"Text {self._random.randrange(10**9)}: ", add_special=False)
        return self._tokenizer.decode([*head, *self._cut(tokens - len(head))])

    def shared(self) -> Iterator[str]:
        """Texts that begin with the same new tokens and end differently, without end."""
        prefix = self.distinct(SHARED_TOKENS)
        while True:
            yield prefix + self.distinct(TAIL_TOKENS)

    def _cut(self, tokens: int) -> list[int]:
        begin = self._random.randrange(len(self._ids) - tokens)
        return self._ids[begin : begin + tokens]


def bodies(prompts: Prompts, load: Load, count: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The requests of one load, the same for all sides but for what a side needs besides."""
    shared = prompts.shared()
    return [
        {
            "prompt": next(shared) if load.shared else prompts.distinct(arguments.prompt_tokens),
            "max_tokens": arguments.tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for _ in range(count)
    ]


async def run(server: Server, load: Load, requests: Sequence[dict[str, Any]], seed: int) -> dict[str, Any]:
    """Sends the requests as the load says; what came of it, in numbers that pass through JSON."""
    waiting = [{**request, **server.side.body} for request in reversed(requests)]
    server_cpu, client_cpu, began = server.cpu_seconds(), time.process_time(), time.perf_counter()
    if load.rate:
        answers = await _poisson(server, load.rate, waiting, seed)
    else:
        answers = [answer for part in await _closed(server, load.clients, waiting) for answer in part]
    wall = max(answer.ended for answer in answers) - began
    client_cpu, server_cpu = time.process_time() - client_cpu, server.cpu_seconds() - server_cpu
    good = [answer for answer in answers if not answer.error]
    errors = sorted({answer.error for answer in answers if answer.error})
    if not good:
        raise SystemExit(f"{server.side.name} answers nothing at {load.name}: {errors[:1]}")
    tokens = sum(answer.tokens for answer in good)
    token_events = sum(len(answer.events) for answer in good)
    return {
        "throughput": tokens / wall,
        **percentiles("first_token", [answer.first_token_seconds for answer in good]),
        **percentiles("event_gap", [gap for answer in good for gap in answer.event_gaps()]),
        **percentiles("token_gap", [gap for answer in good for gap in answer.token_gaps()]),
        "tokens_per_event": tokens / token_events,
        "prompt_tokens": statistics.mean(answer.prompt_tokens for answer in good),
        "cached_tokens": statistics.mean(answer.cached_tokens for answer in good),
        "client_cpu": client_cpu / wall,
        "server_cpu": server_cpu / wall,
        "requests": len(answers),
        "errors": len(answers) - len(good),
        "error": errors[0] if errors else "",
    }


def percentiles(name: str, seconds: Sequence[float]) -> dict[str, float]:
    """Of times in seconds, by `name` with the percentile behind it; an answer of one event has no gaps."""
    values = np.percentile(seconds, PERCENTILES) if len(seconds) else [0.0] * len(PERCENTILES)
    return {f"{name}_p{percent}": float(value) for percent, value in zip(PERCENTILES, values, strict=True)}


async def _closed(server: Server, clients: int, waiting: list[dict[str, Any]]) -> list[list[Answer]]:
    """Each client takes the next request when it has its answer."""

    async def client() -> list[Answer]:
        connection, answers = Connection(server.port), []
        while waiting:
            answers.append(await connection.complete(waiting.pop()))
        connection.close()
        return answers

    return await asyncio.gather(*(client() for _ in range(clients)))


async def _poisson(server: Server, rate: float, waiting: list[dict[str, Any]], seed: int) -> list[Answer]:
    """Every request on a connection of its own, at a time that owes nothing to the answers."""
    gaps = random.Random(seed)
    tasks: list[asyncio.Task[Answer]] = []
    due = time.perf_counter()
    while waiting:
        due += gaps.expovariate(rate)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(_once(server.port, waiting.pop())))
    return await asyncio.gather(*tasks)


async def _once(port: int, body: dict[str, Any]) -> Answer:
    connection = Connection(port)
    answer = await connection.complete(body)
    connection.close()
    return answer


async def first_tokens(server: Server, prompts: Prompts, arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds to the first token of a prompt of 512 tokens and some: never seen, and with the 512 seen before."""
    load = Load(clients=1, shared=True)
    seen: dict[str, float] = {}
    connection = Connection(server.port)
    for name, body in zip(("new", "seen"), bodies(prompts, load, 2, arguments), strict=True):
        answer = await connection.complete({**body, **server.side.body})
        if answer.error:
            raise SystemExit(f"{server.side.name}: {answer.error}")
        seen[name] = answer.first_token_seconds
        seen[f"{name}_cached_tokens"] = answer.cached_tokens
        await asyncio.sleep(SETTLE_SECONDS)
    connection.close()
    return {**seen, "ratio": seen["new"] / seen["seen"]}


async def choose_peer(
    servers: list[Server], prompts: Prompts, arguments: argparse.Namespace
) -> tuple[Server | None, dict[str, float]]:
    """The peer with the highest throughput, and that of each by its name; ends the others."""
    load, speeds = Load(clients=TRIAL_CLIENTS), dict[Server, float]()
    for server in servers:
        for clients in (1, TRIAL_CLIENTS):  # The first wakes it.
            requests = bodies(prompts, load, clients, arguments)
            speeds[server] = (await run(server, Load(clients=clients), requests, 0))["throughput"]
        print(f"{server.side.name}: {speeds[server]:.1f} tokens/s at {load.name}", file=sys.stderr)
    best = max(servers, key=lambda server: speeds[server], default=None)
    for server in servers:
        if server is not best:
            server.stop()
    return best, {server.side.name: speed for server, speed in speeds.items()}


def loads(arguments: argparse.Namespace) -> list[Load]:
    """The rows, in the order of the report."""
    rows = [Load(clients=clients) for clients in arguments.clients]
    rows += [Load(clients=clients, shared=True) for clients in arguments.shared]
    return rows + [Load(rate=rate) for rate in arguments.rates]


async def measure(servers: dict[str, Server], prompts: Prompts, arguments: argparse.Namespace) -> dict[str, Any]:
    """Every row once per repetition and side, the sides taking turns at being first."""
    rows = loads(arguments)
    samples: dict[Load, dict[str, list[dict[str, Any]]]] = {row: {side: [] for side in servers} for row in rows}
    firsts: dict[str, list[dict[str, float]]] = {side: [] for side in servers}
    for repetition in range(-1, arguments.repetitions):  # The first warms up, and is dropped.
        sides = list(servers)[repetition % len(servers) :] + list(servers)[: repetition % len(servers)]
        for side in sides:
            firsts[side].append(await first_tokens(servers[side], prompts, arguments))
        for row in rows:
            count = arguments.requests or max(2 * row.clients, 8)
            requests = bodies(prompts, row, count if repetition >= 0 else max(row.clients, 1), arguments)
            for side in sides:
                await asyncio.sleep(SETTLE_SECONDS)
                samples[row][side].append(await run(servers[side], row, requests, repetition))
            latest = ", ".join(f"{side} {samples[row][side][-1]['throughput']:.1f}" for side in servers)
            print(f"{repetition + 1} of {arguments.repetitions}: {row.name}: {latest}", file=sys.stderr)
    entries = [{"name": row.name, "clients": row.clients, **_medians(sides)} for row, sides in samples.items()]
    prefix = {
        side: {name: Spread.of([one[name] for one in kept[1:]]) for name in kept[0]} for side, kept in firsts.items()
    }
    return {"rows": entries, "prefix": prefix}


def _medians(sides: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """What one row's samples come to: spreads for each side, and of our ratio to the peer in each repetition."""
    kept = {side: samples[1:] for side, samples in sides.items()}
    values: dict[str, Any] = {}
    for side, samples in kept.items():
        numbers = [name for name, value in samples[0].items() if not isinstance(value, str)]
        values[side] = {name: Spread.of([sample[name] for sample in samples]) for name in numbers}
        values[side]["errors"] = sum(sample["errors"] for sample in samples)
        values[side]["error"] = next((sample["error"] for sample in samples if sample["error"]), "")
    ratios = {}
    if "peer" in kept:
        for name in ("throughput", "first_token_p50", "event_gap_p99", "token_gap_p50", "token_gap_p99"):
            pairs = zip(kept["ours"], kept["peer"], strict=True)
            ratios[name] = Spread.of([one[name] / other[name] for one, other in pairs if other[name]] or [0.0])
    return {"sides": values, "ratios": ratios}


def sides_of(arguments: argparse.Namespace, path: Path, eos: Sequence[int]) -> tuple[Side, list[Side]]:
    """Ours, and the peers that are installed."""
    context = SHARED_TOKENS + 2 * TAIL_TOKENS + arguments.prompt_tokens + arguments.tokens + 64
    default = OURS.format(python=sys.executable, ckpt=path, context=context)
    ours = serve_sides.ours(f"{arguments.ours or default} {arguments.ours_options}", arguments.ours_ready)
    python, threads, peers = arguments.peer_python, arguments.threads, []
    if serve_sides.has(python, "xllamacpp"):
        slots = max([*arguments.clients, *arguments.shared, TRIAL_CLIENTS])
        peers += [serve_sides.xllamacpp(python, path, threads, slots, context, unified) for unified in (False, True)]
    python = arguments.llama_cpp_python or python
    if serve_sides.has(python, "llama_cpp.server.app"):
        peers.append(serve_sides.llama_cpp_python(python, path, threads, context, eos))
    return ours, peers if arguments.peers else []


async def main_async(arguments: argparse.Namespace) -> dict[str, Any]:
    """Starts the servers, chooses the peer, measures, and ends them."""
    from fusedllm.weights import registry

    path = registry.resolve(arguments.ckpt, progress=True)
    prompts = Prompts(path, arguments.seed)
    ours, peers = sides_of(arguments, path, prompts.eos)
    if not peers:
        print("no peer in this run: neither xllamacpp nor llama-cpp-python[server] is installed.", file=sys.stderr)
    with contextlib.ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        started = []
        for index, side in enumerate([ours, *peers]):
            started.append(Server(side, logs / f"{index}.log"))
            stack.callback(started[-1].stop)
            await started[-1].wait_until_ready()
        servers = {"ours": started[0]}
        peer, tried = await choose_peer(started[1:], prompts, arguments)
        if peer:
            servers["peer"] = peer
        result = await measure(servers, prompts, arguments)
    return {"peer": peer.side.name if peer else None, "tried": tried, **result}


def plot(path: Path, result: dict[str, Any]) -> None:
    """Throughput, time to the first token, and gaps by the number of clients."""
    rows = [row for row in result["rows"] if row["clients"] and "shared" not in row["name"]] or result["rows"]
    labels = [row["name"] for row in rows]
    names = {"ours": "fusedllm", "peer": "llama.cpp"}
    charts = {
        "throughput": ("throughput", "tokens/s", 1.0),
        "time to the first token, p50": ("first_token_p50", "ms", 1e3),
        "gap between tokens, p50": ("token_gap_p50", "ms", 1e3),
        "gap between tokens, p99": ("token_gap_p99", "ms", 1e3),
    }
    panels(
        path,
        {
            title: (labels, {names[s]: [_scaled(r["sides"][s][name], factor) for r in rows] for s in rows[0]["sides"]})
            for title, (name, _, factor) in charts.items()
        },
        units=[unit for _, unit, _ in charts.values()],
    )


def _scaled(spread: Spread, factor: float) -> Spread:
    return Spread(factor * spread.median, factor * spread.iqr, spread.samples)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", default="smollm2-135m", help="a name of `fusedllm models`, or a GGUF file")
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 2, 4, 8, 16], help="rows of so many clients")
    parser.add_argument("--shared", type=int, nargs="*", default=[8], help="the same with a shared prefix")
    parser.add_argument("--rates", type=float, nargs="*", default=[0.5, 2.0], help="rows of so many requests a second")
    parser.add_argument("--requests", type=int, help="of a row (default: two for each client, at least 8)")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="of a prompt without a shared prefix")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="cores for all: servers, and the client")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ours", metavar="COMMAND", help="another command for our server; {port} is the port")
    parser.add_argument("--ours-ready", default="/ready", metavar="PATH", help="that answers 200 once it is ready")
    parser.add_argument("--ours-options", default="", metavar="OPTIONS", help="added to our server's command")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--peer-python", default=sys.executable, help="the interpreter that has xllamacpp")
    parser.add_argument("--llama-cpp-python", metavar="PYTHON", help="that has llama-cpp-python[server], if another")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="bar charts, PNG or SVG (needs matplotlib)")
    arguments = parser.parse_args()
    warn_if_busy()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # Ends the servers too.
    if hasattr(os, "sched_setaffinity"):  # Inherited by the servers; they size their thread pools by it.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    result = asyncio.run(main_async(arguments))
    result |= {name: getattr(arguments, name) for name in ("threads", "prompt_tokens", "tokens", "repetitions", "ckpt")}
    print(report(result))
    if arguments.json:
        versions = {"peer_python": _versions(arguments)}
        write_json(arguments.json, {**environment("fusedllm", "jax", "jaxlib", "numpy"), **versions, **result})
    if arguments.plot:
        plot(arguments.plot, result)


def _versions(arguments: argparse.Namespace) -> dict[str, str]:
    pythons = {"xllamacpp": arguments.peer_python, "llama_cpp_python": arguments.llama_cpp_python}
    found = {name: python and serve_sides.version(python, name) for name, python in pythons.items()}
    return json.loads(json.dumps({name: text for name, text in found.items() if text}))


if __name__ == "__main__":
    main()
