"""`fusedllm quantize`: a checkpoint or a table of weights, quantized into a file."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from fusedllm.errors import QuantizationError

NAME = "quantize"
HELP = "quantize a checkpoint or a table of weights"
# Suffixes of the tables that are written as they are made; anything else is converted from such a file.
TABLES = (".arrow", ".ipc", ".feather", ".parquet")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    parser.add_argument("source", metavar="SRC", help="a name, a path or hf:OWNER/NAME, or a table (.arrow, .parquet)")
    parser.add_argument(
        "destination", metavar="DST", type=Path, help="a table (.arrow, .parquet), or what `fusedllm convert` writes"
    )
    parser.add_argument("--scheme", default="int4-g64", help="such as int8, int4-g32-sym, fp8 (default int4-g64)")
    parser.add_argument("--method", default="rtn", help="rtn, clip, hqq, gptq, awq, or several: awq+hqq (default rtn)")
    parser.add_argument(
        "--rule",
        action="append",
        default=[],
        metavar="PATTERN=SCHEME",
        help="another scheme, or keep, for the layers that the regular expression finds; may be given again",
    )
    parser.add_argument(
        "--target-bpw",
        type=float,
        metavar="BITS",
        help="choose a scheme for each tensor, so that all have so many bits per weight at most",
    )
    parser.add_argument("--calibration", metavar="FILE", help="UTF-8 text that activations are measured on")
    parser.add_argument("--resume", metavar="DIR", help="keeps finished layers, so that a stopped calibration goes on")
    parser.add_argument("--scale-dtype", choices=["float16", "float32"], default="float16")
    parser.add_argument("--model", help="whose weights a table holds, so that the result can be run")
    parser.add_argument("--format", help="of DST, by default what its suffix says")
    parser.add_argument("--force", action="store_true", help="replace DST where it exists")
    parser.add_argument("--report", action="store_true", help="print what became of each layer")


def run(options: argparse.Namespace) -> None:
    """Quantizes, and prints one line of figures, or the whole report."""
    from fusedllm import QuantizeReport
    from fusedllm.quantizing import quantize_file
    from fusedllm.weights.convert import convert, writer_of
    from fusedllm.weights.files import disk_errors, refuse_existing
    from fusedllm.weights.open import open_checkpoint

    rules = dict(_rule(text) for text in options.rule)
    report = QuantizeReport()
    is_table = options.format == "arrow" or (options.format is None and options.destination.suffix in TABLES)
    keywords = {
        "method": options.method,
        "rules": rules,
        "calibration": options.calibration,
        "resume": options.resume,
        "target_bpw": options.target_bpw,
        "scale_dtype": options.scale_dtype,
        "model": options.model,
        "report": report,
        "progress": True,
    }
    if is_table:
        quantize_file(options.source, options.destination, options.scheme, force=options.force, **keywords)
    else:
        # Before anything is quantized, so that a wrong target costs nothing.
        writer_of(options.destination, options.format)
        if (options.format or options.destination.suffix.removeprefix(".")) == "orbax":
            raise QuantizationError(
                f"{options.destination} would be an Orbax directory, which holds no codes: choose .arrow, .gguf or "
                ".safetensors."
            )
        refuse_existing(options.destination, options.force)
        parent = Path(os.path.abspath(options.destination)).parent
        with disk_errors(options.destination):
            parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent) as directory:
            table = quantize_file(options.source, Path(directory) / "quantized.arrow", options.scheme, **keywords)
            convert(
                open_checkpoint(table), options.destination, format=options.format, force=options.force, progress=True
            )
    print(report if options.report else report.summary())


def _rule(text: str) -> tuple[str, str]:
    pattern, equals, scheme = text.rpartition("=")
    if not equals or not pattern or not scheme:
        raise QuantizationError(f"a rule is written PATTERN=SCHEME, got {text!r}.")
    return pattern, scheme
