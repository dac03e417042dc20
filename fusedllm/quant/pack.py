"""Scales and codes as the bytes of GGUF blocks: the inverse of how `blocks.py` takes them apart, in NumPy.

Every function takes one entry a block along the first axis and gives uint8 `[blocks, bytes of a block]`. Codes are
uint8 and not negative: the formats that are centred on 0 store them shifted.
"""

from __future__ import annotations

import numpy as np


def q4_0(scale: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Float16 `[blocks]`, codes 0 to 15 `[blocks, 32]`."""
    return np.concatenate([_bytes(scale), _planes(codes, 4, 16)], axis=-1)


def q4_1(scale: np.ndarray, minimum: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Float16 `[blocks]` twice, codes 0 to 15 `[blocks, 32]`."""
    return np.concatenate([_bytes(scale), _bytes(minimum), _planes(codes, 4, 16)], axis=-1)


def q5_0(scale: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Float16 `[blocks]`, codes 0 to 31 `[blocks, 32]`."""
    return np.concatenate([_bytes(scale), _fifth_bits(codes), _planes(codes & 15, 4, 16)], axis=-1)


def q5_1(scale: np.ndarray, minimum: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Float16 `[blocks]` twice, codes 0 to 31 `[blocks, 32]`."""
    parts = [_bytes(scale), _bytes(minimum), _fifth_bits(codes), _planes(codes & 15, 4, 16)]
    return np.concatenate(parts, axis=-1)


def q8_0(scale: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Float16 `[blocks]`, int8 codes `[blocks, 32]`."""
    return np.concatenate([_bytes(scale), codes.view(np.uint8)], axis=-1)


def q4_k(
    scale: np.ndarray, minimum: np.ndarray, scales: np.ndarray, minimums: np.ndarray, codes: np.ndarray
) -> np.ndarray:
    """Float16 `[blocks]` twice, integers 0 to 63 `[blocks, 8]` twice, codes 0 to 15 `[blocks, 256]`."""
    head = [_bytes(scale), _bytes(minimum), _six_bit_pairs(scales, minimums)]
    return np.concatenate([*head, _planes(codes, 4, 32)], axis=-1)


def q5_k(
    scale: np.ndarray, minimum: np.ndarray, scales: np.ndarray, minimums: np.ndarray, codes: np.ndarray
) -> np.ndarray:
    """Float16 `[blocks]` twice, integers 0 to 63 `[blocks, 8]` twice, codes 0 to 31 `[blocks, 256]`."""
    head = [_bytes(scale), _bytes(minimum), _six_bit_pairs(scales, minimums)]
    return np.concatenate([*head, _planes(codes >> 4, 1, 32), _planes(codes & 15, 4, 32)], axis=-1)


def q6_k(scale: np.ndarray, scales: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Float16 `[blocks]`, int8 scales `[blocks, 16]`, codes 0 to 63 `[blocks, 256]`."""
    parts = [_planes(codes & 15, 4, 64), _planes(codes >> 4, 2, 32), scales.view(np.uint8), _bytes(scale)]
    return np.concatenate(parts, axis=-1)


def _bytes(halves: np.ndarray) -> np.ndarray:
    """`[blocks]` as `[blocks, 2]`."""
    return halves.astype("<f2", copy=False)[:, None].view(np.uint8)


def _planes(codes: np.ndarray, bits: int, group: int) -> np.ndarray:
    """`[blocks, n]` codes of `bits` bits as `[blocks, n * bits / 8]` bytes, `group` of them side by side.

    The first `group` codes are the lowest bits of a group of bytes, the next ones the bits above.
    """
    planes = codes.reshape(len(codes), -1, 8 // bits, group)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return np.bitwise_or.reduce(planes << shifts, axis=2).reshape(len(codes), -1)


def _fifth_bits(codes: np.ndarray) -> np.ndarray:
    return np.packbits(codes >> 4, axis=-1, bitorder="little")


def _six_bit_pairs(scales: np.ndarray, minimums: np.ndarray) -> np.ndarray:
    """Eight and eight integers of six bits in twelve bytes: four whole, the other four's upper two bits above them."""
    first, second = (low | (high >> 4) << 6 for low, high in (np.hsplit(part, 2) for part in (scales, minimums)))
    rest = (scales[:, 4:] & 15) | (minimums[:, 4:] & 15) << 4
    return np.concatenate([first, second, rest], axis=-1)
