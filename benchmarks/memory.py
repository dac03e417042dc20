"""The peak memory of `fusedllm generate`, beside the bytes of the model's weights.

    python benchmarks/memory.py
    python benchmarks/memory.py --ckpt smollm2-135m --json benchmarks/results/memory-smollm2.json

Random weights of the named architecture unless `--trained`. POSIX only: the peak is the system's own count.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from pathlib import Path

from common import environment, seconds, table, write_json

from fusedllm.weights import registry

# Linux counts in KiB, macOS in bytes.
PEAK_UNIT = 1 if sys.platform == "darwin" else 1024


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", default="llama-1b", help="whose architecture (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--max-tokens", type=int, default=8)
    parser.add_argument("--trained", action="store_true", help="the trained weights instead of random ones")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "fusedllm", "generate", "--ckpt", arguments.ckpt, "--dtype", arguments.dtype]
    command += ["--max-tokens", str(arguments.max_tokens), *["--random-weights"] * (not arguments.trained)]
    took = seconds(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))
    # The largest of all children that have ended, and this program has no other.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * PEAK_UNIT
    itemsize = 4 if arguments.dtype == "float32" else 2
    weights = registry.architecture(arguments.ckpt).num_parameters * itemsize
    columns = ["model", "weights", "peak memory", "ratio", "whole command"]
    row = [arguments.ckpt, f"{weights / 1e9:.2f} GB", f"{peak / 1e9:.2f} GB", f"{peak / weights:.2f}", f"{took:.1f} s"]
    print(" ".join(command[1:]) + "\n")
    print(table(columns, [row]))
    if arguments.json:
        measured = {"weights_bytes": weights, "peak_bytes": peak, "seconds": took, "command": command[1:]}
        write_json(arguments.json, {**environment("fusedllm", "jax", "jaxlib", "numpy"), **measured})


if __name__ == "__main__":
    main()
