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
from gpu_kernels import Case, attention_cases, cached_cases, linear_cases, norm_cases, ring_cases, timed
from gpu_part import Clock, Part, copies, on_gpu, reason

# Those whose cases are varied; a module that names none of them is tried with the cases of products.
OPERATIONS = ("attention", "linear", "ring_linear")
PRODUCTS = ("linear", "norm_linear", "norm_swiglu")
# By which a row is chosen.
KEYS = ("up_to", "width")
# If so many variants of a row change nothing of a program, it is not the program's row.
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


def lowered(case: Case, implementation: str, operands: tuple[Any, ...]) -> str:
    """The case's program, not compiled."""
    import jax

    return jax.jit(functools.partial(case.run, implementation)).lower(*operands).as_text()


def tables_part(part: Part) -> None:
    """Every row of every table; the best of each case is printed last."""
    for table in tables():
        part.put("tables", [*part.found.get("tables", []), table.title])
        print(f"  {table.title}: {len(table.rows)} rows", flush=True)
    if not on_gpu():
        part.skip("all variants", "there is no GPU to time them on")
        return
    clock = Clock()
    pending = [
        _vary(part, clock, case, table)
        for family in (attention_cases, cached_cases, norm_cases, linear_cases, ring_cases)
        for case in family(part)
        for table in tables()
        if case.operation in table.operations
    ]
    # They take turns, so that little time leaves none of them out.
    while pending and part.left() > 0:
        pending = [
            each for each in pending if part.left() > 0 and part.attempt("a case", lambda each=each: next(each, 0))
        ]
    for row in best(part.found.get("rows", [])):
        print(f"  best: {row['case']}, {row['table']}: {row['variant']} ({row['ratio']:.2f} of the table's time)")


def _vary(part: Part, clock: Clock, case: Case, table: Table) -> Iterator[bool]:
    """Times one variant a turn; ends at once where the implementation does not take the case, or not by this table."""
    from fusedllm.errors import ImplementationError

    what = {"table": table.title, "case": f"{case.operation}, {case.name}"}
    try:
        operands = case.make(0)
        usual = lowered(case, table.lowering, operands)
        used = [change for at in range(len(table.rows)) for change in _used(case, table, at, operands, usual)]
        if not used:
            return
        sets = copies(case.make, part.scale, most=16)
        with replaced(table, 0, table.rows[0]):  # As the variants are: traced without what is remembered.
            right, base = _run(part, clock, case, table, sets)
    except Exception as error:
        # That there is no such implementation, or not of this, is no failure.
        prefix = "" if isinstance(error, ImplementationError) else "FAILED: "
        part.skip(", ".join(what.values()), prefix + reason(error))
        return
    for at, change, other in used:
        try:
            with replaced(table, at, other):
                made, took = _run(part, clock, case, table, sets)
        except Exception as error:
            part.skip(f"{', '.join(what.values())}, {change}", reason(error))
            continue
        apart = float(np.linalg.norm(made - right) / np.linalg.norm(right))
        if not apart <= TOLERANCE:
            part.skip(f"{', '.join(what.values())}, {change}", f"WRONG: {apart:.1e} from the table's own result")
            continue
        part.row(**what, row=at, variant=change, microseconds=1e6 * took, usual_microseconds=1e6 * base,
                 ratio=took / base)  # fmt: skip
        yield True


def _used(case: Case, table: Table, at: int, operands: Any, usual: str) -> Iterator[tuple[int, str, Any]]:
    """The variants of row `at` that change the case's program; none where it is another row's."""
    same = 0
    for change, other in variants(table.rows[at]):
        with replaced(table, at, other):
            try:
                changes = lowered(case, table.lowering, operands) != usual
            except Exception:  # Why is told where it is to be run.
                changes = True
        same += not changes
        if same == UNUSED:
            return
        if changes:
            yield at, change, other


def _run(part: Part, clock: Clock, case: Case, table: Table, sets: Any) -> tuple[Any, float]:
    """The case's numbers, and its seconds."""
    import jax

    made = jax.jit(functools.partial(case.run, table.lowering))(*sets[0])
    numbers = np.concatenate([np.asarray(leaf, np.float64).reshape(-1) for leaf in jax.tree.leaves(made)])
    return numbers, timed(clock, case, table.lowering, sets, part.scale.repetitions).spread().median


def best(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each case and row of a table the fastest variant that is faster than the table."""
    fastest: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        key = (row["table"], row["case"])
        if row["ratio"] < min(1.0, fastest.get(key, {"ratio": 1.0})["ratio"]):
            fastest[key] = row
    return list(fastest.values())
