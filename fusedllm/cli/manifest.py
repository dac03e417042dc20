"""`fusedllm manifest`: what a server of a checkpoint must say of itself, for `fusedllm verify --expect-manifest`."""

from __future__ import annotations

import argparse

from fusedllm.cli.options import DEFAULT_CKPT

NAME = "manifest"
HELP = "print the manifest that an attested server of a checkpoint has"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    parser.add_argument("--ckpt", default=DEFAULT_CKPT, metavar="NAME|PATH|hf:OWNER/NAME", help="what is served")
    parser.add_argument("--policy", default="plain", help="of the server (default plain)")
    parser.add_argument("--sha256", action="store_true", help="print only its digest")


def run(options: argparse.Namespace) -> None:
    """Prints it. It holds for this version of the package, whose files are part of it."""
    from fusedllm.attesting import manifest_of

    manifest = manifest_of(options.ckpt, options.policy, progress=True)
    print(manifest.sha256.hex() if options.sha256 else manifest.text)
