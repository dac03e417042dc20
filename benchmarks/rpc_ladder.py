"""The predecessor's RPC design beside the engine's own policies: where the time of a split forward goes.

    python benchmarks/rpc_ladder.py
    python benchmarks/rpc_ladder.py --seq 256 --json benchmarks/results/rpc_ladder.json --plot docs/rpc_ladder.svg
    python benchmarks/rpc_ladder.py --transport-only

The predecessor split LLaMA between a trusted client, which does norms, rotary embedding, softmax, residuals and the
activation, and a device server, which does the products: six calls a layer, one for the embedding and one for the head,
98 a forward of the 1B shape, over ZeroMQ. Here that is run again, in two processes, and improved one step at a time:

    a  msgpack of Python lists           b  msgpack of bytes (over ipc, and over tcp)
    c  the same in bfloat16              d  shared memory, only shapes go through ZeroMQ
    e  one call a layer, compiled as a whole, through shared memory

The head sees the last token alone, as in the engine, and keys and values are sent once for all heads that share them;
the predecessor was less kind to itself. Beside it the engine's prefill under its policies, each in one process. All use
random weights, the same ones, and the same kernels, and their logits are compared; `masked` and `verify` have them in
w8a8, which their products need. A figure is the median over the repetitions, in which all rungs take turns at being
first; "overhead" is what a rung takes longer than its own arithmetic (products, attention, norms, activations) where
nothing has to travel, which is timed right before and right after it.

Rungs a to e and the policies `plain`, `split` and `verify` show the device all activations: no confidentiality claim.
Of the policies with pads the latency is that of a prompt whose pads were there; what they took stands beside it.
`verify` and `masked+verify` are run where `--rungs` asks for them: each process holds the whole model once more.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rpc_transport
from common import Spread, Worker, environment, warn_if_busy, write_json
from rpc_client import IN_PROCESS, PHASES, Channel, DeviceServer, TrustedClient, largest_message
from rpc_musts import verdicts
from rpc_plot import plot
from rpc_report import report

from fusedllm.config import ModelConfig
from fusedllm.weights import registry

SEED = 0
TRANSPORT_REPETITIONS = 9
SETTLE_SECONDS = 0.2  # For threads of the rung before to go to sleep.

# Of a prompt of 1,024 tokens lists take minutes: beyond so many tokens they are measured on one layer and scaled.
MOST_UNSCALED_TOKENS = 256

# By how much logits may differ, as the distance to the first rung's over that one's length. Only the order of sums
# differs in float32. Where products or the cache round to bfloat16 (2^-9), a last bit decides which way, and four
# products in each of 16 layers add up as a random walk.
TOLERANCE_FLOAT32 = 1e-3
TOLERANCE_ROUNDED = 0.1
# The policies of integers round weights and activations to eight bits, some 1 % of error a product.
TOLERANCE_W8A8 = 0.3


@dataclass(frozen=True)
class Rung:
    """One way to run a prompt: through a channel, or as a policy of the engine in one process.

    `arithmetic` is the kind of products that `Products.arithmetic` times for it.
    """

    name: str
    title: str
    arithmetic: str
    channel: Channel | None = None
    fused: bool = False


RUNGS = (
    Rung("a", "(a) msgpack of lists, ipc", "calls", Channel("a")),
    Rung("b", "(b) msgpack of bytes, ipc", "calls", Channel("b")),
    Rung("b-tcp", "(b) msgpack of bytes, tcp", "calls", Channel("b", "tcp")),
    Rung("c", "(c) bfloat16, ipc", "calls", Channel("c")),
    Rung("d", "(d) shared memory", "calls", Channel("d")),
    Rung("e", "(e) one call a layer", "layers", Channel("d"), fused=True),
    Rung("masked+verify", "masked+verify, in process", "ring"),
    Rung("masked", "masked, in process", "ring"),
    Rung("verify", "verify, in process", "ring"),
    Rung("split", "split, in process", "last"),
    Rung("plain", "plain, in process", "last"),
)
# Where nobody asks for others.
USUAL = tuple(rung for rung in RUNGS if "verify" not in rung.name)


@dataclass(frozen=True)
class Setting:
    """What is run: the shape, the prompt, and which rungs are measured on a part of the layers.

    `limit_size` is that of the products that measure what the machine can do; by default what it does in a moment.
    """

    config: ModelConfig
    dtype: str
    seq: int
    scaled: frozenset[str] = frozenset()
    scaled_layers: int = 0
    limit_size: int | None = None

    @property
    def tokens(self) -> np.ndarray:
        """The prompt; what it says changes no time."""
        return np.random.RandomState(self.seq).randint(0, self.config.vocab_size, self.seq).astype(np.int32)

    def measured_layers(self, rung: Rung) -> int:
        """Of how many layers the calls are made by the rung's own channel."""
        return min(self.scaled_layers, self.config.num_layers) if rung.name in self.scaled else self.config.num_layers


class Ladder:
    """The processes of a run, and one sample of each rung."""

    def __init__(self, setting: Setting, server: DeviceServer, policies: Callable[[str], Worker]) -> None:
        self.setting = setting
        self._server, self._policies = server, policies
        self._workers: dict[str, Worker] = {}
        self._client = TrustedClient(setting.config, server, SEED)
        server.ask("load", setting.config.to_dict(), setting.dtype, SEED)

    def prepare(self, rung: Rung) -> dict[str, Any]:
        """Loads what a policy needs: its `claim`, or `why_not`."""
        if rung.channel is not None:
            return {}
        worker, setting = self._policies(rung.name), self.setting
        self._workers[rung.name] = worker
        return worker.ask("load", setting.config.to_dict(), setting.dtype, SEED, setting.seq)

    def logits(self, rung: Rung) -> np.ndarray:
        """After the last token, by all of the rung's way: its warm-up as well."""
        if rung.channel is None:
            return np.asarray(self._workers[rung.name].ask("logits", self.setting.tokens.tolist()), np.float32)
        return self._forward(rung)[0]

    def sample(self, rung: Rung) -> dict[str, float]:
        """One run: seconds of the whole and of each phase, calls, and bytes to the device and back."""
        if rung.channel is None:
            return self._workers[rung.name].ask("prefill", self.setting.tokens.tolist())
        account = self._forward(rung)[1]
        totals = {"latency": account.latency, "calls": account.count}
        return {**totals, "sent": account.sent, "received": account.received, **account.phases}

    def decode(self, rung: Rung) -> dict[str, float]:
        """One answer of a policy: seconds and crossings of a token, and the offline seconds of its pads."""
        return self._workers[rung.name].ask("decode", self.setting.tokens.tolist())

    def arithmetic(self, kind: str) -> float:
        """Seconds of the products of that kind, where nothing travels."""
        return self._server.ask("arithmetic", kind, self.setting.seq)

    def limits(self) -> dict[str, Any]:
        """What the machine can do, now."""
        return {"copy_rate": rpc_transport.copy_rate(), **self._server.ask("limits", self.setting.limit_size)}

    def _forward(self, rung: Rung) -> tuple[np.ndarray, Any]:
        assert rung.channel
        measured = self.setting.measured_layers(rung)
        return self._client.forward(self.setting.tokens, rung.channel, fused=rung.fused, measured_layers=measured)


def measure(ladder: Ladder, rungs: Sequence[Rung], repetitions: int) -> dict[str, Any]:
    """All rungs once per repetition, in turns at being first, beside their arithmetic; then ratios."""
    prepared = {rung.name: ladder.prepare(rung) for rung in rungs}
    left_out = {name: said["why_not"] for name, said in prepared.items() if "why_not" in said}
    rungs = [rung for rung in rungs if rung.name not in left_out]
    logits = {rung.name: ladder.logits(rung) for rung in rungs}  # Compiles what is to be compiled.
    kinds = sorted({rung.arithmetic for rung in rungs})
    for kind in kinds:
        ladder.arithmetic(kind)
    samples: dict[str, list[dict[str, float]]] = {rung.name: [] for rung in rungs}
    decoded: dict[str, list[dict[str, float]]] = {rung.name: [] for rung in rungs if rung.channel is None}
    limits = []
    for repetition in range(repetitions):
        limits.append(ladder.limits())
        turn = repetition % len(rungs)
        for rung in rungs[turn:] + rungs[:turn]:
            time.sleep(SETTLE_SECONDS)
            before = ladder.arithmetic(rung.arithmetic)
            sample = ladder.sample(rung)
            sample["arithmetic"] = (before + ladder.arithmetic(rung.arithmetic)) / 2
            sample["overhead"] = sample["latency"] - sample["arithmetic"]
            samples[rung.name].append(sample)
        for rung in rungs[turn:] + rungs[:turn]:
            if rung.name in decoded:
                time.sleep(SETTLE_SECONDS)
                decoded[rung.name].append(ladder.decode(rung))
        latest = ", ".join(f"{rung.name} {1e3 * samples[rung.name][-1]['latency']:.0f}" for rung in rungs)
        print(f"{repetition + 1} of {repetitions}: {latest} ms", file=sys.stderr)
    rows = [
        {**_row(rung, ladder.setting, samples, logits), "claim": prepared[rung.name].get("claim")} for rung in rungs
    ]
    decode = {
        name: {key: Spread.of([sample[key] for sample in own]) for key in own[0]} for name, own in decoded.items()
    }
    return {"rows": rows, "decode": decode, "left_out": left_out, "limits": _best(limits)}


def _best(limits: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What was found in any repetition: of a limit the largest."""
    fastest = max(limits, key=lambda found: found["operations_per_second"])
    return {
        key: max(found[key] for found in limits) if isinstance(value, float) else value
        for key, value in fastest.items()
    }


def _row(
    rung: Rung, setting: Setting, samples: dict[str, list[dict[str, float]]], logits: dict[str, np.ndarray]
) -> dict[str, Any]:
    own = samples[rung.name]
    row: dict[str, Any] = {"name": rung.name, "title": rung.title}
    measured = setting.measured_layers(rung)
    row["scaled_from_layers"] = measured if measured < setting.config.num_layers else None
    row["integers"] = rung.arithmetic == "ring"
    spreads = {key: Spread.of([sample[key] for sample in own]) for key in own[0]}
    row["phases"] = {phase: spreads.pop(phase) for phase in (*PHASES, *IN_PROCESS) if phase in spreads}
    pairs = {other: list(zip(samples[other], own, strict=True)) for other in ("a", "b") if other in samples}
    row["speedup"] = {
        other: Spread.of([slow["latency"] / sample["latency"] for slow, sample in both])
        for other, both in pairs.items()
    }
    # Not the other way round: the overhead of a policy may be nothing.
    shares = {other: [sample["overhead"] / slow["overhead"] for slow, sample in both] for other, both in pairs.items()}
    row["overhead_share"] = {other: Spread.of(found) for other, found in shares.items()}
    row["worst"] = {
        "overhead_share": {other: max(found) for other, found in shares.items()},
        "speedup": {
            other: min(slow["latency"] / one["latency"] for slow, one in both) for other, both in pairs.items()
        },
    }
    row["tolerance"] = tolerance(setting.dtype, rung)
    row["distance"] = distance(logits[rung.name], next(iter(logits.values())))
    return {**row, **spreads}


def distance(logits: np.ndarray, reference: np.ndarray) -> float:
    """Between two rows of logits, over the length of the second."""
    return float(np.linalg.norm(logits - reference) / np.linalg.norm(reference))


def tolerance(dtype: str, rung: Rung) -> float:
    """How far the rung's logits may be apart from the first rung's, where the model is in `dtype`."""
    if rung.arithmetic == "ring":
        return TOLERANCE_W8A8
    narrow = rung.channel is not None and rung.channel.codec == "c"
    return TOLERANCE_FLOAT32 if dtype == "float32" and not narrow else TOLERANCE_ROUNDED


@contextlib.contextmanager
def processes() -> Iterator[tuple[DeviceServer, Callable[[str], Worker]]]:
    """The device server, and a maker of the policies' processes; all have ended afterwards."""
    # Two processes share an accelerator: neither may take all of its memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    with contextlib.ExitStack() as ending:
        server = DeviceServer()
        ending.callback(server.close)

        def policies(name: str) -> Worker:
            worker = Worker([sys.executable, str(Path(__file__).parent / "rpc_policies.py"), name])
            ending.callback(worker.close)
            return worker

        yield server, policies


def run(
    setting: Setting, rungs: Sequence[Rung], repetitions: int, server: DeviceServer, policies: Callable[[str], Worker]
) -> dict[str, Any]:
    """The ladder, with the machine's limits."""
    server.share(largest_message(setting.config, setting.seq))
    result = measure(Ladder(setting, server, policies), rungs, repetitions)
    result |= {
        "operations": needed_operations(setting.config, setting.seq),
        "weight_bytes": server.ask("weight_bytes"),
        "weights": product_weights(setting.config),
        "seq": setting.seq,
        "layers": setting.config.num_layers,
        "dtype": setting.dtype,
        "repetitions": repetitions,
    }
    return result


def needed_operations(config: ModelConfig, seq: int) -> float:
    """Floating-point operations that nobody can leave out: of the last layer only keys and values of all tokens."""
    width, narrow = config.num_heads * config.head_dim, 2 * config.num_kv_heads * config.head_dim
    keys_and_values = config.hidden_size * narrow
    others = config.hidden_size * (2 * width + 3 * config.intermediate_size)
    before = config.num_layers - 1
    # A token attends to half of them on average, and to itself.
    pairs = before * seq * (seq + 1) / 2 + seq
    products = config.num_layers * seq * keys_and_values + (before * seq + 1) * others
    return 2 * (products + 2 * width * pairs + config.vocab_size * config.hidden_size)


def product_weights(config: ModelConfig) -> int:
    """How many weights the products of a forward read, each once."""
    row = config.vocab_size * config.hidden_size
    return config.num_parameters - (0 if config.tie_embeddings else row)


def _setting(arguments: argparse.Namespace, platform: str) -> Setting:
    config = registry.architecture(arguments.ckpt)
    if arguments.layers:
        windows = config.sliding_windows[: arguments.layers]
        config = dataclasses.replace(config, num_layers=arguments.layers, sliding_windows=windows)
    seq = arguments.seq or (128 if platform == "cpu" else 1024)
    layers = arguments.scaled_layers
    if layers is None:
        layers = 0 if seq <= MOST_UNSCALED_TOKENS else 1
    return Setting(config, arguments.dtype, seq, frozenset(arguments.scaled if layers else ()), layers)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", default="llama-1b", help="whose architecture (default: %(default)s)")
    parser.add_argument("--layers", type=int, help="fewer than the architecture has")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--seq", type=int, help="tokens of the prompt (default: 128 on a CPU, 1024 elsewhere)")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--rungs", nargs="+", choices=[rung.name for rung in RUNGS], metavar="RUNG")
    parser.add_argument(
        "--scaled-layers",
        type=int,
        metavar="N",
        help=f"measure rungs of --scaled on N layers and scale (0: on all; default: 1 beyond {MOST_UNSCALED_TOKENS}"
        " tokens)",
    )
    parser.add_argument("--scaled", nargs="+", choices=["a", "b", "b-tcp"], default=["a"], metavar="RUNG")
    parser.add_argument("--transport", action="store_true", help="the transport diagnosis too")
    parser.add_argument("--transport-only", action="store_true", help="the transport diagnosis, and no model")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="the waterfall, PNG or SVG (needs matplotlib)")
    return parser.parse_args()


def main() -> None:
    """The command."""
    arguments = _parse()
    warn_if_busy()
    result: dict[str, Any] = environment("fusedllm", "jax", "jaxlib", "numpy", "pyzmq", "msgpack")
    with processes() as (server, policies):
        if arguments.transport or arguments.transport_only:
            server.share(rpc_transport.MESSAGE_BYTES)
            result["transport"] = rpc_transport.diagnose(server, max(arguments.repetitions, TRANSPORT_REPETITIONS))
        if not arguments.transport_only:
            device = server.ask("device")
            setting = _setting(arguments, device["platform"])
            rungs = [rung for rung in RUNGS if rung.name in arguments.rungs] if arguments.rungs else USUAL
            result |= run(setting, rungs, arguments.repetitions, server, policies)
            result |= {"ckpt": arguments.ckpt, "device": device, "random_weights": True}
            result["all_layers"] = registry.architecture(arguments.ckpt).num_layers
            result["verdicts"] = verdicts(result)
    if "rows" in result:
        print(report(result))
    if "transport" in result:
        print("\n" + rpc_transport.report(result["transport"]))
    if arguments.json:
        write_json(arguments.json, result)
    if arguments.plot and "rows" in result:
        plot(arguments.plot, result)
    wrong = [row["title"] for row in result.get("rows", ()) if row["distance"] > row["tolerance"]]
    if wrong:
        raise SystemExit(f"these rungs have other logits than the first: {', '.join(wrong)}.")


if __name__ == "__main__":
    main()
