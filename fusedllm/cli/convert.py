"""`fusedllm convert`: a checkpoint from one format to another."""

from __future__ import annotations

import argparse
from pathlib import Path

NAME = "convert"
HELP = "convert a checkpoint to arrow, gguf, orbax or safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    parser.add_argument("source", metavar="SRC", help="a name, a path or hf:OWNER/NAME")
    parser.add_argument("destination", metavar="DST", type=Path)
    formats = ["arrow", "gguf", "orbax", "safetensors"]
    parser.add_argument("--format", choices=formats, help="by default what DST's suffix says")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="by default the source's")
    parser.add_argument(
        "--rotate", type=int, metavar="SEED", help="the same model in a random basis; float32 by default"
    )
    parser.add_argument("--force", action="store_true", help="replace DST where it exists")


def run(options: argparse.Namespace) -> None:
    """Converts."""
    from fusedllm.calibrate.rotate import rotate
    from fusedllm.weights.convert import convert
    from fusedllm.weights.open import open_checkpoint
    from fusedllm.weights.registry import resolve

    path = resolve(options.source, progress=True)
    source = path if options.rotate is None else rotate(open_checkpoint(path), options.rotate)
    convert(source, options.destination, format=options.format, dtype=options.dtype, force=options.force, progress=True)
