"""Parses the command line, runs the command, and turns every expected failure into one sentence and an exit code."""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
import warnings
from collections.abc import Sequence

from fusedllm import __version__
from fusedllm.cli import convert, generate, manifest, models, perplexity, quantize, serve, verify
from fusedllm.cli.environment import set_environment
from fusedllm.errors import FusedLLMError

COMMANDS = (generate, serve, perplexity, convert, quantize, manifest, verify, models.PULL, models.LIST)

# What a shell reports for a process that SIGINT ended.
INTERRUPTED = 130


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; importing and building it loads neither jax nor any other large library."""
    parser = argparse.ArgumentParser(
        prog="fusedllm", description="LLaMA as one compiled XLA program.", formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"fusedllm {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        sub = subparsers.add_parser(command.NAME, help=command.HELP, description=command.HELP)
        command.add_arguments(sub)
        sub.add_argument("--debug", action="store_true", help="show a traceback with an error")
        sub.set_defaults(run=command.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; the exit code. `python -m fusedllm` and the console script call it."""
    options = build_parser().parse_args(arguments)
    set_environment(options)
    for stream in (sys.stdout, sys.stderr):
        # A terminal that can't show a character shows a question mark instead of ending the answer.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    warnings.formatwarning = _plainly
    try:
        options.run(options)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        return _fail("interrupted.", INTERRUPTED, options)
    except BrokenPipeError:
        # The reader of our output has left; what is still buffered must not fail a second time at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except FusedLLMError as error:
        return _fail(str(error), error.exit_code, options)
    except MemoryError:
        return _fail("there is not enough memory for this model; try a smaller one or --dtype bfloat16.", 2, options)
    except OSError as error:
        if error.errno is None:
            raise
        place = f" ({error.filename})" if error.filename else ""
        what = (
            "the disk is full" if error.errno == errno.ENOSPC else (error.strerror or "the file can't be used").lower()
        )
        return _fail(f"{what}{place}.", 2, options)


_with_place = warnings.formatwarning


def _plainly(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Our own warnings as a sentence, as errors are; others with the line of the program that gave them."""
    if category.__module__.startswith("fusedllm."):
        return f"fusedllm: {message}\n"
    return _with_place(message, category, filename, lineno, line)


def _fail(sentence: str, code: int, options: argparse.Namespace) -> int:
    if options.debug:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    print(f"fusedllm: {sentence}", file=sys.stderr)
    return code
