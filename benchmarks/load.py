"""Loading a model of LLaMA-3.2-1B's shape (bfloat16, random weights) from an Arrow file that is in the page cache.

Beside it, in the same rounds: the same weights through the `safetensors` library and our own reader of its format, and
what two threads can read from this machine's memory. An Arrow load maps the file and copies nothing, so its time does
not contain reading the weights; the line "and read once" adds a pass of two threads over every loaded byte.

    python benchmarks/load.py [--model llama-1b] [--rounds 5] [--json FILE] [--directory DIR]
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from common import ReadBandwidth, Spread, environment, seconds, significant, table, write_json

from fusedllm.weights.convert import convert
from fusedllm.weights.load import LoadReport, load_params
from fusedllm.weights.open import open_checkpoint
from fusedllm.weights.random import random_checkpoint
from fusedllm.weights.registry import architecture

THREADS = 2
# What the project promises of this load.
MOST_SECONDS = 1.0
ARROW, ARROW_READ = "Arrow", "Arrow, and read once"
OURS, PEER = "safetensors, our reader", "safetensors, its own library"


def read_all(arrays: list[np.ndarray]) -> None:
    """Reads every byte once, on `THREADS` threads; a few bytes at the end of a piece are left out."""
    pieces = [piece for array in arrays for piece in np.array_split(array.reshape(-1).view(np.uint8), THREADS)]
    words = [piece[: piece.size // 8 * 8].view(np.uint64) for piece in pieces if piece.size >= 8]
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(np.bitwise_or.reduce, words))


def host_arrays(tree: Any) -> list[np.ndarray]:
    """The arrays of a pytree as NumPy arrays; views on the CPU."""
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def load_ours(path: Path) -> tuple[Any, LoadReport]:
    params, report = load_params(open_checkpoint(path))
    return jax.block_until_ready(params), report


def load_peer(path: Path) -> None:
    """Every tensor as a JAX array through the library's JAX face, since its NumPy face has no bfloat16."""
    from safetensors.flax import load_file

    jax.block_until_ready(load_file(path / "model.safetensors"))


def measure(directory: Path, model: str, rounds: int) -> dict[str, Any]:
    writing = seconds(lambda: convert(random_checkpoint(architecture(model), "bfloat16"), directory / "model.arrow"))
    convert(directory / "model.arrow", directory / "model.safetensors")
    copied: dict[str, int] = {}
    sizes: dict[str, int] = {}

    def ours(what: str, name: str) -> None:
        _, report = load_ours(directory / name)
        copied[what], sizes[what] = report.bytes_copied, report.bytes

    def ours_and_read() -> None:
        params, report = load_ours(directory / "model.arrow")
        read_all(host_arrays(params))
        copied[ARROW_READ] = report.bytes_copied

    steps: dict[str, Callable[[], Any]] = {
        ARROW: lambda: ours(ARROW, "model.arrow"),
        ARROW_READ: ours_and_read,
        OURS: lambda: ours(OURS, "model.safetensors"),
    }
    if importlib.util.find_spec("safetensors"):
        steps[PEER] = lambda: load_peer(directory / "model.safetensors")
    bandwidth, read = ReadBandwidth(THREADS), []
    times: dict[str, list[float]] = {what: [] for what in steps}
    # The steps take turns, so that a slow moment meets all of them; the first round fills the page cache.
    for turn in range(rounds + 1):
        for what, step in steps.items():
            took = seconds(step)
            if turn:
                times[what].append(took)
        read.append(bandwidth.sample())
    total = sizes[ARROW]
    limit = Spread.of([total / sample for sample in read])
    rows = {what: {"seconds": Spread.of(samples), "bytes_copied": copied.get(what)} for what, samples in times.items()}
    rows[f"limit: {THREADS} threads read as many bytes"] = {"seconds": limit, "bytes_copied": None}
    return {
        "model": model,
        "dtype": "bfloat16",
        "rounds": rounds,
        "device": str(jax.devices()[0]),
        "bytes": total,
        "read_bandwidth": Spread.of(read),
        "write_seconds": writing,
        "rows": rows,
        **environment("jax", "pyarrow", "safetensors", "numpy"),
    }


def show(figures: dict[str, Any]) -> None:
    total = figures["bytes"]
    limit = figures["read_bandwidth"].median
    lines = []
    for what, row in figures["rows"].items():
        speed = total / row["seconds"].median
        copied = "-" if row["bytes_copied"] is None else f"{row['bytes_copied']:,}"
        lines.append(
            [what, str(row["seconds"]), f"{total:,}", copied, significant(speed / 1e9), f"{speed / limit:.2f}"]
        )
    print(f"{figures['model']}, bfloat16, warm page cache, {figures['rounds']} rounds, on {figures['device']}\n")
    print(table(["load", "seconds", "bytes", "bytes copied", "effective GB/s", "of the limit"], lines))
    print(f"\nThe Arrow file was written in {figures['write_seconds']:.1f} s.")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-1b", help="a name of `fusedllm models`, for its shape")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    parser.add_argument("--directory", type=Path, help="where the files (twice the weights) go for the time being")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fusedllm-load-", dir=options.directory) as directory:
        figures = measure(Path(directory), options.model, options.rounds)
    show(figures)
    if options.json:
        write_json(options.json, figures)
    arrow = figures["rows"][ARROW]
    if jax.devices()[0].platform == "cpu" and (arrow["bytes_copied"] or arrow["seconds"].median > MOST_SECONDS):
        print(f"an Arrow load must copy 0 bytes and take less than {MOST_SECONDS} s.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
