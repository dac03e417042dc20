"""Quantizing layers of 4 MB: our three faces, and the same weights through the quantizers that one would use instead.

The three faces (an array at a time, a batch of arrays, an Arrow table) take 1, 10, 50 and 100 layers of 1024 x 1024
float32 to int4 in groups of 64: time, bytes copied, and the peak of the memory that is used beside input and result.
The peers take 10 of the same layers: the `gguf` library, llama.cpp's own quantizer (`--llama` names `libggml-base.so`;
rows are shared among the threads, as its program does), torchao, bitsandbytes, and NumPy. All take turns in one run,
with the read bandwidth sampled in each round: a quantizer can't be faster than its input is read.

    python benchmarks/quantize.py [--rounds 7] [--llama libggml-base.so] [--json FILE]
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from common import ReadBandwidth, Spread, environment, memory, seconds, significant, table, warn_if_busy, write_json

import fusedllm

SIDE = 1024
LAYER_BYTES = 4 * SIDE * SIDE
COUNTS = (1, 10, 50, 100)
PEER_LAYERS = 10
SCHEME = "int4-g64"
THREADS = 2
SMALL_LAYERS, SMALL = 2000, 64

# What the project promises.
MOST_MS = {1: 2.0, 100: 150.0}
MOST_OVERHEAD_US = 20.0
MOST_EXTRA = 1.1

FACES = {"array by array": "arrays", "batch of arrays": "batch", "Arrow table": "table"}


def table_of(weights: np.ndarray) -> pa.Table:
    """`weights` `[layers, ...]` as a table, its memory used as it lies."""
    count, size = len(weights), weights[0].size
    values = pa.Array.from_buffers(pa.float32(), count * size, [None, pa.py_buffer(weights)])
    lists = pa.LargeListArray.from_arrays(np.arange(count + 1) * size, values)
    shapes = pa.array([list(weights.shape[1:])] * count, pa.list_(pa.int64()))
    return pa.table({"layer_name": [f"layer {i}" for i in range(count)], "weights": lists, "shape": shapes})


def by_arrays(weights: np.ndarray) -> list[Any]:
    return [fusedllm.quantize_array(layer, SCHEME) for layer in weights]


def by_batch(weights: np.ndarray) -> dict[str, Any]:
    return fusedllm.quantize_arrays({f"layer {i}": layer for i, layer in enumerate(weights)}, SCHEME)


def peak_of(function: Callable[[], Any]) -> tuple[int, Any]:
    """Bytes by which this process's resident memory grew at most while `function` ran, and its result."""
    Path("/proc/self/clear_refs").write_text("5")
    before = memory()["resident"]
    result = function()
    return memory()["peak"] - before, result


def numpy_int8(layer: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What one writes in a notebook: per channel, symmetric."""
    scale = np.abs(layer).max(axis=1, keepdims=True) / 127
    return np.clip(np.rint(layer / scale), -127, 127).astype(np.int8), scale


def numpy_int4(layer: np.ndarray) -> tuple[np.ndarray, ...]:
    """The same in groups of 64 with zero points, packed."""
    groups = layer.reshape(SIDE, -1, 64)
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    scale = (high - low) / 15
    zero = np.rint(-low / scale)
    codes = np.clip(np.rint(groups / scale) + zero, 0, 15).astype(np.uint8).reshape(SIDE, -1)
    return codes[:, ::2] | codes[:, 1::2] << 4, scale, zero


def gguf_peers() -> dict[str, Callable[[np.ndarray], Any]]:
    from gguf.constants import GGMLQuantizationType as Kind
    from gguf.quants import quantize

    return {
        f"gguf library, {kind.name}": lambda layer, kind=kind: quantize(layer, kind) for kind in (Kind.Q8_0, Kind.Q4_0)
    }


def llama_peers(path: Path) -> dict[str, Callable[[np.ndarray], Any]]:
    """`ggml_quantize_chunk` on each thread's rows: what llama.cpp's quantizing program calls."""
    library = ctypes.CDLL(str(path))
    function = library.ggml_quantize_chunk
    size, pointer = ctypes.c_int64, ctypes.c_void_p
    function.argtypes = [ctypes.c_int, pointer, pointer, size, size, size, pointer]
    function.restype = ctypes.c_size_t
    pool = ThreadPoolExecutor(THREADS)
    # `enum ggml_type` and bytes of a row.
    kinds = {
        "Q8_0": (8, SIDE // 32 * 34),
        "Q4_0": (2, SIDE // 32 * 18),
        "Q4_1": (3, SIDE // 32 * 20),
        "Q4_K": (12, SIDE // 256 * 144),
    }

    def peer(kind: int, row: int) -> Callable[[np.ndarray], Any]:
        def run(layer: np.ndarray) -> np.ndarray:
            out = np.empty(SIDE * row, np.uint8)
            rows = SIDE // THREADS

            def part(i: int) -> None:
                function(kind, layer.ctypes.data, out.ctypes.data, i * rows * SIDE, rows, SIDE, None)

            list(pool.map(part, range(THREADS)))
            return out

        return run

    return {f"llama.cpp, {name}": peer(*kind) for name, kind in kinds.items()}


def torch_peers() -> tuple[dict[str, Callable[[np.ndarray], Any]], dict[str, str]]:
    """torchao and bitsandbytes, where they are installed and run on a CPU; and why one does not."""
    peers: dict[str, Callable[[np.ndarray], Any]] = {}
    missing: dict[str, str] = {}
    try:
        import torch
    except ImportError as error:
        return peers, {"torchao": str(error), "bitsandbytes": str(error)}
    torch.set_num_threads(THREADS)
    torch.set_grad_enabled(False)
    try:
        from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine, quantize_affine

        def torchao(block: int, low: int, high: int, mapping: Any) -> Callable[[np.ndarray], Any]:
            def run(layer: np.ndarray) -> Any:
                weights = torch.from_numpy(layer)
                size = (1, block)
                scale, zero = choose_qparams_affine(
                    weights, mapping, size, torch.int8, low, high, zero_point_dtype=torch.int8
                )
                return quantize_affine(weights, size, scale, zero, torch.int8, low, high)

            return run

        peers["torchao, int8 per channel"] = torchao(SIDE, -127, 127, MappingType.SYMMETRIC)
        peers["torchao, int4 groups of 64"] = torchao(64, -8, 7, MappingType.ASYMMETRIC)
    except Exception as error:
        missing["torchao"] = f"{type(error).__name__}: {error}"
    try:
        import bitsandbytes.functional as bnb

        bnb.quantize_4bit(torch.zeros(64, 64), blocksize=64, quant_type="nf4")
        peers["bitsandbytes, nf4 blocks of 64"] = lambda layer: bnb.quantize_4bit(
            torch.from_numpy(layer), blocksize=64, quant_type="nf4"
        )
        peers["bitsandbytes, int8 per channel"] = lambda layer: bnb.int8_vectorwise_quant(
            torch.from_numpy(layer).to(torch.float16)
        )
        bnb.int8_vectorwise_quant(torch.zeros(64, 64, dtype=torch.float16))
    except Exception as error:
        peers.pop("bitsandbytes, int8 per channel", None)
        missing["bitsandbytes"] = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return peers, missing


def ours(scheme: str) -> Callable[[np.ndarray], Any]:
    return lambda layer: fusedllm.quantize_array(layer, scheme)


def measure(rounds: int, llama: Path | None) -> dict[str, Any]:
    weights = np.random.default_rng(0).standard_normal((COUNTS[-1], SIDE, SIDE), dtype=np.float32)
    tables = {count: table_of(weights[:count]) for count in COUNTS}
    small = table_of(weights.reshape(-1)[: SMALL_LAYERS * SMALL].reshape(SMALL_LAYERS, 1, SMALL))
    faces: dict[str, Callable[[int], Any]] = {
        "arrays": lambda count: by_arrays(weights[:count]),
        "batch": lambda count: by_batch(weights[:count]),
        "table": lambda count: fusedllm.quantize(tables[count], SCHEME),
    }
    peers: dict[str, Callable[[np.ndarray], Any]] = {
        "fusedllm, int8": ours("int8"),
        "fusedllm, int8-g32": ours("int8-g32"),
        "fusedllm, int4-g64": ours("int4-g64"),
        "fusedllm, int4-g32-sym": ours("int4-g32-sym"),
        "NumPy, int8 per channel": numpy_int8,
        "NumPy, int4 groups of 64": numpy_int4,
        **gguf_peers(),
    }
    missing = {}
    if llama is not None:
        peers |= llama_peers(llama)
    else:
        missing["llama.cpp"] = "--llama was not given"
    more, not_there = torch_peers()
    peers |= more
    missing |= not_there
    bandwidth, read = ReadBandwidth(THREADS), []
    steps: dict[str, Callable[[], Any]] = {
        f"{face} {count}": lambda face=face, count=count: faces[face](count) for face in faces for count in COUNTS
    }
    steps["overhead"] = lambda: fusedllm.quantize(small, SCHEME)
    for name, peer in peers.items():
        steps[f"peer {name}"] = lambda peer=peer: [peer(layer) for layer in weights[:PEER_LAYERS]]
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            took = seconds(step)
            if turn:
                times[name].append(took)
        read.append(bandwidth.sample())
        print(f"round {turn} of {rounds}", file=sys.stderr)
    result = fusedllm.quantize(tables[COUNTS[-1]], SCHEME)
    report = fusedllm.quantize_report(result)
    del result
    extra = {}
    for name, face in faces.items():
        grown, made = peak_of(lambda face=face: face(COUNTS[-1]))
        extra[name] = grown / report.bytes_out
        del made
    return {
        "rounds": rounds,
        "scheme": SCHEME,
        "faces": {
            face: {str(count): Spread.of(times[f"{face} {count}"]) for count in COUNTS} for face in FACES.values()
        },
        "bytes_copied": report.bytes_copied,
        "conversion_share": report.conversion_share,
        "extra_memory": extra,
        "overhead_us": Spread.of([1e6 * took / SMALL_LAYERS for took in times["overhead"]]),
        "peers": {name: Spread.of([took / PEER_LAYERS for took in times[f"peer {name}"]]) for name in peers},
        "missing": missing,
        "read_bandwidth": Spread.of(read),
        "isa": os.environ.get("FUSEDLLM_CPU_ISA", "best"),
        **environment("jax", "pyarrow", "numpy", "gguf", "torch", "torchao", "bitsandbytes"),
    }


def show(figures: dict[str, Any]) -> bool:
    """Prints the tables and what was promised; whether all of that held."""
    limit = figures["read_bandwidth"].median
    print(f"\nread bandwidth {figures['read_bandwidth'].median / 1e9:.1f} GB/s; {figures['rounds']} rounds, medians\n")
    rows = []
    for title, face in FACES.items():
        for count in COUNTS:
            took = figures["faces"][face][str(count)]
            rate = count * LAYER_BYTES / took.median
            copied = f"{figures['bytes_copied']:,}" if count == COUNTS[-1] and face == "table" else ""
            extra = f"{figures['extra_memory'][face]:.2f}" if count == COUNTS[-1] else ""
            milliseconds = f"{1e3 * took.median:.2f} ± {500 * took.iqr:.2f}"
            rows.append(
                [f"{title}, {count}", milliseconds, significant(rate / 1e9), f"{rate / limit:.2f}", copied, extra]
            )
    columns = ["layers of 4 MB", "ms", "GB/s", "of the read bandwidth", "bytes copied", "memory grown / result"]
    print(table(columns, rows))
    print(
        f"\na layer's fixed overhead: {figures['overhead_us']} microseconds ({SMALL_LAYERS} layers of {SMALL} weights)"
    )
    print(f"conversion: {figures['conversion_share']:.1%} of the time\n")
    names = figures["peers"]
    rows = []
    for name, took in names.items():
        best = names["fusedllm, int8" if "int8" in name or "Q8" in name else "fusedllm, int4-g64"]
        rate = LAYER_BYTES / took.median
        rows.append([name, f"{1e3 * took.median:.2f}", significant(rate / 1e9), f"{took.median / best.median:.1f}"])
    print(table(["one layer", "ms", "GB/s", "time, ours = 1"], rows))
    for name, reason in figures["missing"].items():
        print(f"not measured: {name} ({reason})")
    held = {
        **{
            f"{count} layers through Arrow in {most:g} ms": figures["faces"]["table"][str(count)].median * 1e3 <= most
            for count, most in MOST_MS.items()
        },
        "0 bytes copied": figures["bytes_copied"] == 0,
        f"memory grown {MOST_EXTRA} x result at most": figures["extra_memory"]["table"] <= MOST_EXTRA,
        f"overhead {MOST_OVERHEAD_US:g} microseconds at most": figures["overhead_us"].median <= MOST_OVERHEAD_US,
        "faster than every peer": all(
            took.median > names["fusedllm, int8" if "int8" in name or "Q8" in name else "fusedllm, int4-g64"].median
            for name, took in names.items()
            if not name.startswith("fusedllm")
        ),
    }
    print()
    for what, holds in held.items():
        print(f"{'holds' if holds else 'MISSED'}: {what}")
    return all(held.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--llama", type=Path, metavar="FILE", help="libggml-base.so of a llama.cpp that was built here")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    options = parser.parse_args()
    warn_if_busy()
    figures = measure(options.rounds, options.llama)
    holds = show(figures)
    if options.json:
        write_json(options.json, figures)
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
