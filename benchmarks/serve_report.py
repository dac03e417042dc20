"""The Markdown that `serve.py` prints: throughput and latency of each load, and what a known prefix saves."""

from __future__ import annotations

from typing import Any

from common import significant, table


def report(result: dict[str, Any]) -> str:
    """All that is to be said of one run."""
    peer = result["peer"]
    head = (
        f"## {result['ckpt']} served, {result['threads']} threads for server and client, "
        f"repetitions: {result['repetitions']}"
    )
    about = (
        f"Prompts of about {result['prompt_tokens']} tokens (512 and 32 more with a shared prefix), answers of"
        f" {result['tokens']}. Medians over repetitions;\na ratio is fusedllm's figure over the peer's, the median of"
        " each repetition's. Times are in milliseconds. The gap\nbetween events is what a stream shows; an event's gap"
        " divided over its tokens (by its share of the characters) is\nthe gap between tokens."
    )
    tried = ", ".join(f"{name} {significant(speed)}" for name, speed in result["tried"].items())
    against = f"The peer is {peer}.\nTokens a second at 8 clients, in a short trial: {tried}." if peer else "No peer."
    parts = [head, about + " " + against, _throughput(result), _latency(result), _prefix(result), _errors(result)]
    return "\n\n".join(part for part in parts if part)


def _names(result: dict[str, Any]) -> dict[str, str]:
    return {"ours": "fusedllm", **({"peer": "peer"} if result["peer"] else {})}


def _throughput(result: dict[str, Any]) -> str:
    names = _names(result)
    columns = ["load"]
    for name in names.values():
        columns += [f"{name} tokens/s", f"{name} tokens an event"]
    columns += ["ratio"] if result["peer"] else []
    columns += [f"client's share of a core, {name}" for name in names.values()]
    lines = []
    for row in result["rows"]:
        line = [row["name"]]
        for side in names:
            line += [str(row["sides"][side]["throughput"]), _number(row["sides"][side]["tokens_per_event"])]
        line += [_number(row["ratios"]["throughput"])] if result["peer"] else []
        lines.append(line + [f"{100 * row['sides'][side]['client_cpu'].median:.1f} %" for side in names])
    return table(columns, lines)


def _latency(result: dict[str, Any]) -> str:
    """A line for each load and side, p50 / p95 / p99."""
    columns = ["load", "side", "first token p50 / 95 / 99", "gap between events", "gap between tokens"]
    lines = []
    for row in result["rows"]:
        for side, name in _names(result).items():
            figures = row["sides"][side]
            lines.append(
                [row["name"], name, *(_three(figures, kind) for kind in ("first_token", "event_gap", "token_gap"))]
            )
        if result["peer"]:
            ratios = row["ratios"]
            first = f"p50 {_number(ratios['first_token_p50'])}"
            tokens = f"p50 {_number(ratios['token_gap_p50'])}, p99 {_number(ratios['token_gap_p99'])}"
            lines.append([row["name"], "ratio", first, f"p99 {_number(ratios['event_gap_p99'])}", tokens])
    return table(columns, lines)


def _three(figures: dict[str, Any], kind: str) -> str:
    return " / ".join(significant(1e3 * figures[f"{kind}_p{percent}"].median) for percent in (50, 95, 99))


def _prefix(result: dict[str, Any]) -> str:
    columns = [
        "one client, 544 tokens",
        "first token, all new",
        "first token, 512 seen before",
        "tokens cached",
        "ratio",
    ]
    lines = []
    for side, name in _names(result).items():
        figures = result["prefix"][side]
        times = [f"{significant(1e3 * figures[key].median)} ms" for key in ("new", "seen")]
        lines.append([name, *times, f"{figures['seen_cached_tokens'].median:.0f}", str(figures["ratio"])])
    return table(columns, lines)


def _errors(result: dict[str, Any]) -> str:
    lines = [
        f"{name} at {row['name']}: {row['sides'][side]['errors']} errors, as {row['sides'][side]['error']}"
        for row in result["rows"]
        for side, name in _names(result).items()
        if row["sides"][side]["errors"]
    ]
    return "\n".join(lines) or "No request failed."


def _number(spread: Any) -> str:
    return significant(spread.median)
