"""The picture of `rpc_ladder.py`: a waterfall of latencies, and what each of them is made of.

Its background is transparent and its ink a grey that shows on white and on black, for pages of either kind.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common import significant
from rpc_report import NO_CLAIM, claims_nothing, layers, title

# A contrast of more than 4 to 1 on white and on #0d1117 alike.
INK = "#7a7a7a"
BAR = "#3b82c4"
DROP = "#8fb3d1"
# Of what a rung's arithmetic takes alone: seen on its bar, and beside it.
MARK = "#e8912d"

# What a phase is, in the order of the ladder's improvements: encoding reds, transport ambers, copies, arithmetic.
COLORS = {
    "serialize": "#c0453b",
    "deserialize": "#e0796f",
    "send": "#c98a1b",
    "receive": "#e3b04b",
    "copy": "#8d6cc0",
    "trusted": "#2f9e77",
    "compute": "#3b82c4",
    "crossings": "#5f9fd6",
    "program": "#2b6299",
}
NAMES = {
    "copy": "host - device copy",
    "trusted": "trusted side's work",
    "compute": "products",
    "crossings": "crossings with products",
    "program": "one compiled program",
}
LEAST_LABELLED = 0.08  # Of a bar: narrower parts have no room for their share.


def plot(path: Path, result: dict[str, Any]) -> None:
    """Draws both panels into `path`, PNG or SVG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = result["rows"]
    ink = {"text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": INK}
    with pyplot.rc_context({**ink, "font.size": 10, "svg.hashsalt": "rpc_ladder"}):
        figure, (left, right) = pyplot.subplots(
            1, 2, figsize=(13, 0.52 * len(rows) + 2), layout="constrained", sharey=True, width_ratios=(6, 5)
        )
        _waterfall(left, rows)
        _shares(right, rows)
        handles, labels = (
            [*of_right, *of_left]
            for of_right, of_left in zip(
                right.get_legend_handles_labels(), left.get_legend_handles_labels(), strict=True
            )
        )
        figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, labelcolor=INK)
        figure.suptitle(_title(result))
        figure.savefig(path, dpi=150, transparent=True, bbox_inches="tight", pad_inches=0.15)
        pyplot.close(figure)
    print(f"wrote {path}")


def _title(result: dict[str, Any]) -> str:
    where = f"A prompt of {result['seq']} tokens, {result['ckpt']} with {layers(result['layers'])}"
    claiming = [row["name"] for row in result["rows"] if not claims_nothing(row)]
    clear = f"{NO_CLAIM}, but by {', '.join(claiming)}" if claiming else f"{NO_CLAIM}: activations in the clear"
    return f"{where}, {result['device']['kind']} ({clear})"


def _waterfall(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Latencies on a logarithmic axis, each bar hung where the one above it ends."""
    latencies = [1e3 * row["latency"].median for row in rows]
    floor = min(*latencies, *(1e3 * row["arithmetic"].median for row in rows)) / 2
    axes.set_xscale("log")
    axes.set_xlim(floor, max(latencies) * 6)
    for index, (row, latency) in enumerate(zip(rows, latencies, strict=True)):
        axes.barh(index, latency - floor, left=floor, height=0.62, color=BAR)
        if index and latencies[index - 1] > latency:
            axes.barh(index, latencies[index - 1] - latency, left=latency, height=0.62, color=DROP, alpha=0.45)
        end = max(latency, latencies[index - 1] if index else latency)
        ratio = row["speedup"].get("a")
        faster = f"   {significant(ratio.median)}x" if ratio and index else ""
        offline = f"   (pads: {_time(1e3 * row['offline'].median)} before)" if "offline" in row else ""
        axes.text(end * 1.12, index, f"{_time(latency)}{faster}{offline}", va="center")
        # A program may take less than its parts one by one.
        alone = 1e3 * row["arithmetic"].median
        label = None if index else "a rung's arithmetic alone"
        axes.plot([alone, alone], [index - 0.31, index + 0.31], color=MARK, linewidth=1.6, label=label)
        if index + 1 < len(rows):
            axes.plot([latency, latency], [index + 0.31, index + 0.69], color=INK, linewidth=0.8)
    axes.set_yticks(range(len(rows)), [title(row).replace(" [", "\n[") for row in rows])
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(lambda milliseconds, _: f"{milliseconds / 1e3:g} s")
    axes.xaxis.set_minor_formatter(lambda *_: "")
    axes.set_title("latency (logarithmic), and times as fast as (a)", color=INK)
    _bare(axes)


def _time(milliseconds: float) -> str:
    return f"{significant(milliseconds / 1e3)} s" if milliseconds >= 1000 else f"{significant(milliseconds)} ms"


def _shares(axes: Any, rows: list[dict[str, Any]]) -> None:
    """What each latency is made of, as parts of the whole."""
    named = set()
    for phase in COLORS:
        for index, row in enumerate(rows):
            spread = row["phases"].get(phase)
            if spread is None:
                continue
            whole = sum(part.median for part in row["phases"].values())
            before = [row["phases"][name].median for name in COLORS if name in row["phases"]]
            place = [name for name in COLORS if name in row["phases"]].index(phase)
            left, share = sum(before[:place]) / whole, spread.median / whole
            label = None if phase in named else NAMES.get(phase, phase)
            named.add(phase)
            axes.barh(index, 100 * share, left=100 * left, height=0.62, color=COLORS[phase], label=label)
            if share >= LEAST_LABELLED:
                axes.text(
                    100 * (left + share / 2), index, f"{100 * share:.0f}", color="white", ha="center", va="center"
                )
    axes.set_xlim(0, 100)
    axes.set_title("of which, %", color=INK)
    _bare(axes)


def _bare(axes: Any) -> None:
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
