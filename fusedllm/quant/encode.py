"""Float matrices as GGUF blocks: the inverse of `blocks.py`.

Q8_0, Q4_0, Q4_1, Q5_0 and Q5_1 are written bit for bit as the `gguf` library writes them: the range of each block,
divided evenly. K-quants, which that library only reads, are searched for (`encode_k.py`), and so are the others, Q8_0
excepted, where it is known how much each column matters.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from fusedllm.errors import QuantizationError
from fusedllm.quant import encode_k, pack
from fusedllm.quant.blocks import SCHEMES

# Weights that are encoded at once: the arrays of a search stay in a core's cache. An accelerator wants more work.
_CHUNK_WEIGHTS = {"cpu": 1 << 17}
_ACCELERATOR_CHUNK_WEIGHTS = 1 << 22
# Chunks that XLA may have in work before the first of them is waited for.
_IN_FLIGHT = 4
# Below this magnitude every block decodes to zeros: half of float16's smallest number is 2^-25.
_SMALLEST = 2.0**-26
_LARGEST_HALF = 65504
# Far beyond what any format holds, and still with a reciprocal in float32.
_LARGEST_EXPONENT = 120
# What takes the place of a super-block of 256 where rows hold another number of weights: `llama-quant.cpp`.
_FALLBACKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
# A column that the calibration never saw still counts this part of the mean one.
_LEAST_IMPORTANCE = 1e-2


@dataclass(frozen=True, slots=True)
class _Encoder:
    """How a format is written.

    Attributes:
      plain: from float32 `[blocks, block size]` to what `pack` takes, in NumPy; `None` where a search is the only way.
      search: from weights, importance and units (see `encode_k`) to the same, in JAX; `None` where there is none.
      shift: what is added to the codes of the search before they are packed.
      pack: from scales and codes to bytes.
    """

    plain: Callable[[np.ndarray], tuple[np.ndarray, ...]] | None
    search: Callable[..., Any] | None
    shift: int
    pack: Callable[..., np.ndarray]


def encode(name: str, weights: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """The blocks of a matrix in the scheme `name`, uint8 `[rows, bytes of a row]`.

    Args:
      name: Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K or Q6_K.
      weights: `[rows, cols]`, any float type; encoded from float32.
      importance: how much an error in each column costs, `[cols]`: the mean square of the activations that it is
        multiplied with. By default a K-quant weighs an error by the size of the weight that it happens to.

    Raises:
      QuantizationError: another scheme, rows that are no whole blocks, NaN or infinity, weights whose scale float16
        can't hold, or an importance that has another length or is negative.
    """
    encoder = ENCODERS.get(name)
    if encoder is None:
        raise QuantizationError(f"{name} can't be written; known are: {', '.join(ENCODERS)}.")
    scheme = SCHEMES[name]
    if weights.ndim != 2 or not weights.size:
        raise QuantizationError(f"{name} is for matrices, and the shape is {weights.shape}.")
    if weights.shape[1] % scheme.block_size:
        raise QuantizationError(
            f"{name} needs rows of whole blocks of {scheme.block_size} weights, and these have {weights.shape[1]}; "
            f"{fallback(name, weights.shape[1])} fits."
        )
    columns = None if importance is None else _checked_importance(importance, weights.shape[1])
    blocks = weights.reshape(-1, scheme.block_size)
    result = np.empty((len(blocks), scheme.block_bytes), np.uint8)
    if encoder.search is None or (columns is None and encoder.plain is not None):
        chunks = _plain(encoder, blocks)
    else:
        chunks = _searched(encoder, blocks, columns)
    for start, fields in chunks:
        if not all(np.isfinite(field).all() for field in fields if field.dtype == np.float16):
            peak = float(np.abs(blocks[start : start + len(fields[0])]).max())
            raise QuantizationError(
                f"weights up to {peak:.3g} need a scale in {name} that float16 can't hold (at most {_LARGEST_HALF}): "
                "write them as BF16 or F32."
            )
        result[start : start + len(fields[0])] = encoder.pack(*fields)
    return result.reshape(len(weights), -1)


def fallback(name: str, cols: int) -> str:
    """`name`, or the type that llama.cpp takes for rows of `cols` weights, which are no whole blocks of `name`.

    For Q4_K that is Q5_0, for Q5_K Q5_1, for Q6_K Q8_0; and F16 where these don't fit either.
    """
    for candidate in (name, _FALLBACKS.get(name, name)):
        if cols % SCHEMES[candidate].block_size == 0:
            return candidate
    return "F16"


def _checked_importance(importance: np.ndarray, cols: int) -> np.ndarray:
    values = np.asarray(importance, np.float32)
    if values.shape != (cols,):
        raise QuantizationError(f"the importance has the shape {values.shape}, and there are {cols} columns.")
    mean = float(values.mean(dtype=np.float64))
    if not (np.isfinite(mean) and values.min() >= 0):
        raise QuantizationError("the importance of a column must be a number that is not negative.")
    # Only ratios matter; all of them being 0 says that nothing is known.
    return np.maximum(values / mean, _LEAST_IMPORTANCE) if mean > 0 else np.ones_like(values)


def _chunks(blocks: np.ndarray, weights: int) -> Iterator[tuple[int, np.ndarray]]:
    """About `weights` weights at a time in float32, each checked to be a number."""
    step = weights // blocks.shape[1]
    for start in range(0, len(blocks), step):
        chunk = blocks[start : start + step].astype(np.float32, copy=False)
        if not np.isfinite([chunk.min(), chunk.max()]).all():
            raise QuantizationError("the weights hold NaN or infinity, which no block can.")
        yield start, chunk


def _plain(encoder: _Encoder, blocks: np.ndarray) -> Iterator[tuple[int, tuple[np.ndarray, ...]]]:
    assert encoder.plain is not None
    for start, chunk in _chunks(blocks, _CHUNK_WEIGHTS["cpu"]):
        # A scale that float16 can't hold becomes infinite, which the caller reports.
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            fields = encoder.plain(chunk)
        yield start, fields


def _searched(
    encoder: _Encoder, blocks: np.ndarray, columns: np.ndarray | None
) -> Iterator[tuple[int, tuple[np.ndarray, ...]]]:
    """What the search finds for each chunk, a few chunks ahead of the one that is given out."""
    assert encoder.search is not None
    size = _CHUNK_WEIGHTS.get(jax.default_backend(), _ACCELERATOR_CHUNK_WEIGHTS)
    count = size // blocks.shape[1]
    per_block = None if columns is None else columns.reshape(-1, blocks.shape[1])
    waiting: deque[tuple[int, int, Any]] = deque()

    def finish() -> tuple[int, tuple[np.ndarray, ...]]:
        start, length, arrays = waiting.popleft()
        *fields, codes = (np.asarray(array)[:length] for array in arrays)
        return start, (*fields, (codes + encoder.shift).astype(np.uint8))

    for start, chunk in _chunks(blocks, size):
        # Powers of two, so that nothing is rounded; afterwards no square overflows and none vanishes.
        peak = np.abs(chunk).max(-1)
        exponents = np.where(peak < _SMALLEST, 0, np.frexp(peak)[1].clip(max=_LARGEST_EXPONENT))
        x = np.zeros((count, blocks.shape[1]), np.float32)
        np.multiply(
            chunk, np.where(peak < _SMALLEST, 0, np.ldexp(np.float32(1), -exponents))[:, None], out=x[: len(chunk)]
        )
        unit = np.ones(count, np.float32)
        unit[: len(chunk)] = np.ldexp(np.float32(1), exponents)
        weight = None if per_block is None else per_block[np.arange(start, start + count) % len(per_block)]
        waiting.append((start, len(chunk), encoder.search(x, weight, unit)))
        if len(waiting) > _IN_FLIGHT:
            yield finish()
    while waiting:
        yield finish()


def _evenly_from_zero(blocks: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """The largest magnitude becomes the code `-levels`; codes are stored from 0."""
    peak = np.take_along_axis(blocks, np.abs(blocks).argmax(-1, keepdims=True), -1)
    scale = peak / -levels
    codes = np.trunc(blocks * _inverse(scale) + np.float32(levels + 0.5))
    return _half(scale), codes.astype(np.uint8).clip(0, 2 * levels - 1)


def _evenly_from_the_minimum(blocks: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The least weight becomes 0, the largest `levels`."""
    low = blocks.min(-1, keepdims=True)
    scale = (blocks.max(-1, keepdims=True) - low) / levels
    codes = np.trunc((blocks - low) * _inverse(scale) + np.float32(0.5))
    return _half(scale), _half(low), codes.astype(np.uint8).clip(0, levels)


def _q8_0(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scale = np.abs(blocks).max(-1, keepdims=True) / 127
    codes = blocks * _inverse(scale)
    magnitude = np.abs(codes)
    whole = np.floor(magnitude)
    # Halves go away from 0 here; np.rint would take them to the even neighbour.
    return _half(scale), np.copysign(whole + (magnitude - whole >= 0.5), codes).astype(np.int8)


def _inverse(scale: np.ndarray) -> np.ndarray:
    """`1 / scale`, and 0 where that has no float32: such a block decodes to zeros whatever its codes are."""
    inverse = 1 / scale
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def _half(values: np.ndarray) -> np.ndarray:
    return values[:, 0].astype(np.float16)


ENCODERS: dict[str, _Encoder] = {
    "Q8_0": _Encoder(_q8_0, None, 0, pack.q8_0),
    "Q4_0": _Encoder(partial(_evenly_from_zero, levels=8), partial(encode_k.symmetric_blocks, levels=8), 8, pack.q4_0),
    "Q4_1": _Encoder(
        partial(_evenly_from_the_minimum, levels=15), partial(encode_k.affine_blocks, levels=15), 0, pack.q4_1
    ),
    "Q5_0": _Encoder(
        partial(_evenly_from_zero, levels=16), partial(encode_k.symmetric_blocks, levels=16), 16, pack.q5_0
    ),
    "Q5_1": _Encoder(
        partial(_evenly_from_the_minimum, levels=31), partial(encode_k.affine_blocks, levels=31), 0, pack.q5_1
    ),
    "Q4_K": _Encoder(None, partial(encode_k.affine_super_blocks, levels=15), 0, pack.q4_k),
    "Q5_K": _Encoder(None, partial(encode_k.affine_super_blocks, levels=31), 0, pack.q5_k),
    "Q6_K": _Encoder(None, partial(encode_k.symmetric_super_blocks, levels=32), 32, pack.q6_k),
}
