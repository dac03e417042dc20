"""`fold_norms`: the weights of the RMS norms move into the matrices that read what is normed."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from fusedllm.calibrate.rewrite import SINGLE, Make, Read, ones, rewritten
from fusedllm.model.params import ParamSpec, describe
from fusedllm.weights.arena import aligned_empty
from fusedllm.weights.checkpoint import Checkpoint


def fold_norms(checkpoint: Checkpoint, *, dtype: DTypeLike = SINGLE) -> Checkpoint:
    """The same model with ones as the weights of its norms; the norms over a head of q and k stay as they are.

    A norm gives `g * x / rms(x)`, and its readers q, k and v, gate and up, or the head multiply that with `W`. Since
    `W (g * n) = (W diag(g)) n`, `W diag(g)` with a norm of ones says the same (arXiv:2401.15024, section 3). The head
    gets the final norm and the embedding does not, so the result is never tied: it has a `lm_head.weight`.

    Returns:
      A lazy checkpoint in `dtype`: each tensor is computed when it is read.

    Raises:
      CheckpointError: `checkpoint` does not hold the tensors that its configuration asks for.
    """
    config = dataclasses.replace(checkpoint.config, tie_embeddings=False)
    model: Any = describe(config)  # Any: a description stands where an array will
    made: dict[str, Make] = {}

    def fold(norm: ParamSpec, *readers: ParamSpec) -> None:
        made[norm.name] = ones(norm.shape)
        for matrix in readers:
            tied = matrix is model.head and checkpoint.config.tie_embeddings
            made[matrix.name] = _with_scaled_columns(model.embedding.name if tied else matrix.name, norm.name)

    for layer in model.layers:
        fold(layer.attention_norm, layer.q, layer.k, layer.v)
        fold(layer.mlp_norm, layer.gate, layer.up)
    fold(model.final_norm, model.head)
    return rewritten(checkpoint, config, made, dtype)


def _with_scaled_columns(matrix: str, norm: str) -> Make:
    def make(read: Read) -> np.ndarray:
        values = read(matrix)
        scaled = aligned_empty(values.shape, SINGLE)
        return np.multiply(values, read(norm), out=scaled)

    return make
