"""fusedllm on a CPU beside llama.cpp and HF transformers, on the same weights, in one interleaved run.

    python benchmarks/cpu.py
    python benchmarks/cpu.py --models 1b-q4 --rows decode-16 batch-8 prefill-512 --repetitions 3
    python benchmarks/cpu.py --json benchmarks/results/cpu.json --plot docs/cpu.svg

Models: SmolLM2-135M, and LLaMA-3.2-1B's shape with random weights (`cpu_models.py`); every side reads the same file,
transformers its dequantized weights. Peers: what the extra `bench` has installed of llama.cpp (`llama-cpp-python`,
`xllamacpp`; `--llama` names other builds of `libllama.so`), and transformers. It is found out first which build and
setting of flash attention of llama.cpp, and which dtype of transformers, is fastest here; that is the peer.

Each side lives in a process of its own and waits while another is measured; they take turns at being first. A figure is
the median over the repetitions, a ratio the median of each repetition's, and the memory's limit is read anew in each.
Nothing else may run meanwhile: OpenMP's barriers spin, so that a busy machine slows llama.cpp down tenfold and not us.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cpu_models
import cpu_peers
import numpy as np
from common import (
    ReadBandwidth,
    Spread,
    Worker,
    environment,
    memory,
    panels,
    prefill_operations,
    seconds,
    serve,
    sizes,
    warn_if_busy,
    write_json,
)
from cpu_report import NAMES, report
from cpu_start import PROMPT, first_tokens

MATMUL_SIZE = 2048
SETTLE_SECONDS = 0.2  # For the other side's threads to go from spinning to sleep.
TRIALS = 2  # Of each peer that could be the one.
WAKE_TOKENS = 16  # An unmeasured prompt before each figure: wakes what has gone cold meanwhile.
LLAMA_KV_BYTES = 2  # Its KV cache is float16.


@dataclass(frozen=True)
class Row:
    """One figure: a prefill of `tokens`, or a decode of `batch` requests after prompts of as many."""

    kind: str
    tokens: int
    batch: int = 1

    @property
    def name(self) -> str:
        """As `--rows` takes it."""
        return f"batch-{self.batch}" if self.kind == "batch" else f"{self.kind}-{self.tokens}"

    def runs_on(self, side: str) -> bool:
        """Sampling is compared with our own greedy decode; transformers is too slow for more than a few rows."""
        if side == "transformers":
            return self.kind == "prefill" or (self.kind == "decode" and self.tokens <= 512)
        return side == "ours" or self.kind != "sampled"

    @property
    def call(self) -> tuple[Any, ...]:
        """The worker's method and its arguments."""
        return ("decode", self.tokens, self.batch) if self.kind == "batch" else (self.kind, self.tokens)


# A sampled row comes right after the greedy one that it is compared with.
ROWS = (
    *(Row("prefill", tokens) for tokens in (128, 512, 1024)),
    *(Row(kind, context) for context in (16, 512, 2048) for kind in ("decode", "sampled")),
    *(Row("batch", 16, batch) for batch in (4, 8, 16)),
)
MAX_CONTEXT = 2048 + 128


class Ours:
    """fusedllm as `fusedllm.load` makes it, with an engine for contexts and batches of this size."""

    def __init__(self, path: str, threads: int, bits: int | None) -> None:
        import fusedllm

        self._sampling = fusedllm.SamplingParams
        engine = fusedllm.EngineConfig(max_context=MAX_CONTEXT, batch_buckets=(1, 4, 8, 16), prefix_cache=False)
        self.llm = fusedllm.load(path, engine=engine, threads=threads, activation_bits=bits)

    def prefill(self, tokens: int) -> float:
        """Tokens a second of a prompt, its first token's choice included."""
        (ids,) = cpu_peers.prompts(self.llm.config.vocab_size, 1, tokens)
        (result,) = self.llm.generate([ids], temperature=0, max_tokens=1, ignore_eos=True)
        return tokens / result.timings.prefill_seconds

    def decode(self, context: int, batch: int = 1) -> float:
        """Tokens a second of greedy steps, `batch` requests together."""
        return self._decode(context, batch, temperature=0)

    def sampled(self, context: int, batch: int = 1) -> float:
        """The same with random choices."""
        return self._decode(context, batch, temperature=0.8, top_p=0.95, seed=1)

    def matmul(self) -> float:
        """Operations a second of a float32 matrix product, a reference beside the prefill in whatever types."""
        import jax

        x = jax.numpy.ones((MATMUL_SIZE, MATMUL_SIZE))
        multiply = jax.jit(lambda x: jax.numpy.einsum("mk,nk->mn", x, x))  # Weights `[out, in]`, as the model's are.
        multiply(x).block_until_ready()
        return 2 * MATMUL_SIZE**3 / min(seconds(lambda: multiply(x).block_until_ready()) for _ in range(3))

    def memory(self) -> dict[str, int]:
        """This process's memory in bytes, after a generation."""
        self.decode(16)
        return memory()

    def sizes(self) -> dict[str, Any]:
        """The model's sizes, and bytes of the KV cache for one position."""
        runner = self.llm.engine.runner
        positions = runner.engine.num_pages * runner.engine.page_size
        bits = {"activation_bits": self.llm.activation_bits}
        return {**sizes(self.llm.config), **bits, "kv_bytes": runner.cache_bytes / positions}

    def start_prompt(self, text: str) -> list[int]:
        """Token ids that `fusedllm generate` makes of a prompt."""
        tokenizer = self.llm.tokenizer
        if tokenizer is None:
            return list(text.encode())
        templated = tokenizer.data.chat_template is not None
        return self.llm.render([{"role": "user", "content": text}]) if templated else self.llm.encode(text)

    def _decode(self, context: int, batch: int, **sampling: Any) -> float:
        """Counts from when the tokens of the first decode launch arrive until the last ones do.

        Between the two, launches follow one another without a gap, so that a launch which has begun before the prefill
        was read can't make the figure better, and none before it can make it worse. Detokenizing is left out, as it
        is for the peers.
        """
        count = cpu_peers.DECODE_TOKENS + 17  # The prefill's token, and at most as many as one launch makes.
        parameters = self._sampling(max_tokens=count, ignore_eos=True, **sampling)
        requests = cpu_peers.prompts(self.llm.config.vocab_size, batch, context)
        sequences = [self.llm.engine.prepare(ids, parameters) for ids in requests]
        tokens, arrivals = 0, []
        for _, chunk in self.llm.engine.run(sequences):
            tokens += len(chunk.tokens)
            arrivals.append((time.perf_counter(), tokens))
        # Every launch brings one chunk for each request; the first are the prefills'.
        begin, begin_tokens = next(arrival for arrival in arrivals[batch - 1 :: batch] if arrival[1] > batch)
        end, end_tokens = arrivals[-1]
        if tokens != count * batch or end_tokens - begin_tokens < batch * cpu_peers.DECODE_TOKENS:
            raise SystemExit("the engine has made its tokens in other portions than this benchmark can time.")
        return (end_tokens - begin_tokens) / (end - begin)


def export(path: str, directory: str) -> None:
    """Writes a file's weights, dequantized to bfloat16, as a HF directory. Runs in a process of its own."""
    import ml_dtypes

    from fusedllm.weights import open as opening
    from fusedllm.weights import safetensors
    from fusedllm.weights.convert import cast

    safetensors.write(cast(opening.open_checkpoint(Path(path)), np.dtype(ml_dtypes.bfloat16)), Path(directory))


def command(side: str, arguments: argparse.Namespace, *values: str) -> list[str]:
    """What starts a worker; `values` are the first arguments of its class."""
    bits = ["--activation-bits", str(arguments.activation_bits)] if arguments.activation_bits else []
    return [sys.executable, __file__, "--threads", str(arguments.threads), *bits, "--worker", side, *values]


def work(arguments: argparse.Namespace) -> None:
    """A worker's life."""
    (side, *values), threads = arguments.worker, arguments.threads
    if side == "export":
        return export(values[0], values[1])
    if side == "ours":
        return serve(lambda: Ours(values[0], threads, arguments.activation_bits))
    if side == "transformers":
        return serve(lambda: cpu_peers.Transformers(values[0], threads, values[1]))
    flash = {"on": True, "off": False}.get(values[2])
    return serve(lambda: cpu_peers.LlamaCpp(values[0], values[1], threads, MAX_CONTEXT, flash))


def choose_llama(path: Path, arguments: argparse.Namespace) -> tuple[str, dict[str, Any] | None]:
    """The fastest of llama.cpp's builds and settings of flash attention: its library, and what a result says of it."""
    candidates = []
    for library in arguments.llama or cpu_peers.libraries():
        for flash in ("off", "on") if arguments.flash == "fastest" else (arguments.flash,):
            worker = Worker(command("llama.cpp", arguments, library, str(path), flash))
            about = {"package": cpu_peers.package(library), "system": worker.ask("system").strip(" |")}
            name = f"llama.cpp of {about['package']}, flash attention {flash}"
            candidates.append((_trial(worker, name), library, {**about, "flash": flash}))
    if not candidates:
        return "", None
    _, library, chosen = min(candidates, key=lambda one: one[0])
    return library, {**chosen, "candidates": [{**about, "seconds": took} for took, _, about in candidates]}


def choose_dtype(exported: str, arguments: argparse.Namespace) -> str:
    """The fastest of transformers' dtypes: without instructions for bfloat16, float32 is."""
    took = {}
    for dtype in ("bfloat16", "float32") if arguments.torch_dtype == "fastest" else (arguments.torch_dtype,):
        took[dtype] = _trial(Worker(command("transformers", arguments, exported, dtype)), f"transformers in {dtype}")
    return min(took, key=lambda dtype: took[dtype])


def _trial(worker: Worker, name: str) -> float:
    """Ends the worker after the least seconds that it took for a prompt of 512 tokens and 64 tokens after it."""
    worker.ask("decode", WAKE_TOKENS)
    pairs = [(worker.ask("prefill", 512), worker.ask("decode", 512)) for _ in range(TRIALS)]
    worker.close()
    took = min(512 / prefill + cpu_peers.DECODE_TOKENS / decode for prefill, decode in pairs)
    print(f"{name}: {took:.2f} s", file=sys.stderr)
    return took


def measure(
    workers: dict[str, Worker], rows: list[Row], weight_bytes: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Every row once per repetition and side, the sides taking turns at being first; limits in each repetition."""
    model, bandwidth = workers["ours"].ask("sizes"), ReadBandwidth(arguments.threads)
    resident = {side: worker.ask("memory") for side, worker in workers.items()}
    speeds: dict[Row, dict[str, list[float]]] = {
        row: {side: [] for side in workers if row.runs_on(side)} for row in rows
    }
    reads, products = [], []
    for repetition in range(-1, arguments.repetitions):  # The first compiles and warms up, and is dropped.
        reads.append(bandwidth.sample())
        products.append(workers["ours"].ask("matmul"))
        for row, sides in speeds.items():
            turn = repetition % len(sides)
            for side in [*list(sides)[turn:], *list(sides)[:turn]]:
                time.sleep(SETTLE_SECONDS)
                workers[side].ask("prefill", WAKE_TOKENS)
                sides[side].append(workers[side].ask(*row.call))
            latest = ", ".join(f"{side} {samples[-1]:.1f}" for side, samples in sides.items())
            print(f"{repetition + 1} of {arguments.repetitions}: {row.name}: {latest}", file=sys.stderr)
    kv_bytes = {"ours": model["kv_bytes"]}
    kv_bytes["llama.cpp"] = 2 * LLAMA_KV_BYTES * model["num_layers"] * model["num_kv_heads"] * model["head_dim"]
    entries = []
    for row, sides in speeds.items():
        kept = {side: np.asarray(samples[1:]) for side, samples in sides.items()}
        entry: dict[str, Any] = {"name": row.name, "kind": row.kind, "tokens": row.tokens, "batch": row.batch}
        entry["speeds"] = {side: Spread.of(list(samples)) for side, samples in kept.items()}
        entry["ratios"] = {s: Spread.of(list(kept["ours"] / samples)) for s, samples in kept.items() if s != "ours"}
        greedy = speeds.get(Row("decode", row.tokens)) if row.kind == "sampled" else None
        if greedy:
            entry["ratios"]["greedy"] = Spread.of(list(kept["ours"] / greedy["ours"][1:]))
        entry["achieved"], entry["share"] = {}, {}
        for side in [side for side in kept if side in kv_bytes]:
            if row.kind == "prefill":
                each = prefill_operations(model, row.tokens) / row.tokens
            else:
                context = row.tokens + cpu_peers.DECODE_TOKENS // 2
                each = (weight_bytes + row.batch * context * kv_bytes[side]) / row.batch
                entry["share"][side] = Spread.of(list(each * kept[side] / reads[1:]))
            entry["achieved"][side] = Spread.of(list(each * kept[side]))
        entries.append(entry)
    limits = {"read_bandwidth": Spread.of(reads[1:]), "float32_product": Spread.of(products[1:])}
    return {
        **limits,
        "rows": entries,
        "memory": resident,
        "kv_bytes": kv_bytes,
        "activation_bits": model["activation_bits"],
    }


def run(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One model: chooses the peers, starts the sides, and measures."""
    path = cpu_models.path_of(name)
    weight_bytes = cpu_models.weight_bytes(path)
    library, llama = choose_llama(path, arguments)
    commands = {"ours": command("ours", arguments, str(path))}
    if llama:
        commands["llama.cpp"] = command("llama.cpp", arguments, library, str(path), llama["flash"])
    dtype = None
    with tempfile.TemporaryDirectory() as exported:
        asked = name == "smollm2" if arguments.transformers is None else arguments.transformers
        if asked and _has_transformers():
            subprocess.run(command("export", arguments, str(path), exported), check=True)
            dtype = choose_dtype(exported, arguments)
            commands["transformers"] = command("transformers", arguments, exported, dtype)
        workers = {side: Worker(one) for side, one in commands.items()}
        try:
            prompt = workers["ours"].ask("start_prompt", PROMPT)
            rows = [row for row in ROWS if not arguments.rows or row.name in arguments.rows]
            rows = [row for row in rows if row.kind != "sampled" or name == "smollm2" or arguments.rows]
            result = measure(workers, rows, weight_bytes, arguments)
        finally:
            for worker in workers.values():
                worker.close()
    starts = first_tokens(path, prompt, library, arguments.threads, arguments.starts)
    nbytes = {"file_bytes": path.stat().st_size, "weight_bytes": weight_bytes}
    return {
        "title": cpu_models.MODELS[name].title,
        **nbytes,
        "llama": llama,
        "torch_dtype": dtype,
        **result,
        "starts": starts,
    }


def _has_transformers() -> bool:
    return all(map(importlib.util.find_spec, ("torch", "transformers")))


def plot(path: Path, results: dict[str, Any]) -> None:
    """Bars for each model, prefill and decode apart, since they differ tenfold."""
    charts = {}
    for result in results.values():
        for what, kinds in (("prefill", ("prefill",)), ("decode", ("decode", "batch"))):
            rows = [row for row in result["rows"] if row["kind"] in kinds]
            labels = [row["name"].replace("decode", "context").replace("-", " ") for row in rows]
            sides = [side for side in NAMES if any(side in row["speeds"] for row in rows)]
            series = {NAMES[side]: [row["speeds"].get(side) for row in rows] for side in sides}
            if rows:
                charts[f"{result['title']}: {what}"] = (labels, series)
    panels(path, charts)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [row.name for row in ROWS]
    parser.add_argument("--models", nargs="+", choices=list(cpu_models.MODELS), default=list(cpu_models.MODELS))
    parser.add_argument("--rows", nargs="+", choices=names, metavar="ROW", help=f"only these of: {', '.join(names)}")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--starts", type=int, default=3, help="processes started for the time to the first token")
    parser.add_argument("--threads", type=int, default=2, help="cores for each side (default: %(default)s)")
    parser.add_argument("--activation-bits", type=int, choices=[8, 16], help="of fusedllm (default: its own choice)")
    parser.add_argument("--llama", action="append", metavar="LIBRARY", help="libllama.so to try; repeatable")
    parser.add_argument("--flash", choices=["fastest", "on", "off"], default="fastest", help="llama.cpp's attention")
    parser.add_argument("--torch-dtype", choices=["fastest", "bfloat16", "float32"], default="fastest")
    parser.add_argument("--transformers", action=argparse.BooleanOptionalAction, help="default: beside SmolLM2 only")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a bar chart, PNG or SVG (needs matplotlib)")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work(arguments)
    warn_if_busy()
    if hasattr(os, "sched_setaffinity"):  # Inherited by the workers; they size their thread pools by it.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    if not (arguments.llama or cpu_peers.libraries()):
        print("neither llama-cpp-python nor xllamacpp is installed (extra `bench`): no llama.cpp.", file=sys.stderr)
    if not _has_transformers():
        print("torch and transformers are not installed (extra `bench`): no transformers.", file=sys.stderr)
    where = environment("fusedllm", "jax", "jaxlib", "numpy", "torch", "transformers")
    results = {}
    for name in arguments.models:
        results[name] = run(name, arguments)
        print(report(results[name], arguments.threads, arguments.repetitions), flush=True)
        if arguments.json:  # After each model: another hour may not come to its end.
            write_json(arguments.json, {**where, "threads": arguments.threads, "models": results})
    if arguments.plot:
        plot(arguments.plot, results)
    return None


if __name__ == "__main__":
    main()
