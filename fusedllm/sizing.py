"""`fitting_engine`: an engine's sizes from the words of the user and the memory that there is, before loading."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from fusedllm.backend import cache_dtype, compute_dtype, runs_native
from fusedllm.engine.config import DEFAULT_MAX_CONTEXT, EngineConfig
from fusedllm.engine.memory import available_bytes, cache_tokens_for, weight_bytes
from fusedllm.errors import RequestError
from fusedllm.kernels.choose import platform, traced_for
from fusedllm.partition import policies
from fusedllm.sharding.mesh import MeshShape, parse_mesh
from fusedllm.weights import registry
from fusedllm.weights.checkpoint import Checkpoint
from fusedllm.weights.open import open_checkpoint


@dataclass(frozen=True, slots=True)
class CacheSize:
    """How large the KV cache shall be, in one of three ways, or (all `None`) as the requests need; see
    `cache_tokens_for`.
    """

    fraction: float | None = None
    bytes: int | None = None
    tokens: int | None = None


def fitting_engine(
    ckpt: str | Path,
    size: CacheSize,
    *,
    batch_buckets: tuple[int, ...],
    token_budget: int,
    dtype: str = "auto",
    kv_dtype: str = "auto",
    implementation: str | None = None,
    max_context: int | None = None,
    policy: str = "plain",
    mesh: str | None = None,
    random_weights: bool = False,
    progress: bool = False,
) -> tuple[str | Path | Checkpoint, EngineConfig]:
    """What to give `load` as `ckpt` and as `engine`, so that weights and KV cache fit; nothing is read yet.

    The options are those of `load` and of `EngineConfig`.

    Raises:
      RequestError: it can't fit; the numbers are in the message.
      PolicyError: there is no such policy, or no CPU for it.
      SourceError, CheckpointError, ConfigError: as `load`.
    """
    hosted = policies.find(policy).platform == "cpu"
    # As `load` does: what a policy keeps on the CPU is sized for that, whatever multiplies.
    with traced_for(policies.find(policy).platform):
        compute, where = np.dtype(compute_dtype(dtype)), platform()
        as_filed = dtype == "auto" and runs_native(implementation)
    source: str | Path | Checkpoint = ckpt
    if random_weights:
        config = registry.architecture(ckpt)
        weights = config.num_parameters * (2 if as_filed else compute.itemsize)
    else:
        source = checkpoint = open_checkpoint(registry.resolve(ckpt, progress=progress))
        config = checkpoint.config
        weights = weight_bytes(checkpoint, None if as_filed else compute)
    context = min(config.max_position, DEFAULT_MAX_CONTEXT) if max_context is None else max_context
    if context < 1:
        raise RequestError(f"max_context must be an integer of at least 1, got {context}.")
    # Nobody's choice is left to the device.
    budget = {"token_budget": token_budget} if token_budget else {}
    sizes = EngineConfig.suited(where, max_context=context, batch_buckets=batch_buckets, **budget)
    # What follows is of one group of devices, which has the weights and its part of the cache.
    shape = MeshShape() if mesh is None else parse_mesh(mesh)
    available = available_bytes(policies.trusted_cpu()) if hosted else available_bytes()
    if available is not None and jax.default_backend() == "cpu":
        available = weights + max(0, available - weights) // shape.dp
    elif available is not None:
        available *= shape.tp
    tokens = cache_tokens_for(
        config,
        cache_dtype(kv_dtype, jnp.bfloat16 if dtype == "auto" else compute),
        max_context=context,
        max_batch=-(-sizes.max_batch // shape.dp),
        page_size=sizes.page_size,
        available=available,
        weights=weights,
        fraction=size.fraction,
        cache_bytes=size.bytes and -(-size.bytes // shape.dp),
        cache_tokens=size.tokens and -(-size.tokens // shape.dp),
    )
    return source, replace(sizes, cache_tokens=tokens * shape.dp)
