"""The tables by which kernels cut their work, varied one number at a time: the part `tables` of `gpu.py`.

A table is whatever a module of `fusedllm.kernels` named after a lowering holds as an upper-case tuple of dataclasses. A
number of a row is doubled and halved (stages: one more, one less), and the cases of `gpu_kernels.py` whose program that
changes are timed. What is faster is to be put into the table by hand; a variant that does not compile, or gives other
numbers, is told.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any

import numpy as np
from gpu_kernels import Case, in_turn, lowered, timed
from gpu_part import Clock, Part, compile_together, copies, on_gpu, reason

# Those whose cases are varied; a module that names none of them is tried with the cases of products.
OPERATIONS = ("attention", "linear", "ring_linear")
PRODUCTS = ("linear", "norm_linear", "norm_swiglu")
# By which a row is chosen.
KEYS = ("up_to", "width")
# If the first so many variants of a row change nothing of a program, it is not the program's row.
UNUSED = 3

LOWERINGS = ("triton", "mosaic")
# Of a relative distance: partial sums are added in another order.
TOLERANCE = 2e-2


@dataclasses.dataclass(frozen=True)
class Table:
    """The table `name` of `module`, whose kernels are of the way `lowering` to a GPU."""

    module: Any
    name: str
    lowering: str

    @property
    def rows(self) -> tuple[Any, ...]:
        """As it is now."""
        return getattr(self.module, self.name)

    @property
    def operations(self) -> tuple[str, ...]:
        """Whose kernels they are: by the module's name, the longest that is in it."""
        name = self.title.partition(".")[0]
        own = max((each for each in OPERATIONS if each in name), key=len, default="")
        return (own, "cached_attention") if own == "attention" else (own,) if own else PRODUCTS

    @property
    def title(self) -> str:
        """Where it is."""
        return f"{self.module.__name__.rpartition('.')[2]}.{self.name}"


def tables() -> list[Table]:
    """Every table that there is, by looking."""
    import fusedllm.kernels

    found = []
    for info in pkgutil.iter_modules(fusedllm.kernels.__path__):
        lowering = next((name for name in LOWERINGS if info.name.endswith(f"_{name}")), None)
        if lowering is None:
            continue
        module = importlib.import_module(f"fusedllm.kernels.{info.name}")
        for name, value in vars(module).items():
            rows = isinstance(value, tuple) and value and all(map(dataclasses.is_dataclass, value))
            if name.isupper() and rows and type(value[0]).__module__ == module.__name__:
                found.append(Table(module, name, lowering))
    return found


def variants(row: Any) -> Iterator[tuple[str, Any]]:
    """`row` with one number changed, or all of one tuple, and how."""
    for each in dataclasses.fields(row):
        value = getattr(row, each.name)
        numbers = value if isinstance(value, tuple) else (value,)
        if each.name in KEYS or not all(type(number) is int and number > 0 for number in numbers) or not numbers:
            continue
        if each.name == "stages":
            others = [tuple(number + by for number in numbers) for by in (1, -1)]
        else:
            others = [tuple(2 * number for number in numbers), tuple(number // 2 for number in numbers)]
        for other in others:
            if min(other) > 0:
                changed = other if isinstance(value, tuple) else other[0]
                yield f"{each.name} {value} -> {changed}", dataclasses.replace(row, **{each.name: changed})


@contextlib.contextmanager
def replaced(table: Table, at: int, row: Any) -> Iterator[None]:
    """Inside, row `at` of the table is `row`, and what the table's module compiled before is not taken again."""
    before = dict(vars(table.module))
    rows = table.rows
    try:
        setattr(table.module, table.name, (*rows[:at], row, *rows[at + 1 :]))
        for name, value in before.items():
            # A compiled function remembers what it was traced to; its plain form is traced anew.
            if callable(value) and hasattr(value, "lower") and hasattr(value, "__wrapped__"):
                setattr(table.module, name, value.__wrapped__)
        yield
    finally:
        for name, value in before.items():
            setattr(table.module, name, value)


def tables_part(part: Part) -> None:
    """Every row of every table; the best of each case is printed last."""
    for table in tables():
        part.put("tables", [*part.found.get("tables", []), table.title])
        print(f"  {table.title}: {len(table.rows)} rows", flush=True)
    if not on_gpu():
        part.skip("all variants", "there is no GPU to time them on")
        return
    clock = Clock()
    # Mosaic's are last: a kernel that is wrong may hang, and the part is killed.
    for lowering in LOWERINGS:
        own = [table for table in tables() if table.lowering == lowering]
        for case in in_turn(part):
            for table in own:
                if case.operation in table.operations and part.left() > 0:
                    name = f"{table.title}, {case.operation}, {case.name}"
                    part.attempt(name, functools.partial(_vary, part, clock, case, table))
    for row in best(part.found.get("rows", [])):
        print(f"  best: {row['case']}, {row['table']}: {row['variant']} ({row['ratio']:.2f} of the table's time)")


def _vary(part: Part, clock: Clock, case: Case, table: Table) -> None:
    """Times the variants that change the case's program, compiled together; none where another table's kernel runs."""
    what = {"table": table.title, "case": f"{case.operation}, {case.name}"}
    operands = case.make(0)
    with replaced(table, 0, table.rows[0]):  # As the variants are: traced without what is remembered.
        usual = lowered(case, table.lowering, operands)
    text = usual.as_text()
    used = [(at, *one) for at in range(len(table.rows)) for one in _used(part, case, table, at, operands, text)]
    if not used:
        return
    base, *others = compile_together([usual, *(program for _, _, program in used)])
    sets = copies(case.make, part.scale, most=16)
    right, usually = _numbers(base(*operands)), timed(clock, base, sets, part.scale.repetitions).spread().median
    for (at, change, _), program in zip(used, others, strict=True):
        name = f"{', '.join(what.values())}, {change}"
        if part.left() <= 0:
            part.skip(name, "no time was left")
            return
        if isinstance(program, Exception):
            part.skip(name, reason(program))
            continue
        apart = float(np.linalg.norm(_numbers(program(*operands)) - right) / np.linalg.norm(right))
        if not apart <= TOLERANCE:
            part.skip(name, f"WRONG: {apart:.1e} from the table's own result")
            continue
        took = timed(clock, program, sets, part.scale.repetitions).spread().median
        part.row(**what, row=at, variant=change, microseconds=1e6 * took, usual_microseconds=1e6 * usually,
                 ratio=took / usually)  # fmt: skip


def _used(part: Part, case: Case, table: Table, at: int, operands: Any, usual: str) -> Iterator[tuple[str, Any]]:
    """The variants of row `at` that change the case's program, lowered; none where it is another row's."""
    same = 0
    variants_of_row = list(variants(table.rows[at]))
    for change, other in variants_of_row:
        with replaced(table, at, other):
            try:
                program = lowered(case, table.lowering, operands)
            except Exception as error:
                part.skip(f"{table.title}, {case.operation}, {case.name}, {change}", reason(error))
                continue
        if program.as_text() != usual:
            same = -len(variants_of_row)
            yield change, program
            continue
        same += 1
        if same == UNUSED:
            return


def _numbers(result: Any) -> Any:
    import jax

    return np.concatenate([np.asarray(leaf, np.float64).reshape(-1) for leaf in jax.tree.leaves(result)])


def best(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each case and row of a table the fastest variant that is faster than the table."""
    fastest: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        key = (row["table"], row["case"])
        if row["ratio"] < min(1.0, fastest.get(key, {"ratio": 1.0})["ratio"]):
            fastest[key] = row
    return list(fastest.values())
