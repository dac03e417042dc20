"""What the benchmarks share: the machine's limits, medians with their spread, the table, JSON and pictures.

A time is only comparable inside one run on one machine, so that every program here measures the limit that it divides
by in the same run as the figure itself.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

# Far beyond any cache of today's CPUs, so that a pass over it reads memory.
READ_BYTES = 768 * 2**20


@dataclass(frozen=True)
class Spread:
    """The median of some samples, the distance between their quartiles, and how many they are."""

    median: float
    iqr: float
    samples: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Of at least one sample; a single one has no spread."""
        low, _, high = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else (0.0, 0.0, 0.0)
        return cls(statistics.median(samples), high - low, len(samples))

    def __str__(self) -> str:
        return f"{significant(self.median)} ± {significant(self.iqr / 2)}"


def significant(value: float, digits: int = 3) -> str:
    """`value` with as many digits as a benchmark can vouch for, and never in powers of ten."""
    if value == 0 or not np.isfinite(value):
        return f"{value:g}"
    return f"{value:,.{max(0, digits - 1 - int(np.floor(np.log10(abs(value)))))}f}"


class ReadBandwidth:
    """How fast `threads` threads of this machine read memory, in bytes a second. Keeps one buffer for all samples."""

    def __init__(self, threads: int = 2) -> None:
        self._parts = np.array_split(np.ones(READ_BYTES // 8, np.int64), threads)
        self._pool = ThreadPoolExecutor(threads)

    def sample(self) -> float:
        """The fastest of four passes over the buffer, so that a page gone cold or a stolen core does not set a limit.

        NumPy releases the interpreter lock in a reduction, and an `or` costs nothing beside reading.
        """
        return READ_BYTES / min(seconds(self._read) for _ in range(4))

    def _read(self) -> None:
        list(self._pool.map(np.bitwise_or.reduce, self._parts))


def seconds(function: Callable[[], Any]) -> float:
    """How long one call takes; the function waits for its own result."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def sizes(config: Any) -> dict[str, Any]:
    """A `ModelConfig` as the two functions below read it, in a form that passes through JSON."""
    return {**config.to_dict(), "num_parameters": config.num_parameters}


def prefill_operations(model: dict[str, Any], tokens: int) -> float:
    """Floating-point operations that a prompt needs: its products, causal attention, and the head for one token."""
    row = model["vocab_size"] * model["hidden_size"]
    layers = model["num_parameters"] - row * (1 if model["tie_embeddings"] else 2)
    attention = 2 * model["num_layers"] * model["num_heads"] * model["head_dim"] * tokens**2
    return 2 * layers * tokens + attention + 2 * row


def decode_bytes(model: dict[str, Any], context: int, itemsize: int, batch: int = 1) -> float:
    """Bytes that one decode step reads: every weight once (an untied embedding not), and each slot's KV cache."""
    embedding = 0 if model["tie_embeddings"] else model["vocab_size"] * model["hidden_size"]
    position = 2 * model["num_layers"] * model["num_kv_heads"] * model["head_dim"]
    return itemsize * (model["num_parameters"] - embedding + batch * position * context)


def serve(make: Callable[[], Any]) -> None:
    """The worker's end of `Worker`: makes its object and calls the methods that are asked for until its input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What libraries print goes to stderr, not between the replies.
    worker = make()
    for line in sys.stdin:
        method, *values = json.loads(line)
        print(json.dumps(getattr(worker, method)(*values)), file=replies, flush=True)


class Worker:
    """A process that waits for commands, one JSON line each way, so that two libraries never share a process."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, method: str, *values: Any) -> Any:
        """What the worker's method returns. A worker that has ended ends this program too."""
        assert self._process.stdin
        assert self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps([method, *values]) + "\n")
            self._process.stdin.flush()
        reply = self._process.stdout.readline()
        if not reply:
            raise SystemExit("a worker ended early; its message is above.")
        return json.loads(reply)

    def close(self) -> None:
        """Lets the worker end, and waits for it."""
        assert self._process.stdin
        assert self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as a Markdown table; the first column is aligned to the left, the others to the right."""
    cells = [list(columns), *[list(row) for row in rows]]
    widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]

    def line(row: Sequence[str]) -> str:
        return "| " + " | ".join(_align(text, widths[index], index) for index, text in enumerate(row)) + " |"

    rule = "|" + "|".join("-" * (width + 1) + (":" if index else "-") for index, width in enumerate(widths)) + "|"
    return "\n".join([line(cells[0]), rule, *[line(row) for row in cells[1:]]])


def _align(text: str, width: int, index: int) -> str:
    return text.rjust(width) if index else text.ljust(width)


def environment(*packages: str) -> dict[str, Any]:
    """Where and when a figure was measured: date, machine, and the versions of those of `packages` that are there."""
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "system": platform.platform()},
        "versions": {"python": platform.python_version(), **versions},
    }


def warn_if_busy() -> None:
    """Says so when other programs use this machine. Thread pools that spin, as torch's do, lose most from it."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.5:
        print(f"warning: the load average is {load:.1f}; figures of a busy machine mean little.", file=sys.stderr)


def memory() -> dict[str, int]:
    """This process's resident memory in bytes: all of it, its own part, what is files, and the peak (Linux only)."""
    fields = {"resident": "VmRSS", "own": "RssAnon", "files": "RssFile", "peak": "VmHWM"}
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {name: 1024 * int(status[field].split()[0]) for name, field in fields.items()}


def cpu_name() -> str:
    """The processor's own name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def write_json(path: Path, result: dict[str, Any], quiet: bool = False) -> None:
    """Writes `result` as `plain_json` makes it, and says so unless `quiet`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(plain_json(result), encoding="utf-8")
    if not quiet:
        print(f"wrote {path}")


def plain_json(result: dict[str, Any]) -> str:
    """`result` as JSON; a `Spread` becomes an object of its three numbers."""
    return json.dumps(result, indent=2, default=_plain) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, Spread):
        return asdict(value)
    raise TypeError(f"{type(value).__name__} does not go into JSON")


def bar_chart(path: Path, title: str, labels: Sequence[str], series: dict[str, Sequence[Spread]]) -> None:
    """Groups of bars, one per label, one bar per series, with the spread on it. Needs matplotlib (extra `bench`)."""
    panels(path, {title: (labels, series)}, columns=1)


def panels(
    path: Path,
    charts: dict[str, tuple[Sequence[str], dict[str, Sequence[Spread | None]]]],
    columns: int = 2,
    units: Sequence[str] | None = None,
) -> None:
    """Several charts in one picture: title to labels and series; a bar without a value is left out.

    `units` are one for each chart, tokens a second unless given.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = -(-len(charts) // columns)
    longest = max(len(labels) for labels, _ in charts.values())
    size = (columns * (1.4 * longest + 2), 4 * lines)
    figure, grid = pyplot.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    for axes in grid.flat[len(charts) :]:
        axes.remove()
    units = units or ["tokens/s"] * len(charts)
    for axes, unit, (title, (labels, series)) in zip(grid.flat, units, charts.items(), strict=False):
        width = 0.8 / len(series)
        for index, (name, values) in enumerate(series.items()):
            places = np.arange(len(labels)) + (index - (len(series) - 1) / 2) * width
            bars = [(at, value) for at, value in zip(places, values, strict=True) if value is not None]
            medians, errors = [v.median for _, v in bars], [v.iqr / 2 for _, v in bars]
            drawn = axes.bar([at for at, _ in bars], medians, width, yerr=errors, label=name, color=f"C{index}")
            axes.bar_label(drawn, labels=[significant(median) for median in medians], fontsize=8, padding=2)
        axes.set_xticks(range(len(labels)), labels)
        axes.set_title(title)
        axes.set_ylabel(unit)
        axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    print(f"wrote {path}")
