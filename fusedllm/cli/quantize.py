"""`fusedllm quantize`: a checkpoint or a table of weights, quantized into a file."""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
    parser.add_argument(
        "--scheme", default="int4-g64", help="such as int8, int4-g32-sym, w8a8-turned (default int4-g64)"
    )
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
    from fusedllm.quantizing import quantize_file, table_format

    report = QuantizeReport()
    keywords = {
        "method": options.method,
        "rules": dict(_rule(text) for text in options.rule),
        "calibration": options.calibration,
        "resume": options.resume,
        "target_bpw": options.target_bpw,
        "scale_dtype": options.scale_dtype,
        "model": options.model,
        "report": report,
        "progress": True,
    }
    # A suffix that names no format at all is refused with those that there are.
    is_named = options.format is not None or options.destination.suffix.lower() in TABLES
    if is_named and table_format(options.destination, options.format) is not None:
        quantize_file(
            options.source,
            options.destination,
            options.scheme,
            force=options.force,
            format=options.format,
            **keywords,
        )
    else:
        _convert(options, keywords)
    print(report if options.report else report.summary())


def _convert(options: argparse.Namespace, keywords: Mapping[str, Any]) -> None:
    """Quantizes into a table beside the destination, and converts that."""
    from fusedllm.quantizing import quantize_file
    from fusedllm.weights.convert import convert
    from fusedllm.weights.files import disk_errors
    from fusedllm.weights.gguf_grouped import check_blocks
    from fusedllm.weights.open import open_checkpoint

    format = _checked_format(options)
    parent = Path(os.path.abspath(options.destination)).parent
    with disk_errors(options.destination):
        parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent) as directory:
        table = quantize_file(options.source, Path(directory) / "quantized.arrow", options.scheme, **keywords)
        # Messages, and the name in a GGUF, are to be of what the user knows.
        checkpoint = dataclasses.replace(open_checkpoint(table), path=Path(options.source))
        if format == "gguf":
            check_blocks(checkpoint, options.destination)
        convert(checkpoint, options.destination, format=format, force=options.force, progress=True)


def _checked_format(options: argparse.Namespace) -> str:
    """The format of the destination; what can be refused is, before anything is quantized."""
    from fusedllm.quantizing import check_turning
    from fusedllm.weights.convert import format_of, writer_of
    from fusedllm.weights.files import refuse_existing
    from fusedllm.weights.gguf_grouped import check_scheme
    from fusedllm.weights.tables import says_model

    writer_of(options.destination, options.format)
    format = str(options.format or format_of(options.destination))
    if format == "orbax":
        raise QuantizationError(
            f"{options.destination} would be an Orbax directory, which holds no codes: choose .arrow, .gguf or "
            ".safetensors."
        )
    check_turning(options.scheme, dict(_rule(text) for text in options.rule), options.destination)
    if format == "gguf" and not options.rule and options.target_bpw is None:
        check_scheme(options.scheme, options.destination)
    if options.model is None and not says_model(options.source):
        raise QuantizationError(
            f"{options.source} does not say which model its weights are of, and {options.destination} has to: say it "
            "with --model."
        )
    refuse_existing(options.destination, options.force)
    return format


def _rule(text: str) -> tuple[str, str]:
    pattern, equals, scheme = text.rpartition("=")
    if not equals or not pattern or not scheme:
        raise QuantizationError(f"a rule is written PATTERN=SCHEME, got {text!r}.")
    return pattern, scheme
