"""`fusedllm perplexity`: how well a model predicts a text."""

from __future__ import annotations

import argparse
from pathlib import Path

from fusedllm.cli.options import add_model_arguments, load_model
from fusedllm.errors import RequestError

NAME = "perplexity"
HELP = "measure a model's perplexity on a text file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    parser.add_argument("--text", required=True, type=Path, metavar="FILE", help="UTF-8 text")
    parser.add_argument("--window", type=int, default=512, help="tokens scored on their own (default 512)")
    parser.add_argument("--windows", type=int, metavar="N", help="use only the first N windows")
    add_model_arguments(parser)


def run(options: argparse.Namespace) -> None:
    """Prints the perplexity and what it was measured on."""
    try:
        text = options.text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{options.text} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#x}."
        ) from None
    if options.windows is not None and options.windows < 1:
        raise RequestError(f"--windows must be at least 1, got {options.windows}.")
    llm = load_model(options)
    ids = llm.encode(text)
    if options.windows is not None:
        ids = ids[: options.windows * options.window]
    value = llm.perplexity(ids, options.window)
    print(f"perplexity {value:.4f} over {len(ids)} tokens in windows of {options.window}")
