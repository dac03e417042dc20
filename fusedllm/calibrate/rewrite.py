"""What all rewrites share: a checkpoint made out of another, each tensor computed when it is read."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

import numpy as np
from jax.typing import DTypeLike

from fusedllm.config import ModelConfig
from fusedllm.model.params import ParamSpec, specs
from fusedllm.weights.arena import aligned_empty
from fusedllm.weights.checkpoint import Checkpoint, LazyTensor
from fusedllm.weights.convert import cast
from fusedllm.weights.load import check_tensors

SINGLE = np.dtype(np.float32)

Read = Callable[[str], np.ndarray]
"""Reads a tensor of the checkpoint that is rewritten, by its name, as float32."""

Make = Callable[[Read], np.ndarray]
"""Computes a tensor of the result, float32; what it returns belongs to nobody else."""


def rewritten(
    checkpoint: Checkpoint, config: ModelConfig, made: Mapping[str, Make], dtype: DTypeLike = SINGLE
) -> Checkpoint:
    """The checkpoint of `config` whose tensors are those of `checkpoint`, except for the ones in `made`.

    Nothing is read here. Reading a tensor of the result reads the tensors that it is made of, and keeps none of them.
    The result has exactly the tensors that `config` asks for, in `dtype`; they are computed in float32 and rounded to
    it at the end. None of them is quantized any more.

    Raises:
      CheckpointError: `checkpoint` does not hold the tensors that its own configuration asks for.
    """
    check_tensors(checkpoint, specs(checkpoint.config))
    source = cast(checkpoint, SINGLE).tensors

    def tensor(spec: ParamSpec) -> LazyTensor:
        if spec.name not in made:
            return source[spec.name]
        return LazyTensor(
            name=spec.name,
            shape=spec.shape,
            dtype=SINGLE,
            nbytes=math.prod(spec.shape) * SINGLE.itemsize,
            read=functools.partial(_read_made, made[spec.name], lambda name: source[name].read()),
        )

    tensors = {name: tensor(spec) for name, spec in specs(config).items()}
    return cast(dataclasses.replace(checkpoint, config=config, tensors=tensors), np.dtype(dtype))


def ones(shape: tuple[int, ...]) -> Make:
    """Makes a tensor of ones."""

    def make(read: Read) -> np.ndarray:
        values = aligned_empty(shape, SINGLE)
        values.fill(1)
        return values

    return make


def _read_made(make: Make, read: Read) -> np.ndarray:
    values = make(read)
    # Memory that nobody can change is what the loader hands to the device as it lies.
    values.flags.writeable = False
    return values
