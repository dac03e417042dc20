"""Options that several commands share."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from fusedllm.errors import ShardingError

if TYPE_CHECKING:
    from pathlib import Path

    from fusedllm.engine.config import EngineConfig
    from fusedllm.llm import LLM
    from fusedllm.weights.checkpoint import Checkpoint

# Those of `fusedllm.partition.policies`, which would import jax.
POLICIES = ("plain", "split", "masked", "verify", "masked+verify", "trusted")
IMPLEMENTATIONS = ("xla", "ffi", "pallas", "triton", "mosaic")
CROSSINGS = ("driven", "callback", "ffi")

DEFAULT_CKPT = "smollm2-135m"


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """`--ckpt` and what goes with loading a model."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--ckpt",
        default=DEFAULT_CKPT,
        metavar="NAME|PATH|hf:OWNER/NAME",
        help=f"a name of `fusedllm models`, a file or directory, or a Hub repository (default {DEFAULT_CKPT})",
    )
    group.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    group.add_argument(
        "--kv-dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16", "int8", "fp8"],
        help="of the KV cache; of a byte a number, int8 (with scales) is ten times closer to float32 than fp8 (e4m3)",
    )
    group.add_argument(
        "--implementation",
        choices=IMPLEMENTATIONS,
        help="of the kernels (default: the best there is; ffi is native, on the CPU; pallas is for GPUs, by way of "
        "triton or mosaic)",
    )
    group.add_argument(
        "--activation-bits",
        type=int,
        choices=[8, 16],
        help="of activations in native products with quantized weights; 8 prefills faster (default: 8 for models 2,048 "
        "or more wide, else 16)",
    )
    group.add_argument("--threads", type=int, metavar="N", help="of the native kernels (default: all cores)")
    group.add_argument(
        "--policy",
        default="plain",
        choices=POLICIES,
        help="which part runs where, and so what whoever runs the accelerator sees (default plain: everything)",
    )
    group.add_argument(
        "--crossing",
        choices=CROSSINGS,
        help="how a policy with a boundary crosses it: the host launches each product (driven, the default), or one "
        "program asks the host, by a callback of Python or natively on the CPU (ffi)",
    )
    group.add_argument(
        "--mesh",
        metavar="tp=T,dp=D",
        help="split the model over T x D devices: T share the weights, and D such groups answer side by side",
    )
    group.add_argument(
        "--coordinator", metavar="HOST:PORT", help="of several processes that share the devices of --mesh: of the first"
    )
    group.add_argument("--processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process-id", type=int, metavar="I", help="which of them this is, from 0, which writes alone")
    group.add_argument("--max-context", type=int, metavar="TOKENS", help="positions that a request may use")
    group.add_argument("--random-weights", action="store_true", help="seeded random weights of the named architecture")


def join_processes(options: argparse.Namespace) -> None:
    """Joins the other processes, where the options name any; of theirs only the first one's output is shown.

    Raises:
      ShardingError: some of the options are missing, or the processes don't find one another.
    """
    given = (options.coordinator, options.processes, options.process_id)
    if given == (None, None, None):
        return
    if None in given or options.mesh is None:
        raise ShardingError(
            "several processes share a --mesh and need --coordinator, --processes and --process-id, all of them."
        )
    from fusedllm.sharding.mesh import parse_mesh
    from fusedllm.sharding.processes import connect

    # What is wrong in one of them all should hear of before they wait for one another.
    parse_mesh(options.mesh)
    # What libraries write to standard output as the processes meet goes with the other messages.
    answers = os.open(os.devnull, os.O_WRONLY) if options.process_id else os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    sys.stdout = os.fdopen(answers, "w", encoding=sys.stdout.encoding, errors="replace")
    connect(*given)


def load_model(
    options: argparse.Namespace, ckpt: str | Path | Checkpoint | None = None, engine: EngineConfig | None = None
) -> LLM:
    """The model that the options name; `ckpt` if that has been opened already, and `engine` if sizes were chosen."""
    join_processes(options)
    from fusedllm.llm import load

    return load(
        options.ckpt if ckpt is None else ckpt,
        dtype=options.dtype,
        kv_dtype=options.kv_dtype,
        implementation=options.implementation,
        activation_bits=options.activation_bits,
        threads=options.threads,
        policy=options.policy,
        crossing=options.crossing,
        mesh=options.mesh,
        max_context=options.max_context,
        engine=engine,
        random_weights=options.random_weights,
        progress=True,
    )
