"""Random quantized matrices for the tests of kernels: GGUF blocks, and the packed layout made of them."""

from __future__ import annotations

import jax
import numpy as np

from fusedllm.kernels import packed
from fusedllm.qarray import QuantArray
from fusedllm.quant.blocks import SCHEMES

NAMES = tuple(packed.SCHEMES)


def blocks(name: str, rows: int, width: int, rng: np.random.Generator, scale: float = 0.01) -> np.ndarray:
    """Blocks with random codes, scales of both signs up to `scale`, and minimums where the format has them."""
    scheme = SCHEMES[name]
    made = rng.integers(0, 256, (rows, width // 32, scheme.block_bytes)).astype(np.uint8)
    for number in range(1 + packed.SCHEMES[name].has_minimums):
        values = (rng.uniform(-scale, scale, made.shape[:2])).astype(np.float16)
        made[..., 2 * number : 2 * number + 2] = values[..., None].view(np.uint8)
    return made.reshape(rows, -1)


def raw(name: str, width: int, made: np.ndarray) -> QuantArray:
    """The blocks as they are in a file."""
    return QuantArray(jax.device_put(made), None, None, SCHEMES[name], (len(made), width))


def pack(name: str, width: int, made: np.ndarray) -> QuantArray:
    """The blocks in the layout of the native kernels."""
    shape = (len(made), width)
    out = np.empty(packed.packed_shape(name, shape), np.uint8)
    packed.pack_blocks(name, shape, made, out)
    return QuantArray(jax.device_put(out), None, None, packed.SCHEMES[name], shape)
