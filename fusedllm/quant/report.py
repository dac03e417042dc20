"""`QuantizeReport`: what quantizing took, and what it cost, layer by layer."""

from __future__ import annotations

import html
import json
import math
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields

from fusedllm.errors import QuantizationError


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One layer.

    Attributes:
      name: of the layer.
      scheme: what it was quantized to, or its dtype where it was left as it is.
      method: how the codes were chosen.
      shape: of the weights.
      seconds: the time that it took, its share of what was done for all layers at once included.
      conversion_seconds: of these, what was spent outside of the quantizer: reading the table and building the result.
      bytes_in: of its weights.
      bytes_out: of codes, scales and zero points.
      bytes_copied: of weights that could not be read where they lay, and of results that were not made where they stay.
      reason: of the copy, or "".
      relative_error: norm of the error over norm of the weights.
    """

    name: str
    scheme: str
    method: str
    shape: tuple[int, ...]
    seconds: float
    conversion_seconds: float
    bytes_in: int
    bytes_out: int
    bytes_copied: int
    reason: str
    relative_error: float

    @property
    def snr(self) -> float:
        """Signal-to-noise ratio, in decibels."""
        return -20 * math.log10(self.relative_error) if self.relative_error > 0 else math.inf

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight of what was stored."""
        return 8 * self.bytes_out / math.prod(self.shape)


_HEAD = ("layer", "shape", "scheme", "method", "ms", "conversion", "MB in", "MB out", "copied", "error", "SNR")
# A printed report shows so many layers, from both ends.
_SHOWN = 20


@dataclass(repr=False)
class QuantizeReport:
    """All layers, in their order; prints as a table, in notebooks too."""

    layers: list[LayerReport] = field(default_factory=list)

    def __iter__(self) -> Iterator[LayerReport]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, name: str) -> LayerReport:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    def extend(self, layers: Iterable[LayerReport]) -> None:
        """Adds layers."""
        self.layers.extend(layers)

    @property
    def seconds(self) -> float:
        """Of all layers."""
        return sum(layer.seconds for layer in self.layers)

    @property
    def conversion_share(self) -> float:
        """The part of the time that was spent outside of the quantizer."""
        return sum(layer.conversion_seconds for layer in self.layers) / max(self.seconds, 1e-12)

    @property
    def bytes_in(self) -> int:
        """Of all weights."""
        return sum(layer.bytes_in for layer in self.layers)

    @property
    def bytes_out(self) -> int:
        """Of all results."""
        return sum(layer.bytes_out for layer in self.layers)

    @property
    def bytes_copied(self) -> int:
        """Of all layers."""
        return sum(layer.bytes_copied for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over all weights, those that were left as they are included."""
        return 8 * self.bytes_out / max(1, sum(math.prod(layer.shape) for layer in self.layers))

    def __str__(self) -> str:
        rows = self._rows()
        widths = [max(len(row[column]) for row in [_HEAD, *rows]) for column in range(len(_HEAD))]
        lines = [
            "  ".join(
                cell.ljust(width) if column < 4 else cell.rjust(width) for column, (cell, width) in enumerate(pairs)
            )
            for pairs in (list(zip(row, widths, strict=True)) for row in [_HEAD, *rows])
        ]
        return "\n".join([line.rstrip() for line in lines] + [self.summary()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """A table, for notebooks."""

        def line(cells: Iterable[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        rows = "".join(line(row, "td") for row in self._rows())
        return f"<table>{line(_HEAD, 'th')}{rows}</table><p>{html.escape(self.summary())}</p>"

    def summary(self) -> str:
        """One line about all layers."""
        return (
            f"{len(self)} layers, {self.bytes_in / 1e6:,.1f} MB to {self.bytes_out / 1e6:,.1f} MB "
            f"({self.bits_per_weight:.2f} bits per weight) in {self.seconds * 1e3:,.1f} ms "
            f"({self.bytes_in / 1e9 / max(self.seconds, 1e-12):.1f} GB/s, {self.conversion_share:.0%} conversion), "
            f"{self.bytes_copied:,} bytes copied"
        )

    def _rows(self) -> list[tuple[str, ...]]:
        some = self.layers
        if len(some) > _SHOWN:
            rows = [_row(layer) for layer in some[: _SHOWN // 2]]
            rows.append((f"... {len(some) - _SHOWN} more", *[""] * (len(_HEAD) - 1)))
            return [*rows, *(_row(layer) for layer in some[-_SHOWN // 2 :])]
        return [_row(layer) for layer in some]

    def to_json(self) -> str:
        """One JSON text, a list for each property; `from_json` is its inverse."""
        columns = zip(*map(_properties, self.layers), strict=True) if self.layers else [()] * len(_FIELDS)
        return json.dumps(dict(zip(_FIELDS, columns, strict=True)))

    @classmethod
    def from_json(cls, text: str) -> QuantizeReport:
        """What `to_json` wrote.

        Raises:
          QuantizationError: it is something else.
        """
        try:
            columns = json.loads(text)
            found = [
                dict(zip(_FIELDS, row, strict=True)) for row in zip(*(columns[name] for name in _FIELDS), strict=True)
            ]
            layers = [LayerReport(**{**layer, "shape": tuple(layer["shape"])}) for layer in found]
        except (ValueError, TypeError, KeyError) as error:
            raise QuantizationError(f"the stored report can't be read: {error}") from error
        return cls(layers)


_FIELDS = tuple(one.name for one in fields(LayerReport))
# `dataclasses.astuple` copies deeply, which takes longer than quantizing a small layer.
_properties = operator.attrgetter(*_FIELDS)


def _row(layer: LayerReport) -> tuple[str, ...]:
    share = layer.conversion_seconds / max(layer.seconds, 1e-12)
    copied = f"{layer.bytes_copied:,}" + (f" ({layer.reason})" if layer.reason else "")
    snr = "" if math.isinf(layer.snr) else f"{layer.snr:.1f} dB"
    return (
        layer.name,
        "x".join(map(str, layer.shape)),
        layer.scheme,
        layer.method,
        f"{layer.seconds * 1e3:.3f}",
        f"{share:.0%}",
        f"{layer.bytes_in / 1e6:.2f}",
        f"{layer.bytes_out / 1e6:.2f}",
        copied,
        f"{layer.relative_error:.2e}",
        snr,
    )
