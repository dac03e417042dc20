"""Reads what XLA says of a compiled program: how many kernels it launches, and what it copies."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

# Of an optimized program for a GPU these launch nothing.
FREE = frozenset(
    ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "after-all",
     "optimization-barrier", "partition-id", "replica-id", "copy-done", "async-done", "async-start", "async-update")
)  # fmt: skip
COPIES = frozenset(("copy", "copy-start"))

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\([^=]*?\)|\S+) ([\w\-]+)\(")
_CALLED = re.compile(r"(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_SHAPE = re.compile(r"([a-z]+\d*\w*)\[([\d,]*)\]")


@dataclass
class Instruction:
    """An instruction of a computation: what it is, of which shape, and which computations it runs as control flow."""

    name: str
    shape: str
    kind: str
    line: str

    def runs(self) -> list[str]:
        """The computations that it runs: those of a fusion are a kernel's own."""
        if self.kind not in ("while", "conditional", "call", "async-start"):
            return []
        branches = _BRANCHES.search(self.line)
        named = re.findall(r"%?([\w.\-]+)", branches.group(1)) if branches else []
        return [*_CALLED.findall(self.line), *named]

    @property
    def nbytes(self) -> int:
        """Of its first array."""
        found = _SHAPE.search(self.shape)
        if not found:
            return 0
        sizes = [int(size) for size in found.group(2).split(",") if size]
        return math.prod(sizes) * _itemsize(found.group(1))


@dataclass
class Count:
    """What one run of a computation launches, each loop in it once."""

    kernels: int = 0
    copies: list[int] = field(default_factory=list)

    def add(self, other: Count) -> None:
        """Both of them."""
        self.kernels += other.kernels
        self.copies += other.copies


class Program:
    """The text of an optimized program."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        current: list[Instruction] | None = None
        # Long tuples are numbered by comments.
        for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
            if opened := _COMPUTATION.match(line):
                current = self.computations[opened.group(2)] = []
                if opened.group(1):
                    self.entry = opened.group(2)
            elif line.startswith("}"):
                current = None
            elif current is not None and (found := _INSTRUCTION.match(line)):
                current.append(Instruction(*found.groups(), line=line))

    def count(self, computation: str | None = None) -> Count:
        """Of the program, or of one computation: of a loop's turns one, of branches all."""
        total = Count()
        for instruction in self.computations.get(computation or self.entry, []):
            for name in instruction.runs():
                total.add(self.count(name))
            if instruction.kind not in FREE:
                total.kernels += 1
            if instruction.kind in COPIES:
                total.copies.append(instruction.nbytes)
        return total

    def loops(self) -> Iterator[str]:
        """The bodies of the loops that the program itself runs."""
        for instruction in self.computations.get(self.entry, []):
            if instruction.kind == "while":
                yield from (name for name in instruction.runs() if name in self.computations)

    def largest_loop(self) -> Count:
        """One turn of the loop with most kernels: of a decode program a step."""
        counts = [self.count(name) for name in self.loops()]
        return max(counts, key=lambda count: count.kernels, default=Count())


def _itemsize(dtype: str) -> int:
    digits = re.search(r"\d+", dtype)
    return max(1, int(digits.group()) // 8) if digits else 1
