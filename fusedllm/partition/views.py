"""What a device sees, read off the programs that run on it: the check that a policy's declared view holds.

Whoever runs the device sees every operand of every operation there. So a program's view is what its parameters are
labelled as, wherever an operation or a result uses them (`leaks`), and the compiled program must have these parameters
and no others, on the device that it is said to run on (`check_compiled`). That nothing reaches the device except as a
parameter of these programs is for JAX's transfer guard to see, at run time (`hosted.py`); that what is labelled
`MASKED` is so, for the simulator in the tests: two prompts with suitable pads give the same bytes.
"""

from __future__ import annotations

import enum
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from fusedllm.errors import BoundaryError


class Label(enum.Enum):
    """What an operand of a device program is."""

    WEIGHTS = "weights"
    LENGTHS = "lengths and places"
    MASKED = "integers that are uniform over the ring"
    PROMPT = "prompt"
    ACTIVATIONS = "activations"
    KV_CACHE = "KV cache"
    OUTPUT = "output"
    UNDECLARED = "what nobody declared"


# What every policy shows: weights are public, and lengths leak.
PUBLIC = frozenset({Label.WEIGHTS, Label.LENGTHS, Label.MASKED})

# Primitives by which a program reaches the host or another device.
_REACHES_OUT = re.compile("callback|infeed|outfeed|send|recv|^device_put$")

# As the compiled program says it: `(f32[2,3]{1,0}, s8[4]{0})->...`.
_LAYOUT = re.compile(r"entry_computation_layout=\{\((?P<parameters>.*?)\)->")
_PARAMETER = re.compile(r"(?P<dtype>[a-z][a-z0-9]*)\[(?P<shape>[\d,]*)\]")


class Asked(NamedTuple):
    """What a program asks the host for: the name of the call, what it gets, and how often."""

    call: str
    label: Label
    times: int


@dataclass(frozen=True, slots=True)
class DeviceProgram:
    """A program that runs on the device.

    Attributes:
      name: for people.
      function: what `jax.jit` has made.
      operands: pytrees of arrays, or of their shapes.
      labels: of each operand, all of its leaves.
      device: on which it runs.
      asked: what the program asks the host for while it runs.
      captured: the label of arrays that are part of the program.
    """

    name: str
    function: Any
    operands: tuple[Any, ...]
    labels: tuple[Label, ...]
    device: jax.Device
    asked: tuple[Asked, ...] = ()
    captured: Label = Label.UNDECLARED


def leaks(program: DeviceProgram) -> dict[Label, str]:
    """The secrets that operations of a program see, each with the first operation that does.

    Raises:
      ValueError: there are not as many labels as operands.
    """
    labels = _labels_of_leaves(program)
    traced = program.function.trace(*program.operands).jaxpr
    jaxpr = traced.jaxpr
    seen: dict[Label, str] = {}
    by_variable = dict(zip(map(id, jaxpr.invars), labels, strict=True))
    # What was captured is an operand that no call names.
    by_variable |= {id(variable): program.captured for variable in jaxpr.constvars}
    for equation in jaxpr.eqns:
        for variable in equation.invars:
            if id(variable) in by_variable:
                seen.setdefault(by_variable[id(variable)], str(equation.primitive))
    for variable in jaxpr.outvars:
        if id(variable) in by_variable:
            seen.setdefault(by_variable[id(variable)], "the result")
    asked = {one.call: one for one in program.asked}
    made = Counter(target for _, target in _calls(jaxpr))
    for primitive, target in _calls(jaxpr):
        if target in asked and made[target] == asked[target].times:
            seen.setdefault(asked[target].label, target)
        elif target in asked or _REACHES_OUT.search(primitive):
            seen.setdefault(Label.UNDECLARED, primitive)
    return {label: where for label, where in seen.items() if label not in PUBLIC}


def check_compiled(program: DeviceProgram) -> None:
    """Compares the parameters of the compiled program, one by one, with what was declared.

    Raises:
      BoundaryError: it has another one, or runs elsewhere.
    """
    compiled = program.function.lower(*program.operands).compile()
    found = [(dtype, shape) for dtype, shape in _parameters(compiled.as_text())]
    declared = [(_hlo_dtype(leaf.dtype), tuple(leaf.shape)) for leaf in jax.tree.leaves(program.operands)]
    for index, pair in enumerate(found):
        if pair not in declared:
            raise BoundaryError(
                f"{program.name}: the compiled program's parameter {index} is {_words(pair)}, which nobody declared."
            )
        declared.remove(pair)
    places = {device for sharding in jax.tree.leaves(compiled.input_shardings) for device in sharding.device_set}
    if places - {program.device}:
        raise BoundaryError(f"{program.name} takes operands on {places}, and is said to run on {program.device}.")


def view(programs: Iterator[DeviceProgram] | list[DeviceProgram]) -> frozenset[Label]:
    """The secrets that a device sees which runs all of `programs`; each is checked as it was compiled, too.

    Raises:
      BoundaryError: as `check_compiled`.
    """
    found: set[Label] = set()
    for program in programs:
        check_compiled(program)
        found |= set(leaks(program))
    return frozenset(found)


def _labels_of_leaves(program: DeviceProgram) -> list[Label]:
    if len(program.labels) != len(program.operands):
        raise ValueError(
            f"{program.name} has {len(program.operands)} operands, and {len(program.labels)} labels were given."
        )
    return [
        label for operand, label in zip(program.operands, program.labels, strict=True) for _ in jax.tree.leaves(operand)
    ]


def _calls(jaxpr: Any) -> Iterator[tuple[str, str]]:
    """Each primitive of a program, the inner ones too, with the name of what it calls."""
    for equation in jaxpr.eqns:
        parameters = equation.params
        yield str(equation.primitive), str(parameters.get("target_name", equation.primitive))
        for value in jax.tree.leaves(parameters, is_leaf=lambda leaf: hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _calls(inner)


def _parameters(text: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    layout = _LAYOUT.search(text)
    if layout is None:
        raise BoundaryError("a compiled program does not say what its parameters are; it can't be checked.")
    for parameter in _PARAMETER.finditer(layout["parameters"]):
        # What keeps callbacks in order has no bits.
        if parameter["dtype"] == "token":
            continue
        yield parameter["dtype"], tuple(int(size) for size in parameter["shape"].split(",") if size)


_HLO_DTYPES: dict[str, str] = {
    "bool": "pred", "bfloat16": "bf16", "float16": "f16", "float32": "f32", "float64": "f64",
    "float8_e4m3fn": "f8e4m3fn", "float8_e4m3": "f8e4m3",
}  # fmt: skip


def _hlo_dtype(dtype: Any) -> str:
    name = str(dtype)
    integer = re.fullmatch(r"(u?)int(\d+)", name)
    if integer:
        return ("u" if integer[1] else "s") + integer[2]
    return _HLO_DTYPES.get(name, name)


def _words(pair: tuple[str, tuple[int, ...]]) -> str:
    return f"{pair[0]}{list(pair[1])}"
