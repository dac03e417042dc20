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

from gpu_kernels import Case, attention_cases, linear_cases, ring_cases, timed
from gpu_part import Clock, Part, copies, on_gpu, reason

# Those whose cases are varied.
OPERATIONS = ("attention", "linear", "ring_linear")
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
    def operation(self) -> str:
        """Whose kernels they are: by the module's name, the longest that is in it."""
        name = self.title.partition(".")[0]
        return max((each for each in OPERATIONS if each in name), key=len, default="")

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
    """`row` with one number changed, and how."""
    for each in dataclasses.fields(row):
        value = getattr(row, each.name)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0 or each.name.startswith("up_to"):
            continue
        others = (value + 1, value - 1) if each.name == "stages" else (2 * value, value // 2)
        for other in others:
            if other > 0:
                yield f"{each.name} {value} -> {other}", dataclasses.replace(row, **{each.name: other})


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
        for family in (attention_cases, linear_cases, ring_cases)
        for case in family(part)
        for table in tables()
        if table.operation == case.operation
    ]
    # They take turns, so that little time leaves none of them out.
    while pending and part.left() > 0:
        pending = [
            each for each in pending if part.left() > 0 and part.attempt("a case", lambda each=each: next(each, 0))
        ]
    for row in best(part.found.get("rows", [])):
        print(f"  best: {row['case']}, {row['table']}: {row['variant']} ({row['ratio']:.2f} of the table's time)")


def _vary(part: Part, clock: Clock, case: Case, table: Table) -> Iterator[bool]:
    """Times one variant at a time; ends where the implementation does not take the case."""
    import jax
    import numpy as np

    from fusedllm.errors import ImplementationError

    what = {"table": table.title, "case": f"{case.operation}, {case.name}"}
    operands = case.make(0)
    try:
        usual = lowered(case, table.lowering, operands)
    except ImplementationError as error:
        part.skip(", ".join(what.values()), reason(error))
        return
    sets = copies(case.make, part.scale, most=16)
    with replaced(table, 0, table.rows[0]):  # As the variants are: traced without what is remembered.
        base = timed(clock, case, table.lowering, sets, part.scale.repetitions).spread()
        right = _numbers(jax.jit(functools.partial(case.run, table.lowering))(*operands))
    yield True
    for at, row in enumerate(table.rows):
        same = 0
        for change, other in variants(row):
            try:
                with replaced(table, at, other):
                    if lowered(case, table.lowering, operands) == usual:
                        same += 1
                        if same == UNUSED:
                            break
                        continue
                    made = _numbers(jax.jit(functools.partial(case.run, table.lowering))(*operands))
                    apart = float(np.linalg.norm(made - right) / np.linalg.norm(right))
                    if not apart <= TOLERANCE:
                        part.skip(
                            f"{', '.join(what.values())}, {change}", f"WRONG: {apart:.1e} from the table's result"
                        )
                        continue
                    found = timed(clock, case, table.lowering, sets, part.scale.repetitions).spread()
            except Exception as error:
                part.skip(f"{', '.join(what.values())}, {change}", reason(error))
                continue
            ratio = found.median / base.median
            part.row(**what, row=at, variant=change, microseconds=1e6 * found.median,
                     usual_microseconds=1e6 * base.median, ratio=ratio)  # fmt: skip
            yield True


def _numbers(result: Any) -> Any:
    import jax
    import numpy as np

    return np.concatenate([np.asarray(leaf, np.float64).reshape(-1) for leaf in jax.tree.leaves(result)])


def best(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each case and row of a table the fastest variant that is faster than the table."""
    fastest: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        key = (row["table"], row["case"])
        if row["ratio"] < min(1.0, fastest.get(key, {"ratio": 1.0})["ratio"]):
            fastest[key] = row
    return list(fastest.values())
