"""What a narrow KV cache costs in quality, and what it gives in memory and speed.

    python benchmarks/kv_quality.py
    python benchmarks/kv_quality.py --windows 2 --repetitions 3 --json benchmarks/results/kv-quality.json

SmolLM2-135M on the text of the tests: eight windows of 512 tokens, each scored on its own, its first token unscored.
Quality is that of float32 weights and activations, so that nothing but the cache differs from the reference, whose
cache is float32; speed is that of greedy decode steps with the file's quantized weights, as `dtype="auto"` has them,
after a prompt of `--context` tokens. All caches take turns in one process.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from common import Spread, environment, table, warn_if_busy, write_json
from cpu_quality import STORED, Quality, log_softmax

from fusedllm import LLM, EngineConfig
from fusedllm.backend import KV_DTYPES, runs_native, set_threads
from fusedllm.compilation_cache import use_compilation_cache
from fusedllm.weights import registry
from fusedllm.weights.load import load_params
from fusedllm.weights.open import open_checkpoint

CKPT = "smollm2-135m"
REFERENCE = "float32"
DECODE_TOKENS = 64


def models(kv_dtypes: list[str], quantized: bool, engine: EngineConfig) -> dict[str, LLM]:
    """One model for each cache, all of the same weights: as they are in the file, or in float32."""
    checkpoint = open_checkpoint(registry.resolve(CKPT, progress=True))
    params, _ = load_params(
        checkpoint,
        dtype=None if quantized else np.dtype(np.float32),
        keep_quantized=quantized,
        pack=quantized and runs_native(None),
    )
    return {
        name: LLM(checkpoint.config, params, engine=engine, dtype=jnp.float32, kv_dtype=KV_DTYPES[name])
        for name in kv_dtypes
    }


def measure_quality(llms: Mapping[str, LLM], ids: list[int], window: int) -> dict[str, dict[str, float]]:
    """Perplexity of each, and its distance from the reference, which is the first."""
    qualities = {name: Quality() for name in llms}
    for start in range(0, len(ids), window):
        part = ids[start : start + window]
        reference = np.empty(0)
        for name, llm in llms.items():
            # The last token's successor is not in the window.
            found = log_softmax(llm.logits(part)[:-1])
            reference = found if name == REFERENCE else reference
            qualities[name].add(part, reference, found)
        print(f"window {start // window + 1} of {-(-len(ids) // window)}", file=sys.stderr)
    return {name: quality.result() for name, quality in qualities.items()}


def measure_speed(llms: Mapping[str, LLM], context: int, repetitions: int) -> dict[str, Spread]:
    """Tokens a second of decode steps; an unmeasured round compiles, then the caches take turns at being first."""
    ids = np.random.RandomState(context).randint(0, 1000, context).tolist()
    samples: dict[str, list[float]] = {name: [] for name in llms}
    names = list(llms)
    for repetition in range(repetitions + 1):
        turn = repetition % len(names)
        for name in names[turn:] + names[:turn]:
            (result,) = llms[name].generate([ids], temperature=0, max_tokens=DECODE_TOKENS + 1, ignore_eos=True)
            if repetition:
                samples[name].append(DECODE_TOKENS / result.timings.decode_seconds)
    return {name: Spread.of(values) for name, values in samples.items()}


def bytes_a_token(llm: LLM) -> float:
    """Bytes of the cache for one position, in all layers, scales included."""
    runner = llm.engine.runner
    return runner.cache_bytes / (runner.engine.num_pages * runner.engine.page_size)


def report(result: dict[str, dict[str, Any]], context: int) -> str:
    """The table; differences and divergences are to the cache of float32."""
    columns = [
        "KV cache",
        "bytes a token",
        "perplexity",
        "to float32",
        "mean KL divergence",
        "its 99th percentile",
        "same likeliest token",
    ]
    if any("tokens_per_second" in one for one in result.values()):
        columns.append(f"decode at {context}, tokens/s")
    reference = result[REFERENCE]["perplexity"]
    lines = []
    for name, one in result.items():
        difference = f"{100 * (one['perplexity'] / reference - 1):+.2f} ± {100 * one['loss_error']:.2f} %"
        line = [
            name,
            f"{one['bytes_a_token']:,.0f}",
            f"{one['perplexity']:.3f}",
            "" if name == REFERENCE else difference,
            f"{one['kl_divergence']:.2g}",
            f"{one['kl_divergence_99']:.2g}",
            f"{100 * one['same_top_token']:.2f} %",
        ]
        lines.append(line + [str(one["tokens_per_second"])] * (len(columns) - len(line)))
    note = "KL(float32 || the cache) in nats. ± is a standard error, and of speeds half the distance of the quartiles."
    return f"{table(columns, lines)}\n\n{note}"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kv-dtypes", nargs="+", choices=list(KV_DTYPES), default=list(KV_DTYPES))
    parser.add_argument("--windows", type=int, default=8, help="of 512 tokens (default and most: %(default)s)")
    parser.add_argument("--context", type=int, default=512, help="tokens before a decode (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=9, help="of each speed; 0 measures none")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    warn_if_busy()
    use_compilation_cache()
    set_threads(arguments.threads, runs_native(None))
    kv_dtypes = [REFERENCE, *(name for name in arguments.kv_dtypes if name != REFERENCE)]
    stored = json.loads(STORED.read_text(encoding="utf-8"))["perplexity"]
    window = stored["window"]
    room = max(window, arguments.context + DECODE_TOKENS + 1)
    engine = EngineConfig(
        max_context=room, prefill_buckets=(512,), batch_buckets=(1,), prefix_cache=False, token_budget=512
    )
    llms = models(kv_dtypes, quantized=False, engine=engine)
    result: dict[str, dict[str, Any]] = {
        name: {"bytes_a_token": bytes_a_token(llms[name]), **quality}
        for name, quality in measure_quality(llms, stored["ids"][: arguments.windows * window], window).items()
    }
    del llms
    if arguments.repetitions:
        llms = models(kv_dtypes, quantized=runs_native(None), engine=engine)
        for name, speed in measure_speed(llms, arguments.context, arguments.repetitions).items():
            result[name]["tokens_per_second"] = speed
    print(report(result, arguments.context))
    if arguments.json:
        about = {name: getattr(arguments, name) for name in ("windows", "context", "repetitions", "threads")}
        # Speeds of a busy machine mean little, and whoever reads them should see that it was.
        about["load_average"] = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        where = environment("fusedllm", "jax", "jaxlib", "numpy")
        write_json(arguments.json, {**where, **about, "window": window, "caches": result})


if __name__ == "__main__":
    main()
