"""What speed on a CPU costs in quality: perplexity, and KL divergence of the next token from the float32 path.

    python benchmarks/cpu_quality.py
    python benchmarks/cpu_quality.py --windows 2 --json benchmarks/results/cpu-quality.json

SmolLM2-135M on the text of the tests: eight windows of 512 tokens, each scored on its own, its first token unscored.
The reference is `dtype="float32"`, XLA's products with dequantized weights; beside activations of 16 and of 8
bits stands llama.cpp, on the same file. Each side is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import cpu_models
import cpu_peers
import numpy as np
from common import Worker, environment, serve, table, write_json

STORED = Path(__file__).parents[1] / "tests" / "data" / "smollm2.json"
NAMES = {
    "reference": "fusedllm, float32",
    "ours": "fusedllm, activations of 16 bits (default)",
    "ours-8": "fusedllm, activations of 8 bits",
    "llama.cpp": "llama.cpp",
}


class Ours:
    """fusedllm in `dtype`, with activations of so many bits."""

    def __init__(self, path: str, dtype: str, bits: int, threads: int) -> None:
        import fusedllm

        self._llm = fusedllm.load(path, dtype=dtype, max_context=1024, activation_bits=bits, threads=threads)

    def save_logits(self, ids: list[int], path: str) -> None:
        """Writes the logits after each token of `ids`, float32 `[seq, vocab]`, as a NumPy file."""
        np.save(path, self._llm.logits(ids))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Logarithms of probabilities along the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


class Quality:
    """Perplexity of one side; its mean KL divergence from the reference, and how often both would say the same."""

    def __init__(self) -> None:
        self._likelihoods: list[np.ndarray] = []
        self._losses: list[np.ndarray] = []
        self._divergences: list[np.ndarray] = []
        self._agreements: list[np.ndarray] = []

    def add(self, ids: list[int], reference: np.ndarray, found: np.ndarray) -> None:
        """Takes a window's tokens, and both sides' log-probabilities after each but the last, `[seq - 1, vocab]`."""
        here = np.arange(len(ids) - 1), ids[1:]
        self._likelihoods.append(found[here])
        self._losses.append(reference[here] - found[here])
        self._divergences.append((np.exp(reference) * (reference - found)).sum(-1))
        self._agreements.append(reference.argmax(-1) == found.argmax(-1))

    def result(self) -> dict[str, float]:
        """The figures. `loss_error` is the standard error of the logarithm of the perplexity less the reference's."""
        losses, divergences = np.concatenate(self._losses), np.concatenate(self._divergences)
        return {
            "perplexity": float(np.exp(-np.concatenate(self._likelihoods).mean())),
            "loss_error": float(losses.std() / np.sqrt(losses.size)),
            "kl_divergence": float(divergences.mean()),
            "kl_divergence_99": float(np.quantile(divergences, 0.99)),
            "same_top_token": float(np.concatenate(self._agreements).mean()),
        }


def measure(workers: dict[str, Worker], ids: list[int], window: int) -> dict[str, dict[str, float]]:
    """The figures of each side."""
    qualities = {side: Quality() for side in workers}
    with tempfile.TemporaryDirectory() as directory:
        for start in range(0, len(ids), window):
            part = ids[start : start + window]
            reference = np.empty(0)
            for side, worker in workers.items():
                path = str(Path(directory, "logits.npy"))
                worker.ask("save_logits", part, path)
                # The last token's successor is not in the window.
                found = log_softmax(np.load(path)[:-1])
                reference = found if side == "reference" else reference
                qualities[side].add(part, reference, found)
            print(f"window {start // window + 1} of {-(-len(ids) // window)}", file=sys.stderr)
    return {side: quality.result() for side, quality in qualities.items()}


def report(result: dict[str, dict[str, float]]) -> str:
    """The table; all but the perplexity compare with the first line."""
    columns = [
        "",
        "perplexity",
        "to the reference",
        "mean KL divergence",
        "its 99th percentile",
        "same likeliest token",
    ]
    reference = result["reference"]["perplexity"]
    lines = [
        [
            NAMES[side],
            f"{one['perplexity']:.3f}",
            f"{100 * (one['perplexity'] / reference - 1):+.2f} %",
            f"{one['kl_divergence']:.2g}",
            f"{one['kl_divergence_99']:.2g}",
            f"{100 * one['same_top_token']:.2f} %",
        ]
        for side, one in result.items()
    ]
    return table(columns, lines) + "\n\nKL(float32 || the side) in nats."


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=8, help="of 512 tokens (default and most: %(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llama", metavar="LIBRARY", help="another libllama.so than the installed one")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        kind, path, *values = arguments.worker
        if kind == "llama.cpp":
            return serve(lambda: cpu_peers.LlamaCpp(values[0], path, arguments.threads, context=1024))
        return serve(lambda: Ours(path, values[0], int(values[1]), arguments.threads))
    path = str(cpu_models.path_of("smollm2"))
    sides: dict[str, tuple[str, ...]] = {
        "reference": ("ours", path, "float32", "16"),
        "ours": ("ours", path, "auto", "16"),
        "ours-8": ("ours", path, "auto", "8"),
    }
    if library := arguments.llama or next(iter(cpu_peers.libraries()), None):
        sides["llama.cpp"] = ("llama.cpp", path, library)
    else:
        print("neither llama-cpp-python nor xllamacpp is installed (extra `bench`): no peer.", file=sys.stderr)
    itself = [sys.executable, __file__, "--threads", str(arguments.threads), "--worker"]
    workers = {side: Worker([*itself, *values]) for side, values in sides.items()}
    stored = json.loads(STORED.read_text(encoding="utf-8"))["perplexity"]
    window = stored["window"]
    try:
        result = measure(workers, stored["ids"][: arguments.windows * window], window)
    finally:
        for worker in workers.values():
            worker.close()
    print(report(result))
    if arguments.json:
        about: dict[str, Any] = {"windows": arguments.windows, "window": window}
        about["llama"] = cpu_peers.package(library) if library else None
        where = environment("fusedllm", "jax", "jaxlib", "numpy")
        write_json(arguments.json, {**where, **about, "sides": result})
    return None


if __name__ == "__main__":
    main()
