"""The Markdown that `rpc_ladder.py` prints: the ladder, where its time goes, the machine's limits, and the claims."""

from __future__ import annotations

from typing import Any

from common import significant, table
from rpc_client import IN_PROCESS, PHASES

NO_CLAIM = "no confidentiality claim"

# The way of the arrays, there and back.
MOVING = ("serialize", "send", "receive", "deserialize")


def report(result: dict[str, Any]) -> str:
    """All of it."""
    device = result["device"]["kind"]
    head = (
        f"## {result['ckpt']}, {result['layers']} layers, random weights, a prompt of {result['seq']} tokens, {device},"
        f" {result['repetitions']} repetitions"
    )
    parts = [head, _ladder(result), _breakdown(result), _limits(result), _claims(result)]
    parts += [f"Left out: {why}" for why in result["left_out"].values()]
    return "\n\n".join(parts)


def title(row: dict[str, Any]) -> str:
    """The rung's name, marked where it was not measured on all layers."""
    return row["title"] + (f" [scaled from {_layers(row['scaled_from_layers'])}]" if row["scaled_from_layers"] else "")


def _layers(count: int) -> str:
    return f"{count} layer" + ("s" if count > 1 else "")


def _milliseconds(spread: Any) -> str:
    return significant(1e3 * spread.median)


def _ladder(result: dict[str, Any]) -> str:
    columns = ["rung", "latency ms", "calls", "MB there", "MB back", "products ms", "overhead ms", "of (a)'s"]
    columns += ["faster than (a)", "than (b)", "logits apart"]
    lines = []
    for row in result["rows"]:
        latency = f"{_milliseconds(row['latency'])} ± {significant(1e3 * row['latency'].iqr / 2)}"
        bytes_ = [_megabytes(row[name].median) for name in ("sent", "received")]
        share = row["overhead_share"].get("a")
        faster = [row["speedup"].get(other) for other in ("a", "b")]
        lines.append(
            [
                title(row),
                latency,
                f"{row['calls'].median:.0f}",
                *bytes_,
                _milliseconds(row["arithmetic"]),
                _milliseconds(row["overhead"]),
                f"{significant(100 * share.median)} %" if share else "-",
                *(f"{significant(ratio.median)} x" if ratio else "-" for ratio in faster),
                f"{row['distance']:.1e}" + ("" if row["distance"] <= row["tolerance"] else " WRONG"),
            ]
        )
    return table(columns, lines)


def _megabytes(count: float) -> str:
    return significant(count / 1e6) if count >= 1000 else f"{count / 1e6:.4f}"


def _breakdown(result: dict[str, Any]) -> str:
    columns = ["ms", *PHASES, *IN_PROCESS, "moved at"]
    lines = []
    for row in result["rows"]:
        phases = row["phases"]
        moving = sum(phases[name].median for name in MOVING if name in phases)
        moved = row["sent"].median + row["received"].median
        times = [_milliseconds(phases[name]) if name in phases else "-" for name in (*PHASES, *IN_PROCESS)]
        lines.append([title(row), *times, f"{significant(moved / moving / 1e9)} GB/s" if moving else "-"])
    return table(columns, lines)


def _limits(result: dict[str, Any]) -> str:
    copy, product = result["copy_rate"].median, result["product"]
    rate = product["operations_per_second"]
    arithmetic = result["operations"] / rate
    text = (
        "Medians over the repetitions, latency ± half the distance between the quartiles. `products` are the rung's own"
        " products alone,\nwhere nothing travels, timed in the same repetition; `overhead` is the latency without them."
        " `send` lasts until the server has\nall of a request, `receive` until the client has all of a reply; `copy` is"
        " between the server's memory and its device;\n`trusted` is the trusted side's own work; `crossings` are a"
        " policy's, with their products. `logits apart`: the distance to\nthe first rung's, over their length.\n\n"
        f"Limits, measured in this run: one thread copies {significant(copy / 1e9)} GB/s, and a {product['dtype']}"
        f" product of {product['size']} cubed by XLA runs at {significant(rate / 1e9)} GFLOP/s:\n"
        f"{significant(1e3 * arithmetic)} ms for the prompt's {significant(result['operations'] / 1e9)} GFLOP."
    )
    moved = [row for row in result["rows"] if row["name"] == "b"]
    if moved:
        crossing = moved[0]["sent"].median + moved[0]["received"].median
        text += f" Copied once, what crosses in (b) takes {significant(1e3 * crossing / copy)} ms."
    return text


def _claims(result: dict[str, Any]) -> str:
    clear = [row["name"] for row in result["rows"] if row["claim"] in (None, NO_CLAIM)]
    claims = [
        f"{row['name']} claims: {row['claim']}." for row in result["rows"] if row["claim"] not in (None, NO_CLAIM)
    ]
    return "\n".join([f"{NO_CLAIM}: {', '.join(clear)} show the device all activations in the clear.", *claims])
