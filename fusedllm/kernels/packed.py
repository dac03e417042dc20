"""Packed weights: the layout that the native kernels read, made once when a model is loaded; values stay bit-exact.

`cpu/packing.h` describes the layout; here it is read back with XLA, which defines what a packed matrix means, and
written by the native library, from GGUF's blocks or from grouped codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fusedllm.kernels import native
from fusedllm.kernels.grouped import MOST_INTEGER_COLUMNS, GroupedScheme
from fusedllm.kernels.walsh import turn
from fusedllm.qarray import QuantArray

# Rows that are interleaved, columns whose codes lie together, and the boundary that each panel starts on.
PANEL_ROWS = 16
GROUP = 32
ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class PackedScheme:
    """A packed layout; a `fusedllm.qarray.Scheme`. `values` of its arrays are uint8 `[panels, bytes of a panel]`.

    A value is `scale * (code - offset)`, or with the minimum or the zero point of its group
    `scale * code + minimum` or `scale * (code - zero)`.

    Attributes:
      name: what GGUF calls the blocks that it was made from, or the name of the grouped scheme.
      number: what `cpu/variant.h` calls the format.
      bits: of a code.
      offset: what is subtracted from a code before it is scaled.
      has_minimums: there is a minimum to each scale.
      has_zeros: there is a zero point to each scale.
      shared: groups of 32 columns that share a scale; the last ones of a row may be fewer.
      sums_integers: products are sums of integers (`kernels/linear.py`).
      turned: rows are packed as a Hadamard matrix turned them (`kernels/hadamard.py`); `decode` turns them back.
    """

    name: str
    number: int
    bits: int
    offset: int
    has_minimums: bool = False
    has_zeros: bool = False
    shared: int = 1
    sums_integers: bool = False
    turned: bool = False

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales, minimums and zero points included; a panel's padding is not."""
        return self.bits + 16 * self.numbers / (GROUP * self.shared)

    @property
    def numbers(self) -> int:
        """float16 numbers for each row and `shared` groups."""
        return 1 + self.has_minimums + self.has_zeros

    @property
    def group_bytes(self) -> int:
        """Bytes of a panel's codes for one group."""
        return PANEL_ROWS * GROUP * self.bits // 8

    def scales(self, width: int) -> int:
        """Scales of a row of `width` columns."""
        return -(-width // (GROUP * self.shared))

    def panel_bytes(self, width: int) -> int:
        """Bytes of a panel of `width` columns."""
        used = width // GROUP * self.group_bytes + 2 * PANEL_ROWS * self.numbers * self.scales(width)
        return -(-used // ALIGNMENT) * ALIGNMENT

    def packed_shape(self, shape: Sequence[int]) -> tuple[int, int]:
        """`[panels, bytes of a panel]` of a matrix of `shape`."""
        return -(-shape[0] // PANEL_ROWS), self.panel_bytes(shape[1])

    def decode(self, array: QuantArray) -> jax.Array:
        """The float32 values of `array`; traceable."""
        rows, width = array.shape
        return self.decode_panels(array.values, width).reshape(-1, width)[:rows]

    def decode_panels(self, panels: jax.Array, width: int) -> jax.Array:
        """The float32 values of `panels`, uint8 `[panels, bytes]`, as `[panels, 16, width]`."""
        values = self._values(panels, width)
        return turn(jnp, values) if self.turned else values

    def _values(self, panels: jax.Array, width: int) -> jax.Array:
        codes = self._codes(panels, width).astype(jnp.float32)
        scale, *other = (self._spread(number, width) for number in self._numbers(panels, width))
        if self.has_zeros:
            return scale * (codes - other[0])
        values = scale * (codes - np.float32(self.offset))
        return values + other[0] if self.has_minimums else values

    def integers(self, array: QuantArray) -> tuple[jax.Array, jax.Array]:
        """The codes of `array` less the offset, int8 `[out, in]`, and the scales of its rows, float32 `[out]`."""
        rows, width = array.shape
        codes = (self._codes(array.values, width) ^ np.uint8(128)).view(jnp.int8)
        (scale,) = self._numbers(array.values, width)
        return codes.reshape(-1, width)[:rows], scale.reshape(-1)[:rows]

    def _codes(self, panels: jax.Array, width: int) -> jax.Array:
        """uint8 `[panels, 16, width]`."""
        count, groups = panels.shape[0], width // GROUP
        bytes_ = panels[:, : groups * self.group_bytes].reshape(count, groups, self.group_bytes)
        if self.bits == 8:
            eight = bytes_.reshape(count, groups, 8, PANEL_ROWS, 4)
        else:
            both = bytes_[..., :256].reshape(count, groups, 4, PANEL_ROWS, 4)
            eight = jnp.concatenate([both & 15, both >> 4], axis=2)
        if self.bits == 5:
            high = (bytes_[..., 256:, None] >> np.arange(8, dtype=np.uint8)) & 1
            eight |= high.reshape(count, groups, 8, PANEL_ROWS, 4) << 4
        return eight.transpose(0, 3, 1, 2, 4).reshape(count, PANEL_ROWS, width)

    def _numbers(self, panels: jax.Array, width: int) -> list[jax.Array]:
        """Scales, then minimums or zero points, each float32 `[panels, 16, scales]`."""
        count, scales = panels.shape[0], self.scales(width)
        at, size = width // GROUP * self.group_bytes, 2 * PANEL_ROWS * scales
        bytes_ = panels[:, at : at + size * self.numbers].reshape(count, self.numbers, scales, PANEL_ROWS, 2)
        halves = jax.lax.bitcast_convert_type(bytes_, jnp.float16).astype(jnp.float32)
        return list(halves.transpose(1, 0, 3, 2))

    def _spread(self, numbers: jax.Array, width: int) -> jax.Array:
        """`[panels, 16, scales]` as `[panels, 16, width]`."""
        return jnp.repeat(numbers, GROUP * self.shared, axis=-1)[..., :width]


SCHEMES: dict[str, PackedScheme] = {
    scheme.name: scheme
    for scheme in (
        PackedScheme("Q4_0", 0, 4, 8),
        PackedScheme("Q4_1", 1, 4, 0, has_minimums=True),
        PackedScheme("Q5_0", 2, 5, 16),
        PackedScheme("Q5_1", 3, 5, 0, has_minimums=True),
        PackedScheme("Q8_0", 4, 8, 128),
    )
}

# The formats that grouped codes are packed into.
SYMMETRIC_4, SYMMETRIC_8, WITH_ZEROS, INTEGER = 0, 4, 5, 6

# Plain weights in the same numbering, by dtype.
PLAIN_NUMBERS = {"bfloat16": 7, "float16": 8, "float32": 9}


def layout_of(array: QuantArray) -> PackedScheme | None:
    """The layout that `array`, a matrix in the host's memory, is packed into, or `None` where there is none.

    There is one where the columns are a multiple of 32: for GGUF's blocks of 32 weights; and for grouped codes that are
    integers of 3, 4 or 8 bits, in groups of a multiple of 32 or whole rows, where float16 holds every scale and zero
    point exactly.
    """
    if len(array.shape) != 2 or array.shape[1] == 0 or array.shape[1] % GROUP:
        return None
    if isinstance(array.scheme, GroupedScheme):
        return _grouped_layout(array, array.scheme)
    return SCHEMES.get(array.scheme.name)


def _grouped_layout(array: QuantArray, scheme: GroupedScheme) -> PackedScheme | None:
    if scheme.codes != "integer" or scheme.group_size % GROUP:
        return None
    if any(numbers is not None and _as_halves(numbers) is None for numbers in (array.scales, array.zeros)):
        return None
    width = array.shape[1]
    shared = min(scheme.group_size or width, width) // GROUP
    if scheme.activation_bits is not None:
        fits = scheme.sums_integers and array.zeros is None and width <= MOST_INTEGER_COLUMNS
        integer = PackedScheme(scheme.name, INTEGER, 8, 128, shared=shared, sums_integers=True, turned=scheme.turned)
        return integer if fits else None
    if scheme.turned:
        return None
    if scheme.bits == 8 and array.zeros is None:
        return PackedScheme(scheme.name, SYMMETRIC_8, 8, 128, shared=shared)
    if scheme.bits in (3, 4) and array.zeros is None:
        # Codes of three bits are raised by four, so that eight is zero.
        return PackedScheme(scheme.name, SYMMETRIC_4, 4, 8, shared=shared)
    if scheme.bits in (3, 4):
        return PackedScheme(scheme.name, WITH_ZEROS, 4, 0, has_zeros=True, shared=shared)
    return None


def pack(array: QuantArray, layout: PackedScheme, packed: np.ndarray) -> None:
    """Packs `array` into `packed`, uint8 `[panels, bytes of a panel]`, in the `layout` that `layout_of` gave.

    Raises:
      ImplementationError: the native library is not there.
      ValueError: the buffers of `array` are not of the sizes that its scheme and shape ask for.
    """
    rows, width = array.shape
    codes = np.ascontiguousarray(array.values)
    if not isinstance(array.scheme, GroupedScheme):
        native.pack(layout.number, rows, width, codes, packed)
        return
    scales, zeros = (None if numbers is None else _as_halves(numbers) for numbers in (array.scales, array.zeros))
    assert scales is not None
    native.pack_grouped(layout.number, layout.shared, (rows, width), array.scheme.bits, codes, scales, zeros, packed)


def _as_halves(numbers: Any) -> np.ndarray | None:
    """Contiguous float16 with exactly these values, or `None`."""
    numbers = np.asarray(numbers)
    if numbers.dtype not in (np.float16, np.float32):
        return None
    with np.errstate(over="ignore"):
        halves = np.ascontiguousarray(numbers, np.float16)
    return halves if numbers.dtype == np.float16 or np.array_equal(halves.astype(np.float32), numbers) else None


def packed_scheme(weight: Any) -> PackedScheme | None:
    """The packed layout of `weight`, or `None` for any other array."""
    return weight.scheme if isinstance(weight, QuantArray) and isinstance(weight.scheme, PackedScheme) else None
