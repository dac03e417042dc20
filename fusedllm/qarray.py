"""`QuantArray`: a quantized matrix that is a pytree, so that it passes through jit like any other parameter."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


@runtime_checkable
class Scheme(Protocol):
    """How codes become numbers. An instance is a hashable value, compared by equality, and part of a program's key."""

    @property
    def name(self) -> str:
        """What the user calls it, such as `Q4_1`."""
        ...

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales and zero points included."""
        ...

    def decode(self, array: QuantArray) -> jax.Array:
        """The float32 values, of `array.shape`; traceable."""
        ...


@flax.struct.dataclass
class QuantArray:
    """A matrix `[out, in]` held as integer codes.

    Attributes:
      values: uint8 or int8, packed codes or whole blocks, `[out, bytes per row]`.
      scales: one per group or channel, or `None` where the blocks in `values` carry them.
      zeros: zero points or minimums in the scheme's own terms, or `None`.
      scheme: how to read the three above.
      shape: the logical shape.
    """

    values: jax.Array
    scales: jax.Array | None
    zeros: jax.Array | None
    scheme: Scheme = flax.struct.field(pytree_node=False)
    shape: tuple[int, ...] = flax.struct.field(pytree_node=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(leaf.nbytes for leaf in (self.values, self.scales, self.zeros) if leaf is not None)

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> jax.Array:
        """The values as an array of `shape`, decoded in float32 and then cast to `dtype`."""
        return self.scheme.decode(self).astype(dtype)
