"""The table of schemes that `fusedllm.quantize` knows: a row each, found by name."""

from __future__ import annotations

from fusedllm.errors import QuantizationError
from fusedllm.kernels.grouped import GroupedScheme

GROUP_SIZES = (32, 64, 128)


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
    )
}


def scheme_named(name: str | GroupedScheme) -> GroupedScheme:
    """The scheme of that name; a scheme is returned as it is.

    Raises:
      QuantizationError: there is none; the message lists them.
    """
    if isinstance(name, GroupedScheme):
        return name
    if name not in SCHEMES:
        raise QuantizationError(f"there is no scheme {name!r}; known are: {', '.join(SCHEMES)}.")
    return SCHEMES[name]
