"""What the kernels for few and for some tokens take; imports no Pallas, as `pallas_support.py` does not."""

from __future__ import annotations

import math

import jax

from fusedllm.kernels.grouped import grouped_scheme
from fusedllm.kernels.packed import PLAIN_NUMBERS
from fusedllm.kernels.pallas_support import compute_capability, interprets, why_not_codes
from fusedllm.qarray import QuantArray

# That are multiplied without matrix units: beyond, the additions take as long as reading the weights.
MOST_FEW_TOKENS = 4

# That fill the shorter side of a matrix unit.
MOST_SOME_TOKENS = 16


def why_not_few_tokens(x: jax.Array, weight: jax.Array | QuantArray) -> str | None:
    """Why the kernels for few tokens can't multiply `x` `[..., in]` with `weight`, or `None` if they can."""
    tokens, scheme = math.prod(x.shape[:-1]), grouped_scheme(weight)
    if x.dtype.name not in PLAIN_NUMBERS:
        return f"it takes activations in {', '.join(PLAIN_NUMBERS)}, got {x.dtype}"
    if not 0 < tokens <= MOST_FEW_TOKENS:
        return f"it takes up to {MOST_FEW_TOKENS} tokens, got {tokens}"
    if scheme is None:
        if isinstance(weight, QuantArray):
            return f"it takes plain weights and grouped codes, got {weight.scheme.name}"
        return None if weight.dtype == x.dtype else f"it takes plain weights in {x.dtype}, got {weight.dtype}"
    if scheme.sums_integers or scheme.turned:
        return f"it rounds and turns no activations, which {scheme.name} does"
    return why_not_codes(scheme) if scheme.bits in (4, 8) else f"codes of {scheme.bits} bits, where 4 or 8 are needed"


def why_not_some_tokens(x: jax.Array, weight: jax.Array | QuantArray) -> str | None:
    """Why the kernel for some tokens can't multiply `x` `[..., in]` with `weight`, or `None` if it can."""
    tokens = math.prod(x.shape[:-1])
    if isinstance(weight, QuantArray) or weight.dtype != x.dtype:
        kind = weight.scheme.name if isinstance(weight, QuantArray) else weight.dtype
        return f"it takes plain weights in {x.dtype}, got {kind}"
    if not interprets() and compute_capability() is None:
        return "it takes more shared memory than GPUs have that are not NVIDIA's"
    # Matrix units round float32.
    if x.dtype.name not in ("bfloat16", "float16"):
        return f"it takes bfloat16 and float16, got {x.dtype}"
    return None if 0 < tokens <= MOST_SOME_TOKENS else f"it takes up to {MOST_SOME_TOKENS} tokens, got {tokens}"
