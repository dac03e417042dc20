"""`norm_linear` and `norm_swiglu`: the sum of the residual stream, its norm, and products of that, in one operation.

A token of llama-1b is 2.5 GB of weights to read, which takes a GPU half a millisecond, and a kernel that only adds or
normalizes takes as long as a tenth of a layer's reading. So for few tokens one kernel does all of it
(`few_tokens_triton.py`), and for some tokens two do (`some_tokens_triton.py`). XLA makes twelve kernels a layer of the
same (jax 0.10.2, for an H200): for each norm one that adds up squares, in a single block, and one that multiplies; q
beside k and v; gate, up and the activation; o; down, and the addition. For more tokens, and elsewhere, these are
`rms_norm`, `linear` and `swiglu` one after the other.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from fusedllm.kernels.choose import choose
from fusedllm.kernels.few_tokens_support import why_not_few_tokens, why_not_some_tokens
from fusedllm.kernels.linear import linear
from fusedllm.kernels.pallas_support import casts_float8, interprets
from fusedllm.kernels.rms_norm import rms_norm
from fusedllm.kernels.swiglu import swiglu
from fusedllm.qarray import QuantArray

Weights = tuple[jax.Array | QuantArray, ...]
Biases = tuple[jax.Array | None, ...]


def norm_linear(
    x: Float[Array, "*rows in"],
    norm: Float[Array, " in"],
    *weights: Float[Array, "_ in"] | QuantArray,
    eps: float,
    delta: Float[Array, "*rows in"] | None = None,
    precise: bool = False,
    implementation: str | None = None,
) -> tuple[Float[Array, "*rows in"], tuple[Float[Array, "*rows _"], ...]]:
    """`x + delta` (or `x`), and `linear` of its `rms_norm` with each of `weights`.

    Implementations that are kernels of their own do not round the norm before the products.

    Raises:
      ImplementationError: `implementation` names one that does not exist, can't run here, or can't read a weight.
      ValueError: see `linear`.
    """
    implementations = {"xla": _norm_linear_composed, "ffi": _norm_linear_composed, "triton": _norm_linear_triton}
    return choose("norm_linear", implementations, implementation)(x, norm, weights, eps, delta, precise, implementation)


def norm_swiglu(
    x: Float[Array, "*rows in"],
    norm: Float[Array, " in"],
    gate: Float[Array, "out in"] | QuantArray,
    up: Float[Array, "out in"] | QuantArray,
    *,
    eps: float,
    delta: Float[Array, "*rows in"] | None = None,
    biases: tuple[Float[Array, " out"] | None, Float[Array, " out"] | None] = (None, None),
    precise: bool = False,
    implementation: str | None = None,
) -> tuple[Float[Array, "*rows in"], Float[Array, "*rows out"]]:
    """`x + delta` (or `x`), and `swiglu` of the products of its `rms_norm` with `gate` and `up`, and their biases.

    Raises:
      ImplementationError, ValueError: see `norm_linear`.
    """
    implementations = {"xla": _norm_swiglu_composed, "ffi": _norm_swiglu_composed, "triton": _norm_swiglu_triton}
    return choose("norm_swiglu", implementations, implementation)(
        x, norm, (gate, up), eps, delta, biases, precise, implementation
    )


def _norm_linear_composed(
    x: jax.Array,
    norm: jax.Array,
    weights: Weights,
    eps: float,
    delta: jax.Array | None,
    precise: bool,
    asked: str | None,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    # Pallas has norms for some widths, and no activation: who asks for it is given what there is.
    beside = asked if asked in ("xla", "ffi") else None
    total, normed = rms_norm(x, norm, eps, delta=delta, implementation=beside)
    return total, linear(normed, *weights, precise=precise, implementation=asked)


def _norm_swiglu_composed(
    x: jax.Array,
    norm: jax.Array,
    weights: Weights,
    eps: float,
    delta: jax.Array | None,
    biases: Biases,
    precise: bool,
    asked: str | None,
) -> tuple[jax.Array, jax.Array]:
    total, products = _norm_linear_composed(x, norm, weights, eps, delta, precise, asked)
    gate, up = (
        product if bias is None else product + bias.astype(product.dtype)
        for product, bias in zip(products, biases, strict=True)
    )
    return total, swiglu(gate, up, implementation=asked if asked in ("xla", "ffi") else None)


def _norm_linear_triton(
    x: jax.Array,
    norm: jax.Array,
    weights: Weights,
    eps: float,
    delta: jax.Array | None,
    precise: bool,
    asked: str | None,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    if not _fits(x, norm, weights, delta):
        return _norm_linear_composed(x, norm, weights, eps, delta, precise, asked)
    from fusedllm.kernels.few_tokens_triton import products_triton  # Imports Pallas: see `pallas_support`.

    rows = x.reshape(-1, x.shape[-1])
    total, products = products_triton(
        rows,
        weights,
        norm=norm,
        delta=None if delta is None else delta.reshape(rows.shape),
        eps=float(eps),
        out_dtype=np.dtype(x.dtype),
        interpret=interprets(),
        native_float8=casts_float8(),
    )
    return total.reshape(x.shape), tuple(product.reshape(*x.shape[:-1], -1) for product in products)


def _norm_swiglu_triton(
    x: jax.Array,
    norm: jax.Array,
    weights: Weights,
    eps: float,
    delta: jax.Array | None,
    biases: Biases,
    precise: bool,
    asked: str | None,
) -> tuple[jax.Array, jax.Array]:
    alike = len({weight.shape for weight in weights}) == 1
    if not alike or not _fits(x, norm, weights, delta):
        plain = weights[0].shape[1:] == norm.shape and (delta is None or delta.dtype == x.dtype)
        if alike and plain and not any(why_not_some_tokens(x, one) for one in weights):
            return _norm_then_swiglu_triton(x, norm, weights, eps, delta, biases)
        return _norm_swiglu_composed(x, norm, weights, eps, delta, biases, precise, asked)
    from fusedllm.kernels.few_tokens_triton import products_triton  # Imports Pallas: see `pallas_support`.

    rows = x.reshape(-1, x.shape[-1])
    total, (active,) = products_triton(
        rows,
        weights,
        norm=norm,
        delta=None if delta is None else delta.reshape(rows.shape),
        biases=biases,
        eps=float(eps),
        gated=True,
        out_dtype=np.dtype(x.dtype),
        interpret=interprets(),
        native_float8=casts_float8(),
    )
    return total.reshape(x.shape), active.reshape(*x.shape[:-1], -1)


def _norm_then_swiglu_triton(
    x: jax.Array, norm: jax.Array, weights: Any, eps: float, delta: jax.Array | None, biases: Biases
) -> tuple[jax.Array, jax.Array]:
    from fusedllm.kernels.some_tokens_triton import tiles_triton  # Imports Pallas: see `pallas_support`.

    total, normed = rms_norm(x, norm, eps, delta=delta)
    rows = normed.reshape(-1, x.shape[-1])
    (active,) = tiles_triton(
        rows, weights, biases=biases, gated=True, out_dtype=np.dtype(x.dtype), interpret=interprets()
    )
    return total, active.reshape(*x.shape[:-1], -1)


def _fits(x: jax.Array, norm: jax.Array, weights: Weights, delta: jax.Array | None) -> bool:
    """Whether one kernel takes all of it. Shapes that broadcast, and errors, are those of the parts."""
    width = x.shape[-1]
    plain = norm.shape == (width,) and (delta is None or (delta.shape == x.shape and delta.dtype == x.dtype))
    return plain and all(
        len(weight.shape) == 2 and weight.shape[1] == width and why_not_few_tokens(x, weight) is None
        for weight in weights
    )
