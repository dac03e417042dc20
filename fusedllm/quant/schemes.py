"""The table of schemes that `fusedllm.quantize` knows: a row each, found by name."""

from __future__ import annotations

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


def scheme_named(name: str | GroupedScheme) -> GroupedScheme:
    """The scheme of that name; a scheme is returned as it is.

    Raises:
      QuantizationError: there is none; the message lists them.
    """
    if isinstance(name, GroupedScheme):
        return name
    if not isinstance(name, str) or name not in SCHEMES:
        raise QuantizationError(f"there is no scheme {name!r}; known are: {', '.join(SCHEMES)}.")
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
