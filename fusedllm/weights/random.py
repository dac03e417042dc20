"""Seeded random weights of any configuration, made where they stay: for benchmarks and for tests of shape."""

from __future__ import annotations

import functools
import math
import statistics
import zlib
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from fusedllm.config import ModelConfig
from fusedllm.errors import CheckpointError
from fusedllm.model.params import Params, ParamSpec, specs
from fusedllm.weights.arena import aligned_empty
from fusedllm.weights.checkpoint import Checkpoint, LazyTensor
from fusedllm.weights.load import load_params

_CHUNK = 1 << 20
# A table of normal quantiles, looked up with 16 random bits, is five times as fast as NumPy's exact sampler, and its
# 65,536 values are more than bfloat16 tells apart.
_LEVELS = 1 << 16
# With a final norm of ones, this makes logits of a standard deviation near 1 at a hidden size of 2,048.
_VOCABULARY_STD = 0.02
_DTYPES = tuple(np.dtype(kind) for kind in (np.float32, np.float16, ml_dtypes.bfloat16))


def random_params(
    config: ModelConfig, dtype: DTypeLike, seed: int = 0, *, device: jax.Device | None = None, progress: bool = False
) -> Params:
    """The parameters of `config`, drawn at random on `device`; memory peaks at the weights and a chunk or two.

    Raises:
      CheckpointError: `dtype` is not float32, bfloat16 or float16.
    """
    params, _ = load_params(random_checkpoint(config, dtype, seed), device=device, progress=progress)
    return params


def random_checkpoint(config: ModelConfig, dtype: DTypeLike, seed: int = 0) -> Checkpoint:
    """A checkpoint without a file, whose tensors are drawn when they are read, the same ones every time.

    Matrices are normal with variance 1/in, so that a normed input keeps its scale; the embedding and the head have a
    standard deviation of 0.02; norms are ones and biases zeros. A tensor depends on `seed`, its name and its shape.

    Raises:
      CheckpointError: `dtype` is not float32, bfloat16 or float16.
    """
    kind = np.dtype(dtype)
    if kind not in _DTYPES:
        raise CheckpointError(f"random weights are made in float32, bfloat16 or float16, not in {kind}.")
    tensors = {
        name: LazyTensor(
            name=name,
            shape=spec.shape,
            dtype=kind,
            nbytes=math.prod(spec.shape) * kind.itemsize,
            read=functools.partial(_draw, spec, kind, seed),
        )
        for name, spec in specs(config).items()
    }
    return Checkpoint(config=config, tensors=tensors, tokenizer=None, format="random", path=Path("random weights"))


def _draw(spec: ParamSpec, dtype: np.dtype, seed: int) -> np.ndarray:
    values = aligned_empty(spec.shape, dtype)
    if spec.init == "normal":
        std = np.float32(_VOCABULARY_STD if spec.axes[0] == "vocab" else 1 / math.sqrt(spec.shape[-1]))
        # zlib.crc32 and not hash(): the latter differs between processes.
        generator = np.random.SFC64([seed % 2**64, zlib.crc32(spec.name.encode())])
        flat = values.reshape(-1)
        table = (_quantiles() * std).astype(dtype)
        for begin in range(0, flat.size, _CHUNK):
            chunk = flat[begin : begin + _CHUNK]
            bits = generator.random_raw(-(-chunk.size // 4)).astype("<u8", copy=False).view("<u2")
            # With `mode="raise"` NumPy would make a second buffer of the result.
            np.take(table, bits[: chunk.size], out=chunk, mode="clip")
    else:
        values.fill(1 if spec.init == "ones" else 0)
    values.flags.writeable = False
    return values


@functools.cache
def _quantiles() -> np.ndarray:
    normal = statistics.NormalDist()
    return np.array([normal.inv_cdf((level + 0.5) / _LEVELS) for level in range(_LEVELS)], np.float32)
