"""The table of schemes that `fusedllm.quantize` knows, a row each, found by name; and recipes of several of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from fusedllm.errors import QuantizationError
from fusedllm.kernels.grouped import CODES_TOGETHER, GroupedScheme

GROUP_SIZES = (32, 64, 128)
BITS = range(3, 9)


def _grouped(bits: int, symmetric: bool) -> list[GroupedScheme]:
    # Eight bits are enough without zero points: their grid is finer than what a shifted one would win.
    suffix = "-sym" if symmetric and bits < 8 else ""
    return [GroupedScheme(f"int{bits}-g{size}{suffix}", bits, size, symmetric) for size in GROUP_SIZES]


SCHEMES: dict[str, GroupedScheme] = {
    scheme.name: scheme
    for scheme in (
        GroupedScheme("int8", 8),
        *_grouped(8, True),
        *_grouped(4, False),
        *_grouped(4, True),
        *_grouped(3, False),
        *_grouped(3, True),
        GroupedScheme("fp8", 8, codes="float8"),
        GroupedScheme("w8a8", 8, activation_bits=8),
        # Named after the Hadamard matrix, by which rows and activations are turned: a suffix, as the codes are w8a8's.
        GroupedScheme("w8a8-h", 8, activation_bits=8, turned=True),
    )
}


# A scheme, and rules for layers that take another. What q, k, v, gate, up and the head read can be turned once and for
# all, in the weights (`calibrate/rotate.py`). What o and down read is made by attention and by the gate, through which
# no matrix of that size can be moved, so that it is turned as the model runs.
RECIPES: dict[str, tuple[str, Mapping[str, str]]] = {
    "w8a8-turned": ("w8a8", {r"\b(self_attn\.o_proj|mlp\.down_proj)\.weight$": "w8a8-h"}),
}


def in_full(name: str, rules: Mapping[str, str] | None = None) -> tuple[str, Mapping[str, str] | None]:
    """The scheme and the rules that `name`, of a recipe or a scheme, stands for; `rules` come before the recipe's."""
    if not isinstance(name, str) or name not in RECIPES or not isinstance(rules, Mapping | None):
        return name, rules
    scheme, more = RECIPES[name]
    return scheme, dict(rules or {}) | {pattern: one for pattern, one in more.items() if pattern not in (rules or {})}


def turning(name: str, rules: Mapping[str, str] | None = None) -> str | None:
    """The first scheme of `name` and `rules` whose products turn their inputs, or `None`."""
    scheme, every = in_full(name, rules)
    named = (SCHEMES.get(one) for one in (scheme, *(every or {}).values()))
    return next((one.name for one in named if one is not None and one.turned), None)


def not_said(what: str, format: str) -> str:
    """Why `what`, a tensor or a scheme whose products turn their inputs, can't be written in `format`."""
    return (
        f"products with {what} turn their inputs as the model runs, which {format} has no way to say: write a table "
        "(.arrow, .parquet), convert with --dtype float32, or choose another scheme."
    )


def scheme_named(name: str | GroupedScheme) -> GroupedScheme:
    """The scheme of that name; a scheme is returned as it is.

    Raises:
      QuantizationError: there is none; the message lists them.
    """
    if isinstance(name, GroupedScheme):
        return name
    if isinstance(name, str) and name in RECIPES:
        scheme, rules = RECIPES[name]
        raise QuantizationError(
            f"{name} is a recipe for a whole model, where names tell layers apart; one array is of {scheme} or of "
            f"{', '.join(rules.values())}."
        )
    if not isinstance(name, str) or name not in SCHEMES:
        raise QuantizationError(f"there is no scheme {name!r}; known are: {', '.join([*SCHEMES, *RECIPES])}.")
    return SCHEMES[name]


def scheme_of(
    bits: int,
    group_size: int = 0,
    symmetric: bool = True,
    codes: Literal["integer", "float8"] = "integer",
    activation_bits: int | None = None,
) -> GroupedScheme:
    """The scheme with these attributes: the table's own, or for other sizes one that is named in the same way.

    Raises:
      QuantizationError: the layout of grouped codes has no place for it.
    """
    if bits not in BITS or (bits < 8 and group_size % CODES_TOGETHER) or (codes == "float8" and bits != 8):
        kind = "integers" if codes == "integer" else "floats"
        raise QuantizationError(
            f"there is no layout for {kind} of {bits} bits in groups of {group_size or 'a row'}: integers have "
            f"{BITS[0]} to {BITS[-1]} bits, floats 8, and groups of less than 8 bits are multiples of {CODES_TOGETHER}."
        )
    kind = f"w{bits}a{activation_bits}" if activation_bits else f"int{bits}" if codes == "integer" else "fp8"
    group = f"-g{group_size}" if group_size else ""
    # What the table leaves unsaid is the usual: eight bits have no zero points, fewer have them.
    said = "" if symmetric == (bits == 8) else "-sym" if symmetric else "-asym"
    name = f"{kind}{group}{said}"
    return SCHEMES.get(name) or GroupedScheme(name, bits, group_size, symmetric, codes, activation_bits)
