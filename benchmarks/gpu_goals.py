"""What is asked of a GPU: each goal with what was hoped for, what a run of `gpu.py` measured, and whether it held."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Kernels' goals are of one chip; elsewhere they are told and not judged.
CHIP = "H200"


@dataclass(frozen=True)
class Goal:
    """`measure` takes the parts' figures; what it can't find there raises `KeyError`."""

    name: str
    unit: str
    wanted: float
    hoped: float | None
    measure: Callable[[dict[str, Any]], float]
    at_most: bool = False
    everywhere: bool = True

    def holds(self, found: float) -> bool:
        """Whether it does."""
        return found <= self.wanted if self.at_most else found >= self.wanted


def median(value: Any) -> float:
    """Of a spread as it was written, or the number itself."""
    return float(value["median"] if isinstance(value, dict) else value)


def row(parts: dict[str, Any], part: str, **wanted: Any) -> dict[str, Any]:
    """The first row of a part with these columns.

    Raises:
      KeyError: there is none.
    """
    for each in parts.get(part, {}).get("rows", []):
        if all(each.get(name) == value for name, value in wanted.items()):
            return each
    raise KeyError(f"{part} has no row {wanted}")


def _tests(parts: dict[str, Any]) -> float:
    counts = parts["tests"]["counts"]
    return float(counts.get("failed", 0) + counts.get("error", 0) + (0 if parts["tests"]["passed"] else 1))


def _prefill(parts: dict[str, Any]) -> float:
    return 1e3 * median(row(parts, "prefill", tokens=1024)["seconds"])


def _decode(parts: dict[str, Any]) -> float:
    return median(row(parts, "decode", context=128, batch=1)["tokens_per_second"])


def _ratio(scheme: str) -> Callable[[dict[str, Any]], float]:
    return lambda parts: median(row(parts, "quantized", weights=scheme)["decode_ratio"])


def _arrow(parts: dict[str, Any]) -> float:
    ceilings = parts["ceilings"]
    link = max(median(ceilings[name]) for name in ("to_device", "to_device_pinned") if name in ceilings)
    return median(parts["arrow"]["bytes_per_second"]) / link


def _quantize(parts: dict[str, Any]) -> float:
    return min(
        row(parts, "quantize", operation="quantize", scheme=scheme)["of_copy"] for scheme in ("int8", "int4-g64")
    )


def _masked(parts: dict[str, Any]) -> float:
    """A masked prompt's time beside that of its bytes on the link and the trusted side's own work."""
    found, ceilings = row(parts, "policies", policy="masked"), parts["ceilings"]
    link = {name: median(ceilings[name]) for name in ("to_device", "to_host")}
    moved = median(found["sent"]) / link["to_device"] + median(found["received"]) / link["to_host"]
    return median(found["latency"]) / (moved + median(found["trusted"]))


def _peer(what: str, kind: str) -> Callable[[dict[str, Any]], float]:
    def measure(parts: dict[str, Any]) -> float:
        theirs = median(row(parts, "peers", kind=kind, what=what)["seconds"])
        if what == "decode":
            return theirs / median(row(parts, "decode", context=128, batch=1)["step_seconds"])
        return theirs / median(row(parts, "prefill", tokens=1024)["seconds"])

    return measure


def _ladder(parts: dict[str, Any]) -> float:
    return median(row(parts, "ladder", rung="plain")["faster_than_b"])


GOALS = (
    Goal("kernels' tests that failed", "", 0, None, _tests, at_most=True),
    Goal("prefill of 1,024 tokens", "ms", 5.0, 3.5, _prefill, at_most=True, everywhere=False),
    Goal("decode at batch 1", "tokens/s", 1200, 1500, _decode, everywhere=False),
    Goal("int8 decode, of bfloat16's", "x", 1.4, 1.8, _ratio("int8")),
    Goal("int4 decode, of bfloat16's", "x", 1.6, 2.2, _ratio("int4-g64")),
    Goal("Arrow file to device, of the link", "x", 0.5, None, _arrow),
    Goal("quantizing, of a copy's bandwidth", "x", 0.5, None, _quantize),
    Goal("masked prefill, of its transfers and trusted work", "x", 1.5, None, _masked, at_most=True),
    Goal("decode, of transformers eager", "x", 1.0, None, _peer("decode", "eager")),
    Goal("decode, of transformers compiled", "x", 1.0, None, _peer("decode", "compiled")),
    Goal("prefill of 1,024, of transformers eager", "x", 1.0, None, _peer("prefill", "eager")),
    Goal("prefill of 1,024, of transformers compiled", "x", 1.0, None, _peer("prefill", "compiled")),
    Goal("`plain`, of the predecessor's bytes by RPC (b)", "x", 33, None, _ladder),
)


def verdicts(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Every goal with what was found."""
    parts = result["parts"]
    kind = str(parts.get("environment", {}).get("device", {}).get("kind", ""))
    found = []
    for goal in GOALS:
        line: dict[str, Any] = {"goal": goal.name, "unit": goal.unit, "wanted": goal.wanted, "hoped": goal.hoped}
        line["at_most"] = goal.at_most
        try:
            line["measured"] = goal.measure(parts)
        except (KeyError, TypeError, ValueError, ZeroDivisionError):
            line |= {"measured": None, "verdict": "not measured"}
        else:
            judged = not result["tiny"] and (goal.everywhere or CHIP in kind)
            line["verdict"] = ("held" if goal.holds(line["measured"]) else "MISSED") if judged else "not judged here"
        found.append(line)
    return found
