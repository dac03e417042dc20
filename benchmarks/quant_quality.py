"""What each scheme and method costs in quality, beside llama.cpp's types, on a model that none of them is made for.

    python benchmarks/quant_quality.py --json benchmarks/results/quant-quality.json
    python benchmarks/quant_quality.py --only 'clip.gptq|Q4_K_M' --windows 4

The model is the wide twin of SmolLM2-135M (`fusedllm.calibrate.widen.wide_twin`): the same function, with weights off
the 4-bit grid on which the original's lie, and rows of whole blocks of 256 for llama.cpp's K-quants. Perplexity, the KL
divergence from the float32 model and how often the likeliest token is the same are of eight windows of 512 tokens; bits
per weight are of all tensors. Importance matrices and calibration have the same tokens, which are none of those eight
windows. All weights, llama.cpp's too, run in our engine with activations of 16 bits, so that weights alone are
compared; two lines show llama.cpp's own engine, whose activations have 8 bits.

Finished lines are kept in the JSON file, and a run that is started again goes on with the others.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cpu_peers
import numpy as np
import quant_peers
from common import environment, table, warn_if_busy, write_json
from judge import Judge

import fusedllm
from fusedllm.calibrate.run import Run
from fusedllm.calibrate.text import calibration_tokens
from fusedllm.calibrate.widen import wide_twin
from fusedllm.quant.methods import method_named
from fusedllm.weights.checkpoint import Checkpoint
from fusedllm.weights.convert import convert
from fusedllm.weights.load import wanted_tensors
from fusedllm.weights.open import open_checkpoint
from fusedllm.weights.registry import resolve

# Windows of 512 tokens that activations are measured on.
CALIBRATION_WINDOWS = 16
THREADS = 2
CONTEXT = 1024


@dataclass(frozen=True)
class Ours:
    """A line of ours; with `bits` a scheme for each tensor is chosen so that all together have no more of them.

    A grid that needs no calibration has one if it is `weighted`.
    """

    scheme: str
    method: str = "rtn"
    bits: str | None = None
    weighted: bool = False

    @property
    def name(self) -> str:
        """What the table calls it."""
        suffix = ", weighted by calibration" if self.weighted else ""
        return f"{self.scheme if self.bits is None else f'{self.bits} bits'} {self.method}{suffix}"


@dataclass(frozen=True)
class Llama:
    """A line of llama.cpp's quantizer, with an importance matrix or without; `runs` it in llama.cpp as well."""

    kind: str
    importance: bool
    runs: bool = False

    @property
    def name(self) -> str:
        """What the table calls it."""
        suffix = " imatrix" if self.importance else ""
        return f"llama.cpp {self.kind}{suffix}" + (", its own engine" if self.runs else "")


LINES: tuple[Ours | Llama, ...] = (
    Ours("int8"),
    Ours("int4-g64"),
    Llama("Q8_0", False),
    Llama("Q4_K_M", False),
    Llama("Q4_K_M", True),
    Ours("int4-g64", "gptq"),
    Ours("int4-g64", "hqq+gptq", bits="Q4_K_M's"),
    Ours("int4-g64", "hqq"),
    Ours("int4-g64", "clip"),
    *(Ours(scheme) for scheme in ("int8-g128", "int8-g32", "w8a8", "fp8", "int4-g32", "int4-g64-sym", "int3-g64")),
    *(Llama(kind, importance) for kind in ("Q6_K", "Q5_K_M", "Q4_0") for importance in (False, True)),
    Ours("int4-g64", "awq"),
    Ours("int4-g64", "clip+gptq"),
    Ours("int4-g64", "hqq+gptq"),
    Ours("int4-g64", "awq+hqq"),
    Ours("int4-g64", "hqq", weighted=True),
    Ours("int4-g64", "clip", weighted=True),
    Ours("int4-g32", "hqq+gptq"),
    Ours("int3-g64", "hqq+gptq"),
    Ours("int4-g128", "hqq+gptq"),
    Ours("int8", "clip"),
    Ours("int8", "gptq"),
    Llama("Q4_K_M", True, runs=True),
    Llama("Q8_0", False, runs=True),
)


def bits_per_weight(checkpoint: Checkpoint) -> float:
    """Stored bits over all weights of the tensors that the model needs."""
    tensors = [checkpoint.tensors[name] for name in wanted_tensors(checkpoint)]
    return 8 * sum(tensor.nbytes for tensor in tensors) / sum(int(np.prod(tensor.shape)) for tensor in tensors)


class Bench:
    """The twin, its statistics, and a line at a time."""

    def __init__(self, directory: Path, windows: int) -> None:
        self._directory = directory
        source = open_checkpoint(resolve("smollm2-135m", progress=True))
        convert(wide_twin(source), directory / "twin.arrow", progress=True)
        self.twin = open_checkpoint(directory / "twin.arrow")
        convert(self.twin, directory / "twin.gguf")
        self.tokens = calibration_tokens(None, self.twin.tokenizer, windows=CALIBRATION_WINDOWS)
        self.judge = Judge(self.twin, windows, directory, max_context=CONTEXT, threads=THREADS)
        self._importance: dict[str, np.ndarray] = {}

    def float_line(self) -> dict[str, float]:
        """The twin itself, in our engine as it usually runs."""
        return {"seconds": 0.0, "bits_per_weight": 32.0, **self._judge_model(self.twin)}

    def _judge_model(self, ckpt: Any) -> dict[str, float]:
        """Of a model in our engine, with activations of 16 bits."""
        llm = fusedllm.load(ckpt, max_context=CONTEXT, activation_bits=16, threads=THREADS)
        return self.judge.judge(llm.logits)

    def importance(self) -> dict[str, np.ndarray]:
        """`E[x^2]` of each matrix's input in the float model."""
        if not self._importance:
            run = Run(self.twin, self.tokens, lambda name, shape: None, method_named("rtn"), progress=True)
            self._importance = {name: np.asarray(found.mean_square) for name, found in run.statistics()}
        return self._importance

    def llama_file(self, line: Llama) -> tuple[Path, float]:
        """The twin in one of llama.cpp's types, and the seconds that it took."""
        path = self._directory / "peer.gguf"
        importance = self.importance() if line.importance else None
        started = time.perf_counter()
        quant_peers.quantize(self._directory / "twin.gguf", path, line.kind, importance, THREADS)
        return path, time.perf_counter() - started

    def run(self, line: Ours | Llama, done: dict[str, Any]) -> dict[str, float]:
        """Quantizes, and judges."""
        if isinstance(line, Llama):
            path, seconds = self.llama_file(line)
            made = open_checkpoint(path)
            if line.runs:
                peer = cpu_peers.LlamaCpp(cpu_peers.libraries()[0], str(path), THREADS, context=CONTEXT)
                logits = self._directory / "logits.npy"

                def run(ids: list[int]) -> np.ndarray:
                    peer.save_logits(ids, str(logits))
                    return np.load(logits)

                return {"seconds": seconds, "bits_per_weight": bits_per_weight(made), **self.judge.judge(run)}
            return {"seconds": seconds, "bits_per_weight": bits_per_weight(made), **self._judge_model(path)}
        calibrates = method_named(line.method).needs_calibration or line.weighted or line.bits is not None
        keywords: dict[str, Any] = {"calibration": self.tokens} if calibrates else {}
        if line.bits is not None:
            wanted = done.get("llama.cpp Q4_K_M imatrix")
            if wanted is None:
                wanted = done["llama.cpp Q4_K_M imatrix"] = self.run(Llama("Q4_K_M", True), done)
            keywords["target_bpw"] = wanted["bits_per_weight"]
        started = time.perf_counter()
        made_table = fusedllm.quantize(self.twin, line.scheme, method=line.method, progress=True, **keywords)
        seconds = time.perf_counter() - started
        bits = fusedllm.quantize_report(made_table).bits_per_weight
        return {"seconds": seconds, "bits_per_weight": bits, **self._judge_model(made_table)}


def report(lines: dict[str, dict[str, float]]) -> str:
    """The table, by bits per weight."""
    exact = lines["float32"]["perplexity"]
    rows = [
        [
            name,
            f"{line['bits_per_weight']:.2f}",
            f"{line['perplexity']:.3f}",
            f"{100 * (line['perplexity'] / exact - 1):+.2f} %",
            f"{line['kl_divergence']:.5f}",
            f"{line['kl_divergence_99']:.4f}",
            f"{100 * line['same_top_token']:.2f} %",
            "-" if line["seconds"] is None else f"{line['seconds']:.1f}",
        ]
        for name, line in sorted(
            lines.items(), key=lambda item: (-item[1]["bits_per_weight"], item[1]["kl_divergence"])
        )
    ]
    columns = ["", "bits per weight", "perplexity", "to float32", "mean KL", "its 99th percentile", "same token", "s"]
    return table(columns, rows) + "\n\nKL(float32 || the line) in nats; s: seconds to quantize."


def draw(path: Path, lines: dict[str, dict[str, float]]) -> None:
    """KL divergence over bits per weight; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for title, marker, chosen in (
        ("fusedllm", "o", lambda name: "llama" not in name),
        ("llama.cpp's types", "s", lambda name: "llama" in name and "engine" not in name),
    ):
        some = {name: line for name, line in lines.items() if chosen(name) and line["bits_per_weight"] < 16}
        bits = [line["bits_per_weight"] for line in some.values()]
        axes.scatter(bits, [line["kl_divergence"] for line in some.values()], marker=marker, label=title, s=24)
        for name, line in some.items():
            text = name.removeprefix("llama.cpp ")
            at = (line["bits_per_weight"], line["kl_divergence"])
            axes.annotate(text, at, fontsize=6, xytext=(4, 2), textcoords="offset points")
    axes.set_yscale("log")
    axes.set_xlabel("bits per weight, all tensors")
    axes.set_ylabel("KL divergence from float32 (nats)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path)
    print(f"wrote {path}")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=8, help="of 512 tokens (default and most: %(default)s)")
    parser.add_argument("--only", metavar="PATTERN", help="lines whose name this regular expression finds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keeps finished lines")
    parser.add_argument("--picture", type=Path, metavar="FILE")
    options = parser.parse_args()
    warn_if_busy()
    about = {"windows": options.windows, "calibration_windows": CALIBRATION_WINDOWS}
    lines: dict[str, dict[str, float]] = {}
    if options.json and options.json.exists():
        before = json.loads(options.json.read_text(encoding="utf-8"))
        if {name: before.get(name) for name in about} == about:
            lines = before["lines"]
    wanted = [line for line in LINES if not options.only or re.search(options.only, line.name)]

    def keep() -> None:
        if options.json:
            where = environment("fusedllm", "jax", "jaxlib", "numpy", "llama-cpp-python")
            write_json(options.json, {**where, **about, "lines": lines})

    if any(line.name not in lines for line in wanted):
        with tempfile.TemporaryDirectory(prefix="fusedllm-quality-") as directory:
            bench = Bench(Path(directory), options.windows)
            lines.setdefault("float32", bench.float_line())
            for line in wanted:
                if line.name not in lines:
                    lines[line.name] = bench.run(line, lines)
                    print(f"{line.name}: {lines[line.name]}", file=sys.stderr, flush=True)
                    keep()
                    gc.collect()
    print(report(lines))
    if options.picture:
        draw(options.picture, lines)


if __name__ == "__main__":
    main()
