"""Checkpoints and single matrices of grouped codes, for the tests of formats that hold them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from fusedllm.config import ModelConfig
from fusedllm.kernels.grouped import GroupedScheme, pack, unpack
from fusedllm.kernels.quantize import quantize
from fusedllm.qarray import QuantArray
from fusedllm.quant.schemes import scheme_named
from fusedllm.weights.checkpoint import Checkpoint, LazyTensor
from fusedllm.weights.random import random_checkpoint

# Rows of 128, 64 and 192 weights: multiples of some group sizes; 100 and 68 rows: of no word of codes.
CONFIG = ModelConfig("llama", 100, 128, 192, 2, 4, 2, 16, 128, eos_token_ids=(2,))
LINEAR = tuple(
    f"model.layers.{layer}.{part}.weight"
    for layer in range(CONFIG.num_layers)
    for part in (
        *(f"self_attn.{letter}_proj" for letter in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    )
)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def host(array: QuantArray) -> QuantArray:
    """With NumPy's arrays, as readers give them."""
    parts = {name: getattr(array, name) for name in ("values", "scales", "zeros")}
    return array.replace(**{name: None if part is None else np.asarray(part) for name, part in parts.items()})


def lazy(name: str, array: QuantArray) -> LazyTensor:
    """A tensor that reads `array`."""
    return LazyTensor(
        name,
        array.shape,
        np.dtype(np.float32),
        array.nbytes,
        lambda: np.asarray(array.dequantize()),
        array.scheme.name,
        lambda: array,
    )


def quantized(
    scheme_for: Callable[[str, LazyTensor], str | None], config: ModelConfig = CONFIG, scale_dtype: str = "float16"
) -> Checkpoint:
    """Random weights, and each matrix that `scheme_for` names a scheme for quantized."""
    base = random_checkpoint(config, "float32", seed=3)
    return requantized(base, scheme_for, scale_dtype)


def requantized(
    base: Checkpoint, scheme_for: Callable[[str, LazyTensor], str | None], scale_dtype: str = "float16"
) -> Checkpoint:
    """`base` with each matrix that `scheme_for` names a scheme for quantized, the first time that it is read."""
    tensors = dict(base.tensors)
    for name, tensor in base.tensors.items():
        scheme = scheme_for(name, tensor) if len(tensor.shape) == 2 else None
        if scheme is not None:
            weights = jnp.asarray(tensor.read().astype(np.float32))
            made = quantize(weights, scheme_named(scheme), scale_dtype=scale_dtype)
            tensors[name] = lazy(name, host(made))
    return dataclasses.replace(base, tensors=tensors)


def linear_layers(scheme: str) -> Callable[[str, LazyTensor], str | None]:
    """Every linear layer in `scheme`, unless its rows are no whole groups."""
    size = scheme_named(scheme).group_size

    def scheme_for(name: str, tensor: LazyTensor) -> str | None:
        return scheme if name.endswith("_proj.weight") and not (size and tensor.shape[1] % size) else None

    return scheme_for


def random_array(
    scheme: GroupedScheme, rows: int, width: int, rng: np.random.Generator, scale_dtype: str = "float16"
) -> QuantArray:
    """Any codes, scales and zero points that the layout holds; what a row is padded with is worth nothing."""
    low, high = (-128, 128) if scheme.signed else (0, 2**scheme.bits)
    groups = scheme.groups(width)
    zeros = None if scheme.symmetric else rng.integers(low, high, (rows, groups))
    codes = rng.integers(low, high, (rows, scheme.padded(width)))
    codes[:, width:] = scheme.center if zeros is None else zeros[:, -1:]
    scales = rng.uniform(1e-4, 0.1, (rows, groups)).astype(scale_dtype)
    return QuantArray(
        pack(np, codes, scheme.bits),
        scales,
        None if zeros is None else zeros.astype(scale_dtype),
        scheme,
        (rows, width),
    )


def codes_of(array: QuantArray) -> np.ndarray:
    """The codes of the weights themselves."""
    return np.asarray(unpack(np, np.asarray(array.values), array.scheme.bits))[:, : array.shape[1]]


def assert_same(found: QuantArray, wanted: QuantArray) -> None:
    """The same scheme, and every buffer bit for bit."""
    assert (found.scheme, found.shape) == (wanted.scheme, wanted.shape)
    for name in ("values", "scales", "zeros"):
        one, other = getattr(found, name), getattr(wanted, name)
        assert (one is None) == (other is None), name
        if one is not None:
            assert (one.dtype, one.shape) == (other.dtype, other.shape), name
            assert np.asarray(one).tobytes() == np.asarray(other).tobytes(), name


def plain(tensors: Mapping[str, np.ndarray]) -> dict[str, LazyTensor]:
    """Arrays as the tensors of a file."""
    return {
        name: LazyTensor(name, value.shape, value.dtype, value.nbytes, value.view) for name, value in tensors.items()
    }


def in_memory(tensors: Mapping[str, LazyTensor]) -> Checkpoint:
    """A checkpoint of just these tensors."""
    return Checkpoint(CONFIG, tensors, None, "made", Path("made"))
