"""The Markdown that `cpu.py` prints: one table of speeds for each model, one of starts and memory, and the limits."""

from __future__ import annotations

from typing import Any

from common import significant, table

NAMES = {"ours": "fusedllm", "llama.cpp": "llama.cpp", "transformers": "transformers"}


def report(result: dict[str, Any], threads: int, repetitions: int) -> str:
    """All that is to be said of one model."""
    read, product = result["read_bandwidth"], result["float32_product"]
    llama = result["llama"]
    peers = [f"llama.cpp of {llama['package']}, flash attention {llama['flash']}" if llama else "no llama.cpp here"]
    peers += [f"transformers in {result['torch_dtype']}"] if result["torch_dtype"] else []
    return "\n\n".join(
        [
            f"## {result['title']}, {threads} threads, {repetitions} repetitions",
            _speeds(result["rows"]),
            "Medians ± half the distance between the quartiles; a ratio is the median of each repetition's."
            f" Decode is limited by\nmemory: a step must read {result['weight_bytes'] / 1e6:,.0f} MB of weights and"
            " the KV cache, and its share is that of a plain read by as many\nthreads in the same repetition,"
            f" {_spread(read)} GB/s. Prefill is limited by arithmetic in 8 bits, for which there is no\nmeasure here;"
            f" a float32 product of XLA runs at {_spread(product)} GFLOP/s.\nPeers: {', '.join(peers)}."
            f" fusedllm rounds activations to {result['activation_bits']} bits, llama.cpp to 8.",
            _starts_and_memory(result),
        ]
    )


def _spread(spread: Any) -> str:
    return f"{significant(spread.median / 1e9)} ± {significant(spread.iqr / 2e9)}"


def _speeds(rows: list[dict[str, Any]]) -> str:
    sides = [side for side in NAMES if any(side in row["speeds"] for row in rows)]
    columns = ["row", "fusedllm tokens/s"]
    for side in sides[1:]:
        columns += [f"{NAMES[side]} tokens/s", "ratio"]
    achieving = [side for side in sides if any(side in row["achieved"] for row in rows)]
    for side in achieving:
        columns += [f"{NAMES[side]} achieves", "share"]
    lines = []
    for row in rows:
        line = [_name(row), str(row["speeds"]["ours"])]
        for side in sides[1:]:
            line += [str(row["speeds"].get(side, "-")), _ratio(row, side)]
        for side in achieving:
            line += _achieved(row, side)
        lines.append(line)
    return table(columns, lines)


def _name(row: dict[str, Any]) -> str:
    if row["kind"] == "prefill":
        return f"prefill {row['tokens']}"
    if row["kind"] == "batch":
        return f"decode at {row['tokens']}, batch {row['batch']}"
    if row["kind"] == "decode":
        return f"decode at {row['tokens']}"
    greedy = row["ratios"].get("greedy")
    against = f", {significant(greedy.median)} of greedy" if greedy else ""
    return f"decode at {row['tokens']}, temperature 0.8, top_p 0.95{against}"


def _ratio(row: dict[str, Any], side: str) -> str:
    return significant(row["ratios"][side].median) if side in row["ratios"] else "-"


def _achieved(row: dict[str, Any], side: str) -> list[str]:
    if side not in row["achieved"]:
        return ["-", "-"]
    unit = "GOP/s" if row["kind"] == "prefill" else "GB/s"
    share = f"{100 * row['share'][side].median:.0f} %" if side in row["share"] else "-"
    return [f"{significant(row['achieved'][side].median / 1e9)} {unit}", share]


def _starts_and_memory(result: dict[str, Any]) -> str:
    size = result["file_bytes"]
    columns = ["process", "first token s", "whole s", "resident", "own", "of files", "peak", "resident / file"]
    lines = []
    for side, memory in result["memory"].items():
        starts = result["starts"].get(side, {})
        megabytes = [f"{memory[name] / 1e6:,.0f} MB" for name in ("resident", "own", "files", "peak")]
        times = [str(starts.get(name, "-")) for name in ("first_token", "whole")]
        lines.append([NAMES[side], *times, *megabytes, significant(memory["resident"] / size)])
    return table(columns, lines) + (
        f"\n\nFrom the start of the process, caches warm. Memory after a generation, of a process whose KV cache holds"
        f" 2,176 positions;\nthe file has {size / 1e6:,.0f} MB."
    )
