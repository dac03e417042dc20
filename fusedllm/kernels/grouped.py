"""Grouped codes: the layout of a quantized matrix whose rows are cut into groups, each with a scale of its own.

This is what `fusedllm.quantize` writes (`docs/arrow-format.md`) and what every kernel for it reads. A row of `in`
weights is padded to whole groups; code `i` of a row is in the bits `[i * bits, (i + 1) * bits)` of its bytes, the least
significant bit of a byte first. A weight is `scale * (code - zero_point)`. Codes of eight bits are signed, narrower
ones are not; a symmetric scheme stores no zero points: they are 0 for signed codes and `2 ** (bits - 1)` for others.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from fusedllm.kernels.walsh import turn
from fusedllm.qarray import QuantArray

# Codes that fill whole bytes at any number of bits.
CODES_TOGETHER = 8

# Products of int8 with int8 whose sums stay below 2^31, with some room: 127 * 128 * 65536 is half of it.
MOST_INTEGER_COLUMNS = 65536

# Largest finite float8 e4m3fn.
LARGEST_FLOAT8 = 448.0


@dataclass(frozen=True, slots=True)
class GroupedScheme:
    """One way to quantize a matrix; a `fusedllm.qarray.Scheme`.

    `values` of its arrays are uint8 `[out, bytes per row]`, `scales` and `zeros` float16 or float32 `[out, groups]`.

    Attributes:
      name: what the user calls it, such as `int4-g64`.
      bits: of a code; 3 to 8.
      group_size: weights of a row that share a scale; 0 for the whole row (per output channel).
      symmetric: no zero points are stored.
      codes: `integer`, or `float8` for codes that are numbers of the format e4m3fn (arXiv:2209.05433).
      activation_bits: 8 where products round activations to integers too, one scale a token; `None` otherwise.
      turned: the codes are those of the rows times a Hadamard matrix (`kernels/hadamard.py`), with which products
        multiply the activations first; `decode` gives the rows themselves.
    """

    name: str
    bits: int
    group_size: int = 0
    symmetric: bool = True
    codes: Literal["integer", "float8"] = "integer"
    activation_bits: int | None = None
    turned: bool = False

    @property
    def signed(self) -> bool:
        """Whether integer codes are signed."""
        return self.bits == 8

    @property
    def lowest(self) -> int:
        """The least code that the quantizer makes."""
        # -128 is left out, so that a symmetric code and its negative both exist.
        return -127 if self.signed else 0

    @property
    def highest(self) -> int:
        """The largest code."""
        return 127 if self.signed else 2**self.bits - 1

    @property
    def center(self) -> int:
        """The zero point of a symmetric scheme."""
        return 0 if self.signed else 2 ** (self.bits - 1)

    @property
    def sums_integers(self) -> bool:
        """Whether `linear` makes sums of integers of the codes: one scale a row, and activations of eight bits too."""
        whole_rows = (self.bits, self.group_size, self.symmetric, self.codes) == (8, 0, True, "integer")
        return whole_rows and self.activation_bits == 8

    @property
    def unturned(self) -> GroupedScheme:
        """The scheme that has the same codes for rows that are turned already; `turned` aside, this one."""
        return dataclasses.replace(self, turned=False)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight with float16 scales; scales of whole rows are not counted."""
        return self.bits + (16 * (2 - self.symmetric) / self.group_size if self.group_size else 0.0)

    def groups(self, width: int) -> int:
        """Groups of a row of `width` weights."""
        return -(-width // self.group_size) if self.group_size else 1

    def padded(self, width: int) -> int:
        """Weights of a row with what fills its last group, and its last byte."""
        unit = self.group_size or (1 if self.bits == 8 else CODES_TOGETHER)
        return -(-width // unit) * unit

    def row_bytes(self, width: int) -> int:
        """Bytes of a row of `width` weights."""
        return self.padded(width) * self.bits // 8

    def decode(self, array: QuantArray) -> jax.Array:
        """The float32 values of `array`; traceable. Leading axes of its shape are those of its buffers."""
        assert array.scales is not None
        width = array.shape[-1]
        # Buffers may be NumPy's, where nobody has put them on a device yet.
        codes = self._numbers(jnp.asarray(array.values))
        if self.codes == "integer":
            zero = (
                np.float32(self.center)
                if array.zeros is None
                else self._spread(jnp.asarray(array.zeros), codes.shape[-1])
            )
            codes = codes - zero
        values = self._spread(jnp.asarray(array.scales), codes.shape[-1]) * codes
        values = values[..., :width].reshape(array.shape)
        return turn(jnp, values) if self.turned else values

    def _numbers(self, values: jax.Array) -> jax.Array:
        if self.codes == "float8":
            return jax.lax.bitcast_convert_type(values, jnp.float8_e4m3fn).astype(jnp.float32)
        return unpack(jnp, values, self.bits).astype(jnp.float32)

    def _spread(self, numbers: jax.Array, padded: int) -> jax.Array:
        """`[..., groups]` as float32 `[..., padded]`."""
        return jnp.repeat(numbers.astype(jnp.float32), padded // numbers.shape[-1], axis=-1)


def pack(xp: Any, codes: Any, bits: int) -> Any:
    """Codes `[..., n]` as bytes, uint8 `[..., n * bits / 8]`; n is a multiple of 8, or of anything for eight bits.

    `xp` is `numpy` or `jax.numpy`. Codes of eight bits are int8, others uint8 and below `2 ** bits`.
    """
    if bits == 8:
        return codes.astype(np.int8).view(np.uint8)
    eight = codes.astype(np.uint8).reshape(*codes.shape[:-1], -1, CODES_TOGETHER)
    together = []
    # Byte j holds the bits 8 j to 8 j + 7 of the eight codes.
    for j in range(bits):
        byte = xp.zeros(eight.shape[:-1], np.uint8)
        for i in range(CODES_TOGETHER):
            shift = i * bits - 8 * j
            if -bits < shift < 8:
                code = eight[..., i]
                byte = byte | (code << np.uint8(shift) if shift >= 0 else code >> np.uint8(-shift))
        together.append(byte)
    return xp.stack(together, axis=-1).reshape(*codes.shape[:-1], -1)


def unpack(xp: Any, values: Any, bits: int) -> Any:
    """The codes in bytes `[..., m]`: int8 for eight bits, else uint8 `[..., m * 8 / bits]`; the inverse of `pack`."""
    if bits == 8:
        return values.view(np.int8)
    bytes_ = values.reshape(*values.shape[:-1], -1, bits)
    codes = []
    for i in range(CODES_TOGETHER):
        first, shift = divmod(i * bits, 8)
        code = bytes_[..., first] >> np.uint8(shift)
        if shift + bits > 8:
            code = code | bytes_[..., first + 1] << np.uint8(8 - shift)
        codes.append(code & np.uint8(2**bits - 1))
    return xp.stack(codes, axis=-1).reshape(*values.shape[:-1], -1)


def grouped_scheme(weight: Any) -> GroupedScheme | None:
    """The scheme of `weight` where it is an array of grouped codes, or `None` for any other."""
    return weight.scheme if isinstance(weight, QuantArray) and isinstance(weight.scheme, GroupedScheme) else None
