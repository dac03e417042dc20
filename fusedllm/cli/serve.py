"""`fusedllm serve`: an OpenAI-compatible server on one model."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fusedllm.cli.options import add_model_arguments, load_model
from fusedllm.errors import SettingsError

if TYPE_CHECKING:
    from fusedllm.engine.config import EngineConfig
    from fusedllm.serve.settings import ServerSettings
    from fusedllm.weights.checkpoint import Checkpoint

NAME = "serve"
HELP = "serve a model over HTTP, as OpenAI does"

DEFAULT_MAX_BATCH = 16

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    add_model_arguments(parser)
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--max-batch", type=int, default=DEFAULT_MAX_BATCH, metavar="N",
        help=f"requests that run together (default {DEFAULT_MAX_BATCH})",
    )  # fmt: skip
    group.add_argument(
        "--token-budget", type=int, default=0, metavar="TOKENS",
        help="of prompts, between two steps of running requests (default 256, on a GPU 1,024)",
    )  # fmt: skip
    memory = group.add_mutually_exclusive_group()
    memory.add_argument(
        "--memory-fraction", type=float, metavar="F",
        help="of the memory that the weights leave, for the KV cache (default: as much as --max-batch requests of the "
        "whole context need, in half of it)",
    )  # fmt: skip
    memory.add_argument("--cache-memory", type=_bytes, metavar="SIZE", help="of the KV cache, as in 512M or 4G")
    memory.add_argument("--cache-tokens", type=int, metavar="TOKENS", help="positions in the KV cache")
    group = parser.add_argument_group("network")
    group.add_argument("--host", help="where to listen (default 127.0.0.1, for this machine only)")
    group.add_argument("--port", type=int, help="default 8000; 0 takes one that is free")
    group.add_argument("--certificate", type=Path, metavar="PEM", help="serve TLS with this")
    group.add_argument("--private-key", type=Path, metavar="PEM", help="of the certificate")
    group.add_argument(
        "--cors-origin", action="append", dest="cors_origins", metavar="ORIGIN",
        help="of web pages that may ask from a browser, as in https://chat.example.org; repeatable",
    )  # fmt: skip
    group.add_argument(
        "--no-attestation", action="store_true",
        help="in a confidential VM, don't read the weights once more at the start to vouch for them",
    )  # fmt: skip
    group = parser.add_argument_group("access")
    group.add_argument(
        "--api-key", action="append", default=[], metavar="KEY",
        help="who may ask; repeatable. Other users of this machine see it: better use a file, or FUSEDLLM_API_KEYS",
    )  # fmt: skip
    group.add_argument("--api-key-file", type=Path, metavar="FILE", help="of keys, one a line")
    group.add_argument("--requests-per-minute", type=int, metavar="N", help="of one key (default: no limit)")
    _add_limits(parser)
    group = parser.add_argument_group("logs")
    group.add_argument("--log-format", choices=["human", "json"])
    group.add_argument("--log-prompts", action="store_true", default=None, help="write requests to the log as they are")


def _add_limits(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("limits")
    group.add_argument("--served-model-name", dest="model_name", metavar="NAME", help="default: what --ckpt says")
    group.add_argument("--max-queue", type=int, metavar="N", help="requests that may wait (default 64)")
    group.add_argument("--max-body", type=_bytes, dest="max_body_bytes", metavar="SIZE", help="default 4M")
    group.add_argument("--max-prompt-tokens", type=int, metavar="TOKENS", help="default: the context")
    group.add_argument("--max-tokens", type=int, metavar="TOKENS", help="default: the context")
    group.add_argument("--max-n", type=int, metavar="N", help="answers to one prompt (default 8)")
    group.add_argument("--min-priority", type=int, metavar="N", help="that a request may ask for (default 0)")
    group.add_argument("--request-seconds", type=float, metavar="S", help="deadline of a request (default 600)")
    group.add_argument("--drain-seconds", type=float, metavar="S", help="for what is in flight at SIGTERM (default 30)")


def run(options: argparse.Namespace) -> None:
    """Serves until SIGTERM or SIGINT."""
    # Everything that can be wrong without the model is found before it is loaded.
    settings = settings_of(options)
    if options.coordinator is not None:
        raise SettingsError(
            "a server's requests come to one process, and --coordinator shares a model between several; leave it away, "
            "or put separate servers behind a load balancer."
        )
    buckets = batch_buckets(options.max_batch)
    from fusedllm.serve.listen import check_certificate
    from fusedllm.serve.server import run as serve

    check_certificate(settings)
    checkpoint, engine = _sized(options, buckets)
    if not options.no_attestation:
        settings = _attested(settings, checkpoint, options.policy)
    llm = load_model(options, checkpoint, engine)
    print(llm.policy_words(), file=sys.stderr, flush=True)
    try:
        serve(llm, settings, block=True)
    finally:
        llm.close()


def settings_of(options: argparse.Namespace) -> ServerSettings:
    """The server's settings that the options name; the others are the defaults."""
    from fusedllm.serve.settings import ServerSettings, read_keys

    names = {field.name for field in dataclasses.fields(ServerSettings)}
    given = {name: value for name, value in vars(options).items() if name in names and value is not None}
    given.setdefault("model_name", Path(options.ckpt).name if Path(options.ckpt).exists() else options.ckpt)
    given["cors_origins"] = tuple(given.get("cors_origins", ()))
    return ServerSettings(**given, api_keys=read_keys(options.api_key, options.api_key_file))


def batch_buckets(most: int) -> tuple[int, ...]:
    """Powers of two below `most`, and `most`.

    Raises:
      SettingsError: `most` is less than one.
    """
    if most < 1:
        raise SettingsError(f"--max-batch must be at least 1, got {most}.")
    powers = (2**power for power in range(most.bit_length()))
    return (*(power for power in powers if power < most), most)


def _attested(settings: ServerSettings, source: str | Path | Checkpoint, policy: str) -> ServerSettings:
    """`settings` with the manifest of what is served, where there is hardware to vouch for it."""
    from fusedllm.attesting import available, manifest_of

    # (Random weights are nobody's, and not read from anywhere.)
    if isinstance(source, (str, Path)) or not available():
        return settings
    return dataclasses.replace(settings, manifest=manifest_of(source, policy, progress=True))


def _sized(options: argparse.Namespace, buckets: tuple[int, ...]) -> tuple[str | Path | Checkpoint, EngineConfig]:
    """The checkpoint, and an engine with a KV cache of the size that was asked for or that there is memory for."""
    from fusedllm.sizing import CacheSize, fitting_engine

    size = CacheSize(options.memory_fraction, options.cache_memory, options.cache_tokens)
    return fitting_engine(
        options.ckpt,
        size,
        batch_buckets=buckets,
        token_budget=options.token_budget,
        dtype=options.dtype,
        kv_dtype=options.kv_dtype,
        implementation=options.implementation,
        max_context=options.max_context,
        policy=options.policy,
        mesh=options.mesh,
        random_weights=options.random_weights,
        progress=True,
    )


def _bytes(text: str) -> int:
    """The number of bytes of `512M`, `4G`, `4GiB` or `4194304`; units are powers of 1,024."""
    number = text.strip().upper().removesuffix("B").removesuffix("I")
    unit = number[-1:] if number[-1:] in UNITS else ""
    try:
        return int(float(number.removesuffix(unit)) * UNITS[unit])
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"a size is written as in 512M or 4G, got {text!r}") from None
