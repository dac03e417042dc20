"""`widen` and `wide_twin`: the same model in a larger shape, and that model with its norms folded and rotated."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from fusedllm.calibrate.rewrite import SINGLE, Make, Read, rewritten
from fusedllm.calibrate.rotate import rotate
from fusedllm.config import ModelConfig
from fusedllm.errors import ConfigError
from fusedllm.model.params import ParamSpec, describe, specs
from fusedllm.quant.blocks import SUPER_BLOCK
from fusedllm.weights.arena import aligned_empty
from fusedllm.weights.checkpoint import Checkpoint


def widen(
    checkpoint: Checkpoint,
    hidden_size: int | None = None,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    intermediate_size: int | None = None,
    *,
    dtype: DTypeLike = SINGLE,
) -> Checkpoint:
    """The same model with more dimensions, heads or neurons, which come last and whose weights are zero.

    A size that is not given stays. Heads are added as whole groups, a key/value head with its query heads.

    An RMS norm then divides by the root of a mean over `n'` instead of `n` dimensions, which is smaller by `s =
    sqrt(n / n')`: its weights are multiplied by `s`, and epsilon by `s^2`. Norms over a head of q and k have the same
    epsilon but no more dimensions, so there q and k are multiplied by `s`, which those norms take out again.

    Returns:
      A lazy checkpoint in `dtype`: each tensor is computed when it is read.

    Raises:
      ConfigError: a size below the model's own, or another number of query heads to a key/value head.
      CheckpointError: `checkpoint` does not hold the tensors that its configuration asks for.
    """
    config = checkpoint.config
    asked = {
        "hidden_size": hidden_size,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "intermediate_size": intermediate_size,
    }
    sizes: dict[str, Any] = {name: getattr(config, name) if size is None else size for name, size in asked.items()}
    _check_sizes(config, sizes)
    shrunk = config.hidden_size / sizes["hidden_size"]
    wide = dataclasses.replace(config, **sizes, rms_norm_eps=config.rms_norm_eps * shrunk)
    factors = _factors(config, math.sqrt(shrunk))
    narrow = specs(config)
    made = {
        name: _padded(spec, factors.get(name, 1.0))
        for name, spec in specs(wide).items()
        if spec.shape != narrow[name].shape or factors.get(name, 1.0) != 1.0
    }
    return rewritten(checkpoint, wide, made, dtype)


def wide_twin(
    checkpoint: Checkpoint,
    seed: int = 0,
    *,
    hidden_size: int | None = None,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    intermediate_size: int | None = None,
    dtype: DTypeLike = SINGLE,
) -> Checkpoint:
    """The same model in a shape that every quantizer takes: widened, and then rotated, which folds its norms.

    What is not given is rounded up until the rows of every matrix are whole blocks of llama.cpp's K-quants, which have
    256 weights: the hidden size, the width of all query heads together, and that of the MLP.

    Widening comes first, because it changes the weights of the norms, which the rotation needs to be ones; and because
    `Q` then spreads the stream over the added dimensions too.

    Returns:
      A lazy checkpoint in `dtype`: each tensor is computed when it is read.

    Raises:
      ConfigError, CheckpointError: as `widen`.
    """
    config = checkpoint.config
    if num_heads is None and num_kv_heads is None:
        group = config.num_heads // config.num_kv_heads
        num_kv_heads = _round_up(config.num_kv_heads, SUPER_BLOCK // math.gcd(SUPER_BLOCK, group * config.head_dim))
        num_heads = num_kv_heads * group
    wide = widen(
        checkpoint,
        _round_up(config.hidden_size, SUPER_BLOCK) if hidden_size is None else hidden_size,
        num_heads,
        num_kv_heads,
        _round_up(config.intermediate_size, SUPER_BLOCK) if intermediate_size is None else intermediate_size,
    )
    return rotate(wide, seed, dtype=dtype)


def _check_sizes(config: ModelConfig, sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        own = getattr(config, name)
        if not isinstance(size, int) or isinstance(size, bool) or size < own:
            raise ConfigError(f"a model whose {name} is {own} can't be widened to {size!r}; ask for {own} or more.")
    heads, kv_heads = sizes["num_heads"], sizes["num_kv_heads"]
    group = config.num_heads // config.num_kv_heads
    if heads != kv_heads * group:
        raise ConfigError(
            f"the model has {group} query heads to a key/value head, so it can't be widened to {heads} over "
            f"{kv_heads}; ask for {kv_heads * group} over {kv_heads}."
        )


def _factors(config: ModelConfig, scale: float) -> dict[str, float]:
    """What is not only padded but multiplied, by name."""
    model: Any = describe(config)  # Any: a description stands where an array will
    scaled = [model.final_norm]
    for layer in model.layers:
        scaled += [layer.attention_norm, layer.mlp_norm]
        if config.qk_norm:
            scaled += [layer.q, layer.k, layer.q_bias, layer.k_bias]
    return {spec.name: scale for spec in scaled if spec is not None}


def _padded(spec: ParamSpec, factor: float) -> Make:
    def make(read: Read) -> np.ndarray:
        values = read(spec.name)
        wide = aligned_empty(spec.shape, SINGLE)
        wide.fill(0)
        inner = wide[tuple(slice(size) for size in values.shape)]
        np.multiply(values, np.float32(factor), out=inner)
        return wide

    return make


def _round_up(size: int, step: int) -> int:
    return -(-size // step) * step
