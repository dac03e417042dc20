"""GGUF's block formats as quantization schemes: how the bytes of a block become float32 weights.

A row of a matrix is a sequence of blocks; a block holds its own scales next to the codes of 32 or 256 weights
(format: `ggml-common.h` and `ggml-quants.c` of ggml). Each format is one function, which NumPy runs when a file is
read and JAX traces when a `QuantArray` is decoded inside a program.

Both give the same bits, and the same as the `gguf` library, although XLA may contract `a * b + c` into one fused
operation: a scale is a float16 (11 significant bits), sub-block scales and codes add at most 6 bits and 8 bits, so
every product here is exact in float32's 24 bits and rounds only once, fused or not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fusedllm.qarray import QuantArray

SUPER_BLOCK = 256  # weights in a K-quant block

# Weights decoded per step by NumPy: small enough that all intermediate arrays stay in a core's cache.
_CHUNK_WEIGHTS = 1 << 16

# np.ndarray or a traced jax.Array: both have the operators, `view`, `reshape` and `astype` that are used below.
Array = Any


@dataclass(frozen=True, slots=True)
class BlockScheme:
    """One block format; a `fusedllm.qarray.Scheme`.

    Attributes:
      name: what GGUF calls it, such as `Q4_1`.
      block_size: weights in a block.
      block_bytes: bytes in a block.
      unpack: from `(numpy or jax.numpy, uint8 [..., block_bytes])` to float32 `[..., block_size]`.
    """

    name: str
    block_size: int
    block_bytes: int
    unpack: Callable[[Any, Array], Array]

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales and minimums included."""
        return 8 * self.block_bytes / self.block_size

    def decode(self, array: QuantArray) -> jax.Array:
        """The float32 values of `array`, whose `values` are whole blocks, uint8 `[..., bytes per row]`; traceable."""
        *rows, row_bytes = array.values.shape
        blocks = array.values.reshape(*rows, row_bytes // self.block_bytes, self.block_bytes)
        decoded: jax.Array = self.unpack(jnp, blocks).reshape(array.shape)
        return decoded

    def decode_numpy(self, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The float32 values of `shape` held in `values`, whole blocks in uint8, without JAX."""
        blocks = values.reshape(-1, self.block_bytes)
        result = np.empty((len(blocks), self.block_size), np.float32)
        step = _CHUNK_WEIGHTS // self.block_size
        # A damaged file may hold infinite scales; infinity times zero is then NaN, as in every other decoder.
        with np.errstate(invalid="ignore", over="ignore"):
            for start in range(0, len(blocks), step):
                result[start : start + step] = self.unpack(np, blocks[start : start + step])
        return result.reshape(shape)


def _half(blocks: Array, start: int) -> Array:
    return blocks[..., start : start + 2].view(np.float16).astype(np.float32)


def _nibbles(xp: Any, codes: Array) -> Array:
    """The low four bits of all bytes, then the high four."""
    return xp.concatenate([codes & 15, codes >> 4], axis=-1)


def _bit_planes(codes: Array, bits: int, group: int) -> Array:
    """`[..., n]` bytes as `[..., n * 8 / bits]` codes: each group of bytes gives its lowest bits first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    planes = codes.reshape(*codes.shape[:-1], -1, 1, group) >> shifts
    return (planes & np.uint8((1 << bits) - 1)).reshape(*codes.shape[:-1], -1)


def _high_bits(codes: Array) -> Array:
    """Four bytes as 32 fifth bits, lowest first."""
    bits = (codes[..., None] >> np.arange(8, dtype=np.uint8)) & 1
    return bits.reshape(*codes.shape[:-1], 32) << 4


def _grouped(scale: Array, codes: Array) -> Array:
    """`codes` times the scale of their group, `[..., groups, group size]`."""
    return scale[..., None] * codes.reshape(*scale.shape, -1).astype(np.float32)


def _flat(groups: Array) -> Array:
    return groups.reshape(*groups.shape[:-2], -1)


def _q4_0(xp: Any, blocks: Array) -> Array:
    return _half(blocks, 0) * (_nibbles(xp, blocks[..., 2:]).astype(np.float32) - np.float32(8))


def _q4_1(xp: Any, blocks: Array) -> Array:
    return _half(blocks, 0) * _nibbles(xp, blocks[..., 4:]).astype(np.float32) + _half(blocks, 2)


def _q5_0(xp: Any, blocks: Array) -> Array:
    codes = _nibbles(xp, blocks[..., 6:]) | _high_bits(blocks[..., 2:6])
    return _half(blocks, 0) * (codes.astype(np.float32) - np.float32(16))


def _q5_1(xp: Any, blocks: Array) -> Array:
    codes = _nibbles(xp, blocks[..., 8:]) | _high_bits(blocks[..., 4:8])
    return _half(blocks, 0) * codes.astype(np.float32) + _half(blocks, 2)


def _q8_0(xp: Any, blocks: Array) -> Array:
    return _half(blocks, 0) * blocks[..., 2:].view(np.int8).astype(np.float32)


def _q2_k(xp: Any, blocks: Array) -> Array:
    scales, codes = blocks[..., :16], _bit_planes(blocks[..., 16:80], 2, 32)
    scale = _half(blocks, 80) * (scales & 15).astype(np.float32)
    minimum = _half(blocks, 82) * (scales >> 4).astype(np.float32)
    return _flat(_grouped(scale, codes) - minimum[..., None])


def _q3_k(xp: Any, blocks: Array) -> Array:
    low, high = blocks[..., 96:104], blocks[..., 104:108]
    scales = _nibbles(xp, low) | (_bit_planes(high, 2, 4) << 4)
    scale = _half(blocks, 108) * (scales.astype(np.float32) - np.float32(32))
    # A set mask bit means that the third bit is set, and codes are centred by subtracting four.
    codes = _bit_planes(blocks[..., 32:96], 2, 32) | (_bit_planes(blocks[..., :32], 1, 32) << 2)
    return _flat(_grouped(scale, codes.astype(np.float32) - np.float32(4)))


def _six_bit_pairs(xp: Any, packed: Array) -> tuple[Array, Array]:
    """Eight scales and eight minimums of six bits each out of twelve bytes (Q4_K and Q5_K)."""
    first, second, rest = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    scales = xp.concatenate([first & 63, (rest & 15) | ((first >> 6) << 4)], axis=-1)
    minimums = xp.concatenate([second & 63, (rest >> 4) | ((second >> 6) << 4)], axis=-1)
    return scales.astype(np.float32), minimums.astype(np.float32)


def _scaled_and_shifted(xp: Any, blocks: Array, codes: Array) -> Array:
    scales, minimums = _six_bit_pairs(xp, blocks[..., 4:16])
    return _flat(_grouped(_half(blocks, 0) * scales, codes) - (_half(blocks, 2) * minimums)[..., None])


def _q4_k(xp: Any, blocks: Array) -> Array:
    return _scaled_and_shifted(xp, blocks, _bit_planes(blocks[..., 16:], 4, 32))


def _q5_k(xp: Any, blocks: Array) -> Array:
    high = _bit_planes(blocks[..., 16:48], 1, 32) << 4
    return _scaled_and_shifted(xp, blocks, _bit_planes(blocks[..., 48:], 4, 32) | high)


def _q6_k(xp: Any, blocks: Array) -> Array:
    codes = _bit_planes(blocks[..., :128], 4, 64) | (_bit_planes(blocks[..., 128:192], 2, 32) << 4)
    scale = _half(blocks, 208) * blocks[..., 192:208].view(np.int8).astype(np.float32)
    return _flat(_grouped(scale, codes.astype(np.float32) - np.float32(32)))


SCHEMES: dict[str, BlockScheme] = {
    scheme.name: scheme
    for scheme in (
        BlockScheme("Q4_0", 32, 18, _q4_0),
        BlockScheme("Q4_1", 32, 20, _q4_1),
        BlockScheme("Q5_0", 32, 22, _q5_0),
        BlockScheme("Q5_1", 32, 24, _q5_1),
        BlockScheme("Q8_0", 32, 34, _q8_0),
        BlockScheme("Q2_K", SUPER_BLOCK, 84, _q2_k),
        BlockScheme("Q3_K", SUPER_BLOCK, 110, _q3_k),
        BlockScheme("Q4_K", SUPER_BLOCK, 144, _q4_k),
        BlockScheme("Q5_K", SUPER_BLOCK, 176, _q5_k),
        BlockScheme("Q6_K", SUPER_BLOCK, 210, _q6_k),
    )
}
