"""`fusedllm models` lists the names that `--ckpt` knows; `fusedllm pull NAME` fetches one."""

from __future__ import annotations

import argparse
from types import SimpleNamespace


def _add_pull_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="a name of `fusedllm models`, or hf:OWNER/NAME")


def _pull(options: argparse.Namespace) -> None:
    from fusedllm.weights.registry import resolve

    print(resolve(options.name, progress=True))


def _list(options: argparse.Namespace) -> None:
    from fusedllm.weights.registry import models

    rows = models()
    for row in rows:
        print(row)


PULL = SimpleNamespace(NAME="pull", HELP="fetch a model into the cache", add_arguments=_add_pull_arguments, run=_pull)
LIST = SimpleNamespace(
    NAME="models", HELP="list the models that have a name", add_arguments=lambda parser: None, run=_list
)
