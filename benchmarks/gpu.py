"""Prefill and decode of the 1B shape on an accelerator, beside what its memory and its matrix units can do.

    python benchmarks/gpu.py

Random weights, XLA's own kernels, bfloat16; then products with one large matrix, plain and in the schemes of
`fusedllm.quant.schemes`, with the kernels that are chosen there. Without an accelerator it runs a small shape in
float32 on the CPU, which shows that the program works and says nothing about a GPU.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import (
    Spread,
    decode_bytes,
    environment,
    prefill_operations,
    significant,
    sizes,
    table,
    write_json,
)

import fusedllm
from fusedllm.kernels.linear import linear
from fusedllm.kernels.quantize import quantize
from fusedllm.quant.schemes import SCHEMES

PREFILL_TOKENS = 1024
DECODE_CONTEXT = 128
BATCHES = (1, 8)

# Of one product: a decode step, which reads the weights, and a prefill, which multiplies.
PRODUCT_TOKENS = (1, 512)
PRODUCT_SCHEMES = ("int8", "int8-g64", "int4-g64", "int4-g64-sym", "int3-g128", "fp8", "w8a8")


@dataclass(frozen=True)
class Scale:
    """What is run on a kind of device, sized so that the whole program takes minutes."""

    ckpt: str
    dtype: str
    decode_tokens: int
    copy_bytes: int
    matmul_size: int
    product_shape: tuple[int, int]
    launches: int


# The matrix of the products is larger than a GPU's caches in any scheme.
ACCELERATOR = Scale("llama-1b", "bfloat16", 128, 2**31, 8192, product_shape=(32768, 8192), launches=10)
CPU = Scale("smollm2-135m", "float32", 16, 2**28, 2048, product_shape=(1024, 512), launches=2)


def copy_bandwidth(scale: Scale, repetitions: int) -> Spread:
    """Bytes read and written per second by a pass over the device's memory."""
    # Adding one is free beside the traffic. The result takes the operand's place, so that the host's first touch of
    # fresh pages is not what is measured on a CPU.
    program = jax.jit(lambda x: x + 1, donate_argnums=0)
    samples = _repeat(program, jnp.zeros(scale.copy_bytes // 4, jnp.float32), scale.launches, repetitions)
    return Spread.of([2 * scale.copy_bytes / sample for sample in samples])


def matmul_rate(scale: Scale, repetitions: int) -> Spread:
    """Operations per second of a large product in the model's dtype, its weights `[out, in]` as the model's are."""
    shape = (scale.matmul_size, scale.matmul_size)
    # A variance of 1/in keeps the values in range while each result is the next operand.
    weights = (jax.random.normal(jax.random.key(0), shape) / np.sqrt(scale.matmul_size)).astype(scale.dtype)
    multiply = jax.jit(lambda x, w: jnp.einsum("mk,nk->mn", x, w))
    samples = _repeat(lambda x: multiply(x, weights), jnp.ones(shape, scale.dtype), scale.launches, repetitions)
    return Spread.of([2 * scale.matmul_size**3 / sample for sample in samples])


def products(scale: Scale, repetitions: int) -> list[dict[str, Any]]:
    """Products of one matrix, in the model's dtype and in each scheme; each result is the next operand."""
    rows, width = scale.product_shape
    weights = (jax.random.normal(jax.random.key(0), (rows, width)) / np.sqrt(width)).astype(scale.dtype)
    multiply = jax.jit(lambda x, w: _folded(linear(x, w)[0], width))
    found = []
    for name in (scale.dtype, *PRODUCT_SCHEMES):
        weight = quantize(weights, SCHEMES[name]) if name in SCHEMES else weights
        for tokens in PRODUCT_TOKENS:
            x = jnp.ones((tokens, width), scale.dtype)
            samples = _repeat(lambda x, weight=weight: multiply(x, weight), x, scale.launches, repetitions)
            row = {"weights": name, "tokens": tokens, "bytes": weight.nbytes, "operations": 2 * tokens * weights.size}
            found.append({**row, "seconds": Spread.of(samples)})
    return found


def _folded(product: jax.Array, width: int) -> jax.Array:
    """As wide as the operand, of the same variance, and made of all results, so that none is left out."""
    parts = product.reshape(len(product), -1, width)
    return (parts.sum(1) / np.sqrt(parts.shape[1])).astype(product.dtype)


def _repeat(program: Callable[[jax.Array], jax.Array], x: jax.Array, launches: int, repetitions: int) -> list[float]:
    """Seconds of one launch, in several samples; launches are queued, so that the host's overhead is hidden."""
    x = program(x).block_until_ready()
    samples = []
    for _ in range(repetitions):
        started = time.perf_counter()
        for _ in range(launches):
            x = program(x)
        x.block_until_ready()
        samples.append((time.perf_counter() - started) / launches)
    return samples


def prompts(vocab_size: int, batch: int, length: int) -> list[list[int]]:
    """Token ids; what they say changes no time."""
    return np.random.RandomState(length).randint(0, vocab_size, (batch, length)).tolist()


def prefill_seconds(llm: fusedllm.LLM) -> float:
    """From the prompt to its first token on the host."""
    (result,) = llm.generate(prompts(llm.config.vocab_size, 1, PREFILL_TOKENS), max_tokens=1, ignore_eos=True)
    return result.timings.prefill_seconds


def step_seconds(llm: fusedllm.LLM, batch: int, tokens: int) -> float:
    """One decode step of the whole batch, from when all have their first token until all have their last."""
    requests = prompts(llm.config.vocab_size, batch, DECODE_CONTEXT)
    timings = [r.timings for r in llm.generate(requests, temperature=0, max_tokens=tokens + 1, ignore_eos=True)]
    return (max(t.last_token for t in timings) - max(t.first_token for t in timings)) / tokens


def measure(scale: Scale, repetitions: int) -> dict[str, Any]:
    """Limits first, then the model: prefill against arithmetic, decode against memory."""
    copy, matmul = copy_bandwidth(scale, repetitions), matmul_rate(scale, repetitions)
    room = DECODE_CONTEXT + scale.decode_tokens + 32
    engine = fusedllm.EngineConfig(
        max_context=PREFILL_TOKENS + 16,
        cache_tokens=max(BATCHES) * room,
        prefix_cache=False,
        # One launch for each prompt: the figure is the program's, not the scheduler's.
        prefill_buckets=(DECODE_CONTEXT, PREFILL_TOKENS),
        batch_buckets=BATCHES,
    )
    # Programs are compiled anew: a measuring program should not depend on what a cache holds.
    llm = fusedllm.load(scale.ckpt, random_weights=True, dtype=scale.dtype, engine=engine, keep_programs=False)
    llm.warm_up()
    model, itemsize = sizes(llm.config), jnp.dtype(scale.dtype).itemsize
    rows: list[dict[str, Any]] = []

    def row(name: str, tokens: int, work: float, limit: Spread, samples: list[float]) -> None:
        rows.append(
            {
                "name": name,
                "tokens_per_second": Spread.of([tokens / sample for sample in samples]),
                "seconds": Spread.of(samples),
                "achieved": Spread.of([work / sample for sample in samples]),
                "limit": limit,
                "share_of_limit": work / Spread.of(samples).median / limit.median,
                "bound_by": "memory" if limit is copy else "arithmetic",
            }
        )

    prefill_seconds(llm)  # Programs are compiled; a first real run warms what compiling does not.
    samples = [prefill_seconds(llm) for _ in range(repetitions)]
    row(f"prefill {PREFILL_TOKENS}", PREFILL_TOKENS, prefill_operations(model, PREFILL_TOKENS), matmul, samples)
    for batch in BATCHES:
        step_seconds(llm, batch, scale.decode_tokens)
        samples = [step_seconds(llm, batch, scale.decode_tokens) for _ in range(repetitions)]
        work = decode_bytes(model, DECODE_CONTEXT + scale.decode_tokens // 2, itemsize, batch)
        row(f"decode, batch {batch}", batch, work, copy, samples)
    return {"copy_bandwidth": copy, "matmul": matmul, "rows": rows, "products": products(scale, repetitions)}


def report(result: dict[str, Any]) -> str:
    """The table: tokens/s, and the achieved TFLOP/s or GB/s beside its limit."""
    rows = []
    for row in result["rows"]:
        scale, unit = (1e9, "GB/s") if row["bound_by"] == "memory" else (1e12, "TFLOP/s")
        rows.append(
            [
                row["name"],
                str(row["tokens_per_second"]),
                f"{significant(row['seconds'].median * 1e3)} ms",
                f"{significant(row['achieved'].median / scale)} {unit}",
                f"{significant(row['limit'].median / scale)} {unit}",
                f"{100 * row['share_of_limit']:.0f} %",
            ]
        )
    return table(["row", "tokens/s", "prompt or step", "achieved", "limit", "share"], rows) + (
        "\n\nMedians ± half the distance between the quartiles. Limits measured in this run: a pass over the device's"
        "\nmemory, read and written bytes counted, and one large matrix product in the model's dtype."
    )


def report_products(result: dict[str, Any]) -> str:
    """The table of products: weights read per second, or operations, and the time beside that of plain weights."""
    rows = []
    for row in result["products"]:
        seconds = row["seconds"].median
        plain = next(x for x in result["products"] if x["tokens"] == row["tokens"])["seconds"].median
        if row["tokens"] == min(PRODUCT_TOKENS):
            work, limit, scale, unit = row["bytes"], result["copy_bandwidth"], 1e9, "GB/s"
        else:
            work, limit, scale, unit = row["operations"], result["matmul"], 1e12, "TFLOP/s"
        rows.append(
            [
                row["weights"],
                str(row["tokens"]),
                f"{significant(seconds * 1e6)} us",
                f"{significant(work / seconds / scale)} {unit}",
                f"{100 * work / seconds / limit.median:.0f} %",
                f"{significant(plain / seconds)} x",
            ]
        )
    return table(["weights", "tokens", "product", "achieved", "share of the limit", "as fast as plain"], rows)


def driver() -> list[str]:
    """Name, driver and memory of each NVIDIA GPU, as its own tool tells; empty without it."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="(default: benchmarks/results/gpu-DEVICE.json)")
    arguments = parser.parse_args()
    device = jax.devices()[0]
    scale = CPU if device.platform == "cpu" else ACCELERATOR
    if scale is CPU:
        print("No accelerator here: a small shape on the CPU, to see that the program runs.\n")
    result = measure(scale, arguments.repetitions)
    print(f"{device.device_kind}: shape of {scale.ckpt}, random weights, {scale.dtype}, XLA's kernels\n")
    print(report(result))
    rows, width = scale.product_shape
    print(f"\nProducts with a matrix of {rows} x {width}:\n\n{report_products(result)}")
    where = environment("fusedllm", "jax", "jaxlib", "numpy")
    where["device"] = {"platform": device.platform, "kind": device.device_kind, "driver": driver()}
    name = "gpu-" + "-".join(device.device_kind.lower().split()) + ".json"
    path = arguments.json or Path(__file__).parent / "results" / name
    write_json(path, {**where, "ckpt": scale.ckpt, "dtype": scale.dtype, "random_weights": True, **result})


if __name__ == "__main__":
    main()
