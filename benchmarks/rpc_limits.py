"""What the machine can do at all, for the table of `rpc_ladder.py`: the fastest products and the fastest reading."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from common import READ_BYTES, ReadBandwidth

from fusedllm.kernels.ring_linear import LIMBS, ring_linear

# A product as large as the machine does in a moment.
SIZE = {"cpu": 2048}
SIZE_ELSEWHERE = 8192
LAUNCHES = 3


def limits(weights: Any, activations: Any, ours: Callable[..., Any], size: int | None = None) -> dict[str, Any]:
    """Operations a second of a product of floats and of one of int8, and bytes a second from the device's memory.

    Of each the fastest that was found, by XLA and by our own kernels: what something exceeds is no limit.

    Args:
      weights: their dtype.
      activations: theirs.
      ours: the engine's product, `(x, weight)`.
      size: of the products.
    """
    size = size or SIZE.get(jax.default_backend(), SIZE_ELSEWHERE)
    floats, integers = _floats(size, weights, activations, ours), _integers(size)
    by = max(floats, key=lambda name: floats[name])
    return {
        "size": size,
        "operations_per_second": floats[by],
        "by": by,
        "integer_operations_per_second": max(integers.values()),
        "integers_by": max(integers, key=lambda name: integers[name]),
        "read_rate": _read_rate(),
    }


def _floats(size: int, weights: Any, activations: Any, ours: Callable[..., Any]) -> dict[str, float]:
    x = jax.random.normal(jax.random.key(0), (size, size))
    narrow, active = x.astype(weights), x.astype(activations)
    product = jax.jit(lambda a, b: jnp.dot(a, b.T, preferred_element_type=jnp.float32))
    runs: dict[str, Callable[[], Any]] = {
        "float32 by XLA": lambda: product(x, x),
        f"{narrow.dtype} by XLA": lambda: product(narrow, narrow),
        f"{narrow.dtype} by our kernels": lambda: ours(active, narrow),
    }
    return {name: 2 * size**3 / _fastest(run) for name, run in runs.items()}


def _integers(size: int) -> dict[str, float]:
    x = jax.random.randint(jax.random.key(0), (size, size), -(2**31), 2**31 - 1, jnp.int32)
    small = x.astype(jnp.int8)
    product = jax.jit(lambda a, b: jnp.dot(a, b.T, preferred_element_type=jnp.int32))
    ring = jax.jit(ring_linear)
    return {
        "by XLA": 2 * size**3 / _fastest(lambda: product(small, small)),
        "as limbs of the ring": LIMBS * 2 * size**3 / _fastest(lambda: ring(x, small)),
    }


def _read_rate() -> float:
    if jax.default_backend() == "cpu":
        return ReadBandwidth(os.cpu_count() or 1).sample()
    numbers = jnp.ones(READ_BYTES // 4, jnp.float32)
    return READ_BYTES / _fastest(functools.partial(jax.jit(jnp.max), numbers))


def _fastest(run: Callable[[], Any]) -> float:
    """Seconds of the fastest of some launches."""
    jax.block_until_ready(run())
    best = float("inf")
    for _ in range(LAUNCHES):
        began = time.perf_counter()
        jax.block_until_ready(run())
        best = min(best, time.perf_counter() - began)
    return best
