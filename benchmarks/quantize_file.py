"""A whole checkpoint from file to file: how long it takes, and how much memory beyond that of the program itself.

    python benchmarks/quantize_file.py [--model llama-1b] [--scheme int4-g64] [--json FILE] [--directory DIR]

The checkpoint has the model's true shape and seeded random weights in bfloat16 (2.5 GB for llama-1b). A process of its
own quantizes something small first, which loads everything that the program is made of; memory is counted from there:
the peak of what is resident, mapped pages of the files included, as the system keeps the highest figure.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import ReadBandwidth, Worker, environment, memory, serve, significant, table, write_json

from fusedllm.weights.convert import convert
from fusedllm.weights.random import random_checkpoint
from fusedllm.weights.registry import architecture

# What the project promises.
MOST_BYTES = 1e9


class Quantizer:
    """The process that is measured."""

    def __init__(self) -> None:
        import fusedllm

        fusedllm.quantize({"warm": np.ones((64, 64), np.float32)}, "int4-g64")

    def run(self, source: str, target: str, scheme: str) -> dict[str, float]:
        """Quantizes, and returns seconds and bytes."""
        import fusedllm
        from fusedllm.quantizing import quantize_file

        base = memory()["resident"]
        Path("/proc/self/clear_refs").write_text("5")
        report = fusedllm.QuantizeReport()
        started = time.perf_counter()
        quantize_file(source, target, scheme, report=report)
        seconds = time.perf_counter() - started
        return {
            "seconds": seconds,
            "base": base,
            "extra": memory()["peak"] - base,
            "bytes_in": report.bytes_in,
            "bytes_out": report.bytes_out,
            "bytes_copied": report.bytes_copied,
            "bits_per_weight": report.bits_per_weight,
        }


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-1b", help="a name of `fusedllm models`, for its shape")
    parser.add_argument("--scheme", action="append", help="may be given again (default int4-g64 and int8)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--directory", type=Path, help="where the files go for the time being")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        serve(Quantizer)
        return 0
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="fusedllm-quantize-", dir=options.directory) as directory:
        source = Path(directory, "model.arrow")
        convert(random_checkpoint(architecture(options.model), "bfloat16"), source, progress=True)
        for scheme in options.scheme or ["int4-g64", "int8"]:
            worker = Worker([sys.executable, __file__, "--worker"])
            target = Path(directory, "quantized.arrow")
            found[scheme] = worker.ask("run", str(source), str(target), scheme)
            worker.close()
            target.unlink()
    bandwidth = ReadBandwidth().sample()
    rows = [
        [
            scheme,
            significant(one["seconds"]),
            significant(one["bytes_in"] / one["seconds"] / 1e9),
            f"{one['bytes_in'] / 1e6:,.0f}",
            f"{one['bytes_out'] / 1e6:,.0f}",
            f"{one['base'] / 1e6:,.0f}",
            f"{one['extra'] / 1e6:,.0f}",
        ]
        for scheme, one in found.items()
    ]
    columns = [options.model, "seconds", "GB/s", "MB in", "MB out", "program, MB", "peak above it, MB"]
    print(table(columns, rows))
    print(f"\nread bandwidth {bandwidth / 1e9:.1f} GB/s; the file is written and flushed to the disk in that time")
    if options.json:
        where = environment("fusedllm", "jax", "pyarrow", "numpy")
        write_json(options.json, {**where, "model": options.model, "read_bandwidth": bandwidth, "schemes": found})
    return 0 if all(one["extra"] < MOST_BYTES for one in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
