"""The Markdown that `rpc_ladder.py` prints: the ladder, where its time goes, the machine's limits, and the claims."""

from __future__ import annotations

from typing import Any

from common import significant, table
from rpc_client import IN_PROCESS, PHASES
from rpc_musts import is_whole

NO_CLAIM = "no confidentiality claim"

# The way of the arrays, there and back.
MOVING = ("serialize", "send", "receive", "deserialize")

# A number of the ring is multiplied as so many limbs.
LIMBS = 4


def report(result: dict[str, Any]) -> str:
    """All of it."""
    device = result["device"]["kind"]
    head = (
        f"## {result['ckpt']}, {layers(result['layers'])}, random weights, a prompt of {result['seq']} tokens,"
        f" {device}, {result['repetitions']} repetitions"
    )
    parts = [head, _ladder(result), _breakdown(result), _explanation(), _limits(result), _decode(result)]
    parts += [_pads(result), _verdicts(result), _claims(result)]
    parts += [f"Left out: {why}" for why in result["left_out"].values()]
    return "\n\n".join(part for part in parts if part)


def title(row: dict[str, Any]) -> str:
    """The rung's name, marked where it was not measured on all layers."""
    return row["title"] + (f" [scaled from {layers(row['scaled_from_layers'])}]" if row["scaled_from_layers"] else "")


def layers(count: int) -> str:
    """So many of them, in words."""
    return f"{count} layer" + ("s" if count > 1 else "")


def claims_nothing(row: dict[str, Any]) -> bool:
    """Whether the rung shows the device what it should hide."""
    return row["claim"] is None or row["claim"].startswith(NO_CLAIM)


def _milliseconds(spread: Any) -> str:
    return significant(1e3 * spread.median)


def _spread(spread: Any) -> str:
    return f"{_milliseconds(spread)} ± {significant(1e3 * spread.iqr / 2)}"


def _ladder(result: dict[str, Any]) -> str:
    columns = ["rung", "latency ms", "offline ms", "calls", "MB there", "MB back", "arithmetic ms", "overhead ms"]
    columns += ["of (a)'s", "faster than (a)", "than (b)", "logits apart"]
    lines = []
    for row in result["rows"]:
        bytes_ = [_megabytes(row[name].median) for name in ("sent", "received")]
        share = row["overhead_share"].get("a")
        faster = [row["speedup"].get(other) for other in ("a", "b")]
        lines.append(
            [
                title(row),
                _spread(row["latency"]),
                _milliseconds(row["offline"]) if "offline" in row else "-",
                f"{row['calls'].median:.0f}",
                *bytes_,
                _spread(row["arithmetic"]),
                _spread(row["overhead"]),
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


def _explanation() -> str:
    return (
        "Medians over the repetitions ± half the distance between the quartiles. `offline`: what the pads of the prompt"
        " took, before it came.\n`arithmetic` are the rung's own products, attention, norms and activations alone, by"
        " the same kernels on the same shapes,\nwhere nothing travels: the mean of one run right before the rung and"
        " one right after. `overhead` is the latency without them;\nbelow zero it is lost in how much they vary, or one"
        " program beat the parts one by one. `send` lasts until the server has all\nof a request, `receive` until the"
        " client has all of a reply; `copy` is between the server's memory and its device; `trusted`\nis the trusted"
        " side's own work; `crossings` are a policy's, with their products. `logits apart`: the distance to the first\n"
        "rung's, over their length."
    )


def _limits(result: dict[str, Any]) -> str:
    """What no rung can go below here: each weight read once, each operation done once, what crosses copied once."""
    limits = result["limits"]
    lines = []
    for row in result["rows"]:
        kind = "integer_operations_per_second" if row["integers"] else "operations_per_second"
        operations = result["operations"] * (LIMBS if row["integers"] else 1) / limits[kind]
        read = (result["weights"] if row["integers"] else result["weight_bytes"]) / limits["read_rate"]
        copied = (row["sent"].median + row["received"].median) / limits["copy_rate"]
        least = max(operations, read) + copied
        parts = [significant(1e3 * seconds) for seconds in (operations, read, copied, least)]
        lines.append([title(row), *parts, f"{significant(row['latency'].median / least)} x"])
    columns = ["limits, ms", "operations", "weights read", "bytes copied", "at least", "latency is"]
    note = (
        f"Measured in this run, the best of all repetitions: {significant(limits['operations_per_second'] / 1e9)}"
        f" GFLOP/s ({limits['by']}) and {significant(limits['integer_operations_per_second'] / 1e9)} G operations/s of"
        f" int8\n({limits['integers_by']}) in products of {limits['size']} cubed,"
        f" {significant(limits['read_rate'] / 1e9)} GB/s read from the device's memory,"
        f" {significant(limits['copy_rate'] / 1e9)} GB/s copied by one thread. The prompt\nneeds"
        f" {significant(result['operations'] / 1e9)} GFLOP and {significant(result['weight_bytes'] / 1e9)} GB of"
        " weights; products over the ring four times the operations and a byte a weight. `at least` is\nthe larger of"
        " the first two, and the third."
    )
    return f"{table(columns, lines)}\n\n{note}"


def _decode(result: dict[str, Any]) -> str:
    if not result["decode"]:
        return ""
    titles = {row["name"]: row["title"] for row in result["rows"]}
    lines = [
        [
            titles[name],
            _spread(own["latency"]),
            _milliseconds(own["offline"]) if "offline" in own else "-",
            f"{own['calls'].median:g}",
        ]
        for name, own in result["decode"].items()
    ]
    return table(["decode, a token", "ms", "offline ms", "crossings"], lines)


def _pads(result: dict[str, Any]) -> str:
    lines = [
        f"{row['name']}: the pads of this prompt took {significant(row['offline'].median)} s beforehand, are"
        f" {significant(row['pad_bytes'].median / 1e6)} MB, and came at"
        f" {significant(result['seq'] / row['offline'].median)} tokens/s."
        for row in result["rows"]
        if "offline" in row
    ]
    late = [
        f"{row['name']}: rows of pads were made while the prompt waited, and its latency has them: the pool was short."
        for row in result["rows"]
        if row.get("made_meanwhile") and row["made_meanwhile"].median > 0
    ]
    return "\n".join([*lines, *late, "A pad buys latency, not throughput."]) if lines else ""


def _verdicts(result: dict[str, Any]) -> str:
    lines = []
    for one in result["verdicts"]:
        verdict = "yes" if one["always"] else "by the median" if one["passed"] else "NO"
        lines.append([one["must"], one["found"], one["worst"], verdict])
    if not lines:
        return ""
    text = table(["must", "found", "at worst", "holds"], lines)
    notes = []
    if not is_whole(result):
        notes.append(
            f"The musts are of all {layers(result['all_layers'])}, on an accelerator with 1,024 tokens: this run is of"
            " less, and decides nothing."
        )
    notes += [
        f"({row['name']}) was measured on {layers(row['scaled_from_layers'])} and scaled."
        for row in result["rows"]
        if row["scaled_from_layers"]
    ]
    return "\n\n".join([text, *([" ".join(notes)] if notes else [])])


def _claims(result: dict[str, Any]) -> str:
    clear = [row["name"] for row in result["rows"] if claims_nothing(row)]
    claims = [f"{row['name']} claims: {row['claim']}." for row in result["rows"] if not claims_nothing(row)]
    return "\n".join([f"{NO_CLAIM}: {', '.join(clear)} show the device all activations in the clear.", *claims])
