"""`rotate`: the residual stream and the values of each head in another orthonormal basis, drawn from a seed."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float64

from fusedllm.calibrate.norms import fold_norms
from fusedllm.calibrate.rewrite import SINGLE, Make, Read, rewritten
from fusedllm.model.params import describe, specs
from fusedllm.weights.arena import aligned_empty
from fusedllm.weights.checkpoint import Checkpoint

# What is drawn from a seed is told apart by these, so that no two matrices share their random numbers.
_RESIDUAL, _VALUES = 0, 1
# Elements multiplied at a time: 8 MiB in float64, and as much again for the product. More is not faster.
_CHUNK = 1 << 20

Matrix = Callable[[], np.ndarray]


def rotate(checkpoint: Checkpoint, seed: int = 0, *, dtype: DTypeLike = SINGLE) -> Checkpoint:
    """The same model, whose residual stream `x` is `x Q` and whose heads' values `v` are `v H`.

    `Q` is `residual_rotation(hidden_size, seed)` and `H`, one for all heads of a layer, `value_rotation(head_dim,
    seed, layer)`. The norms are folded first, for only then does an RMS norm commute with `Q` (arXiv:2401.15024). A
    matrix that reads the stream becomes `W Q`, one that writes to it `Q^T W`, as in QuaRot (arXiv:2404.00456) and
    SpinQuant's R1 and R2 (arXiv:2405.16406). Products are summed in float64 and rounded to float32.

    Returns:
      A lazy checkpoint in `dtype`: each tensor is computed when it is read. It keeps the rotations from the
      first use on.

    Raises:
      CheckpointError: `checkpoint` does not hold the tensors that its configuration asks for.
    """
    folded = fold_norms(checkpoint)
    config = folded.config
    residual = _Once(functools.partial(residual_rotation, config.hidden_size, seed))
    # Which axes of a tensor are the stream or a head's values, and are therefore multiplied.
    turns: dict[str, list[tuple[int, Matrix]]] = {
        # A folded norm is the same number in each dimension, in any basis.
        name: [(axis, residual) for axis, what in enumerate(spec.axes) if what == "hidden" and spec.init != "ones"]
        for name, spec in specs(config).items()
    }
    model: Any = describe(config)  # Any: a description stands where an array will
    for index, layer in enumerate(model.layers):
        values = _Once(functools.partial(value_rotation, config.head_dim, seed, index))
        for spec, axis in ((layer.v, 0), (layer.v_bias, 0), (layer.o, 1)):
            if spec is not None:
                turns[spec.name].append((axis, values))
    return rewritten(folded, config, {name: _turned(name, axes) for name, axes in turns.items() if axes}, dtype)


def residual_rotation(hidden: int, seed: int = 0) -> Float64[np.ndarray, "hidden hidden"]:
    """The orthogonal matrix `Q` of `rotate(checkpoint, seed)` for a residual stream of `hidden` dimensions."""
    return _random_orthogonal(hidden, seed, _RESIDUAL)


def value_rotation(head_dim: int, seed: int = 0, layer: int = 0) -> Float64[np.ndarray, "head_dim head_dim"]:
    """The orthogonal matrix `H` of `rotate(checkpoint, seed)` for the values of each head of `layer`."""
    return _random_orthogonal(head_dim, seed, _VALUES, layer)


def times(values: np.ndarray, axis: int, matrix: np.ndarray) -> np.ndarray:
    """A vector or matrix with each run of `len(matrix)` elements along `axis`, as a row vector, times `matrix`.

    Summed in float64, some rows at a time, and rounded to float32.
    """
    result = aligned_empty(values.shape, SINGLE)
    source, target = (np.atleast_2d(np.moveaxis(each, axis, -1)) for each in (values, result))
    rows, width = source.shape
    step = max(1, _CHUNK // width)
    for first in range(0, rows, step):
        part = source[first : first + step]
        runs = part.astype(np.float64, order="C").reshape(-1, len(matrix))
        target[first : first + step] = (runs @ matrix).reshape(part.shape)
    return result


def _turned(name: str, turns: list[tuple[int, Matrix]]) -> Make:
    def make(read: Read) -> np.ndarray:
        values = read(name)
        for axis, matrix in turns:
            values = times(values, axis, matrix())
        return values

    return make


def _random_orthogonal(size: int, seed: int, use: int, layer: int = 0) -> np.ndarray:
    """Uniform among all orthogonal matrices (Haar): QR of a Gaussian matrix, signs by Mezzadri, arXiv:math-ph/0609050.

    The same seed gives the same matrix up to the rounding of LAPACK. It is no secret: the generator is no cipher.
    """
    # RandomState, because NumPy promises that its streams never change; those of `default_rng` may.
    # The seed comes last: it may be two words of 32 bits, and the second must not be taken for something else.
    generator = np.random.RandomState(np.random.MT19937([use, layer, seed % 2**64]))
    q, r = np.linalg.qr(generator.standard_normal((size, size)))
    # LAPACK chooses the signs of r's diagonal, and Q would lean to one side.
    return q * np.copysign(1.0, np.diagonal(r))


class _Once:
    """The result of `make`, made by the first call and kept; other threads wait for it."""

    def __init__(self, make: Matrix) -> None:
        self._make = make
        self._made: np.ndarray | None = None
        self._lock = threading.Lock()

    def __call__(self) -> np.ndarray:
        with self._lock:
            if self._made is None:
                self._made = self._make()
            return self._made
