"""The least that each operation of a model can take: bytes over a chip's bandwidth, operations over its rate.

    python benchmarks/gpu_floors.py
    python benchmarks/gpu_floors.py --chip a100 --ckpt llama-1b --prefill 1024 --context 128

Bytes are those of an operation alone: each weight, number of the cache, and activation read once, each result written
once, in two bytes. For a whole model only weights and cache count: an ideal program would leave activations on the
chip. Nothing here was measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import decode_bytes, prefill_operations, significant, sizes, table

ITEMSIZE = 2


@dataclass(frozen=True)
class Chip:
    """What its data sheet says, of the dense rates: bytes and operations a second."""

    title: str
    bandwidth: float
    bfloat16: float
    int8: float


# NVIDIA's data sheets: "H200 Tensor Core GPU" (SXM; sparse rates are twice these) and "A100 80GB" (SXM).
CHIPS = {
    "h200": Chip("H200", 4.8e12, 989e12, 1979e12),
    "a100": Chip("A100 80 GB", 2.039e12, 312e12, 624e12),
}


@dataclass(frozen=True)
class Need:
    """The fewest bytes of one operation, and its floating-point operations."""

    name: str
    bytes: float
    operations: float

    def floor(self, chip: Chip) -> float:
        """Seconds."""
        return max(self.bytes / chip.bandwidth, self.operations / chip.bfloat16)

    def bound(self, chip: Chip) -> str:
        """By what."""
        return "bytes" if self.bytes / chip.bandwidth >= self.operations / chip.bfloat16 else "operations"


def layer(model: dict[str, Any], tokens: int, start: int, batch: int = 1) -> Iterator[Need]:
    """The operations of a decoder layer, for `tokens` new positions of each of `batch` requests at `start`."""
    hidden, wide = model["hidden_size"], model["intermediate_size"]
    q, kv = model["num_heads"] * model["head_dim"], 2 * model["num_kv_heads"] * model["head_dim"]
    rows = batch * tokens

    def product(name: str, width: int, out: int) -> Need:
        return Need(name, ITEMSIZE * (width * out + rows * (width + out)), 2.0 * rows * width * out)

    def each(name: str, numbers: float, operations: float) -> Need:
        return Need(name, ITEMSIZE * rows * numbers, rows * operations)

    yield each("norm before attention", 2 * hidden, 4 * hidden)
    yield product("q, k and v", hidden, q + kv)
    # Rotated q, k and v come in; k and v of all positions are read, those of the new ones written before.
    keys = batch * (start + tokens) * kv
    pairs = tokens * start + tokens * (tokens + 1) / 2
    yield Need("rotation, cache and attention", ITEMSIZE * (rows * (2 * q + 2 * kv) + keys), 4.0 * batch * pairs * q)
    yield product("o", q, hidden)
    yield each("residual and norm", 4 * hidden, 5 * hidden)
    yield product("gate and up", hidden, 2 * wide)
    yield each("activation", 3 * wide, 5 * wide)
    yield product("down", wide, hidden)
    yield each("residual", 3 * hidden, hidden)


def head(model: dict[str, Any], batch: int = 1) -> Need:
    """The vocabulary product of one token of each request."""
    hidden, vocab = model["hidden_size"], model["vocab_size"]
    return Need("head", ITEMSIZE * (vocab * hidden + batch * (vocab + hidden)), 2.0 * batch * vocab * hidden)


def whole(model: dict[str, Any], tokens: int, start: int, batch: int = 1) -> Need:
    """All of a decode step (one token) or of a prompt: weights and cache once, and every product."""
    if tokens == 1:
        parts = [*layer(model, 1, start, batch)] * model["num_layers"] + [head(model, batch)]
        operations = sum(part.operations for part in parts)
        return Need("whole decode step", decode_bytes(model, start, ITEMSIZE, batch), operations)
    kv = 2 * model["num_layers"] * model["num_kv_heads"] * model["head_dim"] * tokens
    moved = decode_bytes(model, 0, ITEMSIZE) + ITEMSIZE * kv
    return Need("whole prompt", moved, prefill_operations(model, tokens))


def report(model: dict[str, Any], chip: Chip, prefill: int, context: int, measured: str = "not yet") -> str:
    """The two tables."""
    texts = []
    for title, tokens, start in (
        (f"One decode step at context {context}, batch 1", 1, context),
        (f"A prompt of {prefill:,} tokens", prefill, 0),
    ):
        count = model["num_layers"]
        needs = [*layer(model, tokens, start)]
        lines = [_line(f"{need.name}, a layer", need, chip, measured) for need in needs]
        total = Need("", sum(need.bytes for need in needs), sum(need.operations for need in needs))
        floors = sum(need.floor(chip) for need in needs)
        lines.append([f"the {len(needs)} of a layer, each alone", significant(total.bytes / 1e6),
                      significant(total.operations / 1e9), significant(1e6 * floors), "", measured])  # fmt: skip
        last = head(model)
        lines.append(_line("head", last, chip, measured))
        alone = count * floors + last.floor(chip)
        lines.append([f"{count} layers and the head, each alone", significant((count * total.bytes + last.bytes) / 1e6),
                      significant((count * total.operations + last.operations) / 1e9),
                      significant(1e6 * alone), "", measured])  # fmt: skip
        need = whole(model, tokens, start)
        lines.append(_line(f"**{need.name}**", need, chip, measured))
        columns = [title, "MB", "GFLOP", f"floor µs, {chip.title}", "bound by", "measured"]
        texts.append(table(columns, lines))
    return "\n\n".join(texts)


def _line(name: str, need: Need, chip: Chip, measured: str) -> list[str]:
    return [
        name,
        significant(need.bytes / 1e6),
        significant(need.operations / 1e9),
        significant(1e6 * need.floor(chip)),
        need.bound(chip),
        measured,
    ]


def main() -> None:
    """The command."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from fusedllm.weights.registry import architecture

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", default="llama-1b")
    parser.add_argument("--chip", default="h200", choices=list(CHIPS))
    parser.add_argument("--prefill", type=int, default=1024)
    parser.add_argument("--context", type=int, default=128)
    arguments = parser.parse_args()
    model = sizes(architecture(arguments.ckpt))
    print(report(model, CHIPS[arguments.chip], arguments.prefill, arguments.context))


if __name__ == "__main__":
    main()
