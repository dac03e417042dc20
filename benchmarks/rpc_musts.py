"""What the ladder has to show, and whether a run of it did: ratios with their limits, for the report and the file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# On a CPU arithmetic dominates, so that the musts there are on what a rung takes beside it.
OVERHEAD_OF_A = {"plain": 0.01, "split": 0.05}
FASTER_THAN_A = 8.0
# On an accelerator, at so many tokens: the predecessor's own plan from 332 to 10 ms.
FASTER_THAN_B = 33.0
TOKENS_ELSEWHERE = 1024
# At decode, of a token's time under `split`.
MASKED_OF_SPLIT = 2.0

CROSSINGS_A_LAYER = 4


def verdicts(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Each must whose rungs were run: what was found, in the median and in the worst repetition, and `passed`."""
    rows = {row["name"]: row for row in result["rows"]}
    return [*_of_time(result, rows), *_of_crossings(result, rows), *_of_decode(result)]


def is_whole(result: dict[str, Any]) -> bool:
    """Whether the run is of the shape that the musts are of."""
    tokens = 1 if result["device"]["platform"] == "cpu" else TOKENS_ELSEWHERE
    return bool(result["layers"] == result["all_layers"] and result["seq"] >= tokens)


def _of_time(result: dict[str, Any], rows: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if result["device"]["platform"] != "cpu":
        if {"plain", "b"} <= rows.keys():
            yield _faster(rows["plain"], "b", FASTER_THAN_B)
        return
    if "a" not in rows:
        return
    for name, limit in OVERHEAD_OF_A.items():
        if name in rows:
            median, worst = rows[name]["overhead_share"]["a"].median, rows[name]["worst"]["overhead_share"]["a"]
            yield {
                "must": f"{name}'s overhead at most {100 * limit:g} % of (a)'s",
                "found": f"{100 * median:.2f} %",
                "worst": f"{100 * worst:.2f} %",
                "passed": median <= limit,
                "always": worst <= limit,
            }
    if "plain" in rows:
        yield _faster(rows["plain"], "a", FASTER_THAN_A)


def _faster(row: dict[str, Any], other: str, limit: float) -> dict[str, Any]:
    median, worst = row["speedup"][other].median, row["worst"]["speedup"][other]
    return {
        "must": f"{row['name']} at least {limit:g} times as fast as ({other})",
        "found": f"{median:.2f} x",
        "worst": f"{worst:.2f} x",
        "passed": median >= limit,
        "always": worst >= limit,
    }


def _of_crossings(result: dict[str, Any], rows: dict[str, Any]) -> Iterator[dict[str, Any]]:
    expected = CROSSINGS_A_LAYER * result["layers"] + 1
    for name in ("split", "masked"):
        if name in rows:
            calls = rows[name]["calls"]
            right = calls.median == expected and calls.iqr == 0
            yield {
                "must": f"{name} crosses 4 times a layer and once: {expected}",
                "found": f"{calls.median:g}",
                "worst": f"{calls.median:g}",
                "passed": right,
                "always": right,
            }


def _of_decode(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    decode = result["decode"]
    if {"masked", "split"} <= decode.keys():
        ratio = decode["masked"]["latency"].median / decode["split"]["latency"].median
        yield {
            "must": f"a decoded token under masked at most {MASKED_OF_SPLIT:g} times one under split",
            "found": f"{ratio:.2f} x",
            "worst": "-",
            "passed": ratio <= MASKED_OF_SPLIT,
            "always": ratio <= MASKED_OF_SPLIT,
        }
