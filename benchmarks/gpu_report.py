"""The words and pictures of a run of `gpu.py`: tables of the parts, the goals, a roofline, tokens a second by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common import significant, table
from gpu_goals import median, verdicts

# Of the kernels' table: those of the most time are where to look, and the whole is in the JSON.
MOST_SKIPPED = 12


def report(result: dict[str, Any]) -> str:
    """All of it. Goals are last: of a long output the end is what one sees."""
    parts = result["parts"]
    texts = [text for write in SECTIONS for text in _written(write, parts)]
    return "\n\n".join([*texts, _skipped(parts), _goals(result)])


def _written(write: Callable[[dict[str, Any]], str | None], parts: dict[str, Any]) -> Iterator[str]:
    """The section, if its figures are there. A report must not fail for a part that did."""
    try:
        text = write(parts)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        text = f"({write.__name__.strip('_')}: {type(error).__name__}: {error})"
    if text:
        yield text


def _goals(result: dict[str, Any]) -> str:
    lines = []
    for each in verdicts(result):
        sign = "<=" if each["at_most"] else ">="
        hoped = "-" if each["hoped"] is None else significant(float(each["hoped"]))
        found = "-" if each["measured"] is None else f"{significant(each['measured'])} {each['unit']}".strip()
        goal = f"{sign} {significant(float(each['wanted']))} {each['unit']}".strip()
        lines.append([each["goal"], goal, hoped, found, each["verdict"]])
    return "## Goals\n\n" + table(["goal", "asked", "moonshot", "measured", "verdict"], lines)


def _skipped(parts: dict[str, Any]) -> str:
    lines = [f"- {name}: {part['failed']}" for name, part in parts.items() if "failed" in part]
    for name, part in parts.items():
        # That an operation has no such implementation is no news.
        told = {what: why for what, why in part.get("skipped", {}).items() if "has no implementation" not in why}
        lines += [f"- {name}, {what}: {why}" for what, why in list(told.items())[:MOST_SKIPPED]]
        lines += [f"- {name}: and {len(told) - MOST_SKIPPED} more"] * (len(told) > MOST_SKIPPED)
    return "## Not measured\n\n" + ("\n".join(lines) or "Nothing was left out.")


def _device(parts: dict[str, Any]) -> str | None:
    found = parts.get("environment")
    if not found or "device" not in found:
        return None
    smi, versions = found.get("nvidia_smi", {}), found["environment"]["versions"]
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    state = ", ".join(f"{name} {smi[name]}" for name in ("driver_version", "clocks.sm", "power.draw") if name in smi)
    return f"# {found['device']['kind']}, {found['environment']['date']}\n\n{named}. {state}"


def _tests(parts: dict[str, Any]) -> str | None:
    tests = parts.get("tests", {})
    return f"Kernels' tests: {tests['counts']}, {tests['ended']}." if "counts" in tests else None


def _ceilings(parts: dict[str, Any]) -> str | None:
    found = parts.get("ceilings", {})
    units = {"launch": (1e6, "µs"), "launch_queued": (1e6, "µs")}
    units |= dict.fromkeys(("matmul", "matmul_int8", "matmul_fp8"), (1e-12, "TOP/s"))
    lines = []
    for name in ("copy", "read", "matmul", "matmul_int8", "matmul_fp8", "to_device", "to_device_pinned", "to_host",
                 "launch", "launch_queued"):  # fmt: skip
        if name in found:
            scale, unit = units.get(name, (1e-9, "GB/s"))
            lines.append([name, f"{significant(scale * median(found[name]))} {unit}"])
    return "## Ceilings\n\n" + table(["ceiling", "measured"], lines) if lines else None


def _limit(parts: dict[str, Any], name: str) -> float:
    return median(parts["ceilings"][name]) if name in parts.get("ceilings", {}) else float("nan")


def _decode(parts: dict[str, Any]) -> str | None:
    lines, limit = [], max(_limit(parts, "copy"), _limit(parts, "read"))
    for row in parts.get("decode", {}).get("rows", []):
        seconds = median(row["step_seconds"])
        lines.append(
            [
                f"{row['context']}, batch {row['batch']}",
                significant(median(row["tokens_per_second"])),
                significant(1e3 * seconds),
                significant(1e3 * row["bytes"] / limit),
                significant(row["bytes"] / seconds / 1e9),
                f"{100 * row['bytes'] / seconds / limit:.0f} %",
            ]
        )
    columns = ["decode at context", "tokens/s", "ms a step", "floor ms", "GB/s", "of the ceiling"]
    return "## Decode\n\n" + table(columns, lines) if lines else None


def _prefill(parts: dict[str, Any]) -> str | None:
    lines, limit = [], _limit(parts, "matmul")
    for row in parts.get("prefill", {}).get("rows", []):
        seconds, seen = median(row["seconds"]), row.get("generate_seconds")
        lines.append(
            [
                f"{row['tokens']:,}",
                significant(1e3 * seconds),
                significant(1e3 * median(seen)) if seen else "-",
                significant(1e3 * row["operations"] / limit),
                significant(row["operations"] / seconds / 1e12),
                f"{100 * row['operations'] / seconds / limit:.0f} %",
            ]
        )
    columns = ["prompt", "ms", "ms to the first token", "floor ms", "TFLOP/s", "of the ceiling"]
    return "## Prefill\n\n" + table(columns, lines) if lines else None


def _quantized(parts: dict[str, Any]) -> str | None:
    lines = [
        [
            row["weights"],
            significant(row["weight_bytes"] / 1e6),
            significant(row["tokens_per_second"]),
            significant(row["bytes_per_second"] / 1e9),
            significant(row.get("decode_ratio", float("nan"))),
            significant(1e3 * median(row["prompt_seconds"])),
            significant(row.get("prefill_ratio", float("nan"))),
        ]
        for row in parts.get("quantized", {}).get("rows", [])
    ]
    columns = ["weights", "MB", "tokens/s", "GB/s", "of plain", "prompt ms", "of plain"]
    return "## Quantized\n\n" + table(columns, lines) if lines else None


def _peers(parts: dict[str, Any]) -> str | None:
    lines = [
        [f"{row['kind']}, {row['what']} {row['tokens']}", significant(1e3 * median(row["seconds"]))]
        for row in parts.get("peers", {}).get("rows", [])
    ]
    return "## transformers\n\n" + table(["", "ms"], lines) if lines else None


def _kernels(parts: dict[str, Any]) -> str | None:
    """One line a case, its implementations side by side; the best one's share of its floor."""
    cases: dict[tuple[str, str], dict[str, Any]] = {}
    for row in (row for part in ("kernels", "mosaic") for row in parts.get(part, {}).get("rows", [])):
        cases.setdefault((row["operation"], row["case"]), {})[row["implementation"]] = row
    names = list(dict.fromkeys(name for rows in cases.values() for name in rows))
    bandwidth, rate = max(_limit(parts, "copy"), _limit(parts, "read")), _limit(parts, "matmul")
    lines = []
    for (operation, case), rows in cases.items():
        best = min(row["microseconds"] for row in rows.values())
        one = next(iter(rows.values()))
        floor = 1e6 * max(one["bytes"] / bandwidth, one["operations"] / rate)
        times = [
            significant(rows[name]["microseconds"]) + "*" * rows[name]["waited_for_the_host"] if name in rows else "-"
            for name in names
        ]
        lines.append([f"{operation}, {case}", *times, significant(floor), f"{100 * floor / best:.0f} %"])
    note = "\n\n`*`: the device waited for the host, so that it may take less."
    return "## Kernels, µs\n\n" + table(["", *names, "floor", "of it"], lines) + note if lines else None


def _quantize(parts: dict[str, Any]) -> str | None:
    lines = [
        [
            f"{row['operation']}, {row['scheme']}",
            significant(row["bytes_per_second"] / 1e9),
            f"{100 * row['of_copy']:.0f} %",
        ]
        for row in parts.get("quantize", {}).get("rows", [])
    ]
    return "## Quantizing\n\n" + table(["", "GB/s", "of a copy"], lines) if lines else None


def _others(parts: dict[str, Any]) -> str | None:
    """What is a line or two each."""
    texts = []
    if "bytes_per_second" in parts.get("arrow", {}):
        texts.append(f"Arrow to device: {significant(median(parts['arrow']['bytes_per_second']) / 1e9)} GB/s.")
    for row in parts.get("compile", {}).get("rows", []):
        texts.append(f"Compiling, {row['programs']}: {significant(row['compile_seconds'])} s.")
    for row in parts.get("crossings", {}).get("rows", []):
        texts.append(f"A crossing of {row['size']}, {row['form']}: {significant(row['microseconds'])} µs.")
    for row in parts.get("policies", {}).get("rows", []):
        token = f"a token {significant(1e3 * median(row['token_seconds']))} ms"
        texts.append(f"`{row['policy']}`: a prompt {significant(1e3 * median(row['latency']))} ms, {token}.")
    for row in parts.get("ladder", {}).get("rows", []):
        texts.append(f"Ladder, {row['rung']}: {significant(1e3 * row['latency'])} ms.")
    return "## Others\n\n" + "\n".join(texts) if texts else None


def _tables(parts: dict[str, Any]) -> str | None:
    from gpu_tables import best

    rows = best(parts.get("tables", {}).get("rows", []))
    lines = [[f"{row['table']}[{row['row']}], {row['case']}", row["variant"], f"{row['ratio']:.2f}"] for row in rows]
    return "## Tiles that were faster\n\n" + table(["", "change", "of its time"], lines) if lines else None


SECTIONS = (_device, _tests, _ceilings, _kernels, _tables, _others, _quantize, _peers, _quantized, _prefill, _decode)


def pictures(path: Path, result: dict[str, Any]) -> None:
    """The roofline with the operations' points, and tokens a second by batch, as PNG. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    parts = result["parts"]
    rows = parts.get("kernels", {}).get("rows", [])
    if rows and "ceilings" in parts:
        figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
        bandwidth, rate = _limit(parts, "copy"), _limit(parts, "matmul")
        span = [min(row["operations"] / row["bytes"] for row in rows) / 2, 4 * rate / bandwidth]
        line = sorted([*span, rate / bandwidth])
        axes.plot(line, [min(rate, bandwidth * each) / 1e12 for each in line], color="black", label="measured ceilings")
        for number, name in enumerate(dict.fromkeys(f"{row['operation']}, {row['implementation']}" for row in rows)):
            own = [row for row in rows if f"{row['operation']}, {row['implementation']}" == name]
            x = [row["operations"] / row["bytes"] for row in own]
            axes.scatter(x, [row["teraoperations_per_second"] for row in own], s=14, label=name, color=f"C{number}")
        axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="TFLOP/s")
        axes.legend(fontsize=7)
        figure.savefig(f"{path}-roofline.png", dpi=120)
        pyplot.close(figure)
    rows = parts.get("decode", {}).get("rows", [])
    if rows:
        figure, axes = pyplot.subplots(figsize=(7, 5), layout="constrained")
        for context in dict.fromkeys(row["context"] for row in rows):
            own = [row for row in rows if row["context"] == context]
            speeds = [median(row["tokens_per_second"]) for row in own]
            axes.plot([row["batch"] for row in own], speeds, marker="o", label=f"context {context}")
        axes.set(xscale="log", yscale="log", xlabel="batch", ylabel="tokens/s")
        axes.legend()
        figure.savefig(f"{path}-decode.png", dpi=120)
        pyplot.close(figure)
