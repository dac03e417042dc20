"""Packed weights: the layout that the native kernels read, made once when a model is loaded; values stay bit-exact.

`cpu/packing.h` describes the layout; here it is read back with XLA, which defines what a packed matrix means, and
written by the native library.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fusedllm.kernels import native
from fusedllm.qarray import QuantArray

# Rows that are interleaved, columns that share a scale, and the boundary that each panel starts on.
PANEL_ROWS = 16
GROUP = 32
ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class PackedScheme:
    """A packed layout; a `fusedllm.qarray.Scheme`. `values` of its arrays are uint8 `[panels, bytes of a panel]`.

    Attributes:
      name: what GGUF calls the blocks that it was made from.
      number: what `cpu/variant.h` calls the format.
      bits: of a code.
      offset: what is subtracted from a code before it is scaled.
      has_minimums: a group has a minimum besides its scale.
    """

    name: str
    number: int
    bits: int
    offset: int
    has_minimums: bool

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales and minimums included; a panel's padding is not."""
        return self.bits + 16 * (1 + self.has_minimums) / GROUP

    @property
    def group_bytes(self) -> int:
        """Bytes of a panel's codes for one group."""
        return PANEL_ROWS * GROUP * self.bits // 8

    def panel_bytes(self, width: int) -> int:
        """Bytes of a panel of `width` columns."""
        groups = width // GROUP
        used = groups * (self.group_bytes + 2 * PANEL_ROWS * (1 + self.has_minimums))
        return -(-used // ALIGNMENT) * ALIGNMENT

    def decode(self, array: QuantArray) -> jax.Array:
        """The float32 values of `array`; traceable."""
        rows, width = array.shape
        return self.decode_panels(array.values, width).reshape(-1, width)[:rows]

    def decode_panels(self, panels: jax.Array, width: int) -> jax.Array:
        """The float32 values of `panels`, uint8 `[panels, bytes]`, as `[panels, 16, width]`."""
        count, groups = panels.shape[0], width // GROUP
        at = groups * self.group_bytes
        codes = self._codes(panels[:, :at].reshape(count, groups, self.group_bytes))
        size = 2 * PANEL_ROWS * groups
        numbers = [_halves(panels[:, at + n * size : at + (n + 1) * size]) for n in range(1 + self.has_minimums)]
        # [panels, groups * 16] -> [panels, 16, groups, 1]
        scale, *minimum = (x.reshape(count, groups, PANEL_ROWS).transpose(0, 2, 1)[..., None] for x in numbers)
        values = scale * (codes.astype(jnp.float32) - np.float32(self.offset))
        return (values + minimum[0] if minimum else values).reshape(count, PANEL_ROWS, width)

    def _codes(self, bytes_: jax.Array) -> jax.Array:
        """`[panels, groups, bytes]` as codes `[panels, 16, groups, 32]`."""
        count, groups, _ = bytes_.shape
        if self.bits == 8:
            eight = bytes_.reshape(count, groups, 8, PANEL_ROWS, 4)
        else:
            both = bytes_[..., :256].reshape(count, groups, 4, PANEL_ROWS, 4)
            eight = jnp.concatenate([both & 15, both >> 4], axis=2)
        if self.bits == 5:
            high = (bytes_[..., 256:, None] >> np.arange(8, dtype=np.uint8)) & 1
            eight |= high.reshape(count, groups, 8, PANEL_ROWS, 4) << 4
        return eight.transpose(0, 3, 1, 2, 4).reshape(count, PANEL_ROWS, groups, GROUP)


def _halves(bytes_: jax.Array) -> jax.Array:
    pairs = bytes_.reshape(bytes_.shape[0], -1, 2)
    return jax.lax.bitcast_convert_type(pairs, jnp.float16).astype(jnp.float32)


SCHEMES: dict[str, PackedScheme] = {
    scheme.name: scheme
    for scheme in (
        PackedScheme("Q4_0", 0, 4, 8, False),
        PackedScheme("Q4_1", 1, 4, 0, True),
        PackedScheme("Q5_0", 2, 5, 16, False),
        PackedScheme("Q5_1", 3, 5, 0, True),
        PackedScheme("Q8_0", 4, 8, 128, False),
    )
}

# Plain weights in the same numbering, by dtype.
PLAIN_NUMBERS = {"bfloat16": 5, "float16": 6, "float32": 7}


def can_pack(name: str, shape: Sequence[int]) -> bool:
    """Whether a matrix in GGUF's blocks `name` has a packed layout."""
    return name in SCHEMES and len(shape) == 2 and shape[1] % GROUP == 0


def pack_blocks(name: str, shape: Sequence[int], blocks: np.ndarray, packed: np.ndarray) -> None:
    """Packs contiguous GGUF `blocks` of a matrix of `shape` into `packed`, uint8 `[panels, bytes of a panel]`.

    Raises:
      ImplementationError: the native library is not there.
    """
    native.pack(SCHEMES[name].number, shape[0], shape[1], blocks, packed)


def packed_shape(name: str, shape: Sequence[int]) -> tuple[int, int]:
    """`[panels, bytes of a panel]` of a matrix of `shape`."""
    return -(-shape[0] // PANEL_ROWS), SCHEMES[name].panel_bytes(shape[1])


def packed_scheme(weight: Any) -> PackedScheme | None:
    """The packed layout of `weight`, or `None` for any other array."""
    return weight.scheme if isinstance(weight, QuantArray) and isinstance(weight.scheme, PackedScheme) else None
