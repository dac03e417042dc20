"""How large the KV cache may be: bytes of a position, bytes that there are, and how many positions go into them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import psutil  # type: ignore[import-untyped]
from jax.typing import DTypeLike

from fusedllm.config import ModelConfig
from fusedllm.errors import RequestError
from fusedllm.kernels import e4m3
from fusedllm.weights.checkpoint import Checkpoint, LazyTensor

# Of the memory that weights leave, where nobody says how much: programs and their intermediate results want some too.
DEFAULT_FRACTION = 0.5

# A scale of float32 for each position and head of an int8 cache.
SCALE_BYTES = 4

# What version 1 of cgroups reports for "no limit" is the largest multiple of a page in 63 bits; no machine has that.
UNLIMITED = 2**60


def bytes_per_position(config: ModelConfig, dtype: DTypeLike) -> int:
    """Bytes that one position of one request takes in a KV cache of `dtype`: K and V of all layers, scales included."""
    kind = jnp.dtype(e4m3.CODES if jnp.dtype(dtype) == e4m3.DTYPE else dtype)
    head = config.head_dim * kind.itemsize + (SCALE_BYTES if kind == jnp.int8 else 0)
    return 2 * config.num_layers * config.num_kv_heads * head


def weight_bytes(checkpoint: Checkpoint, dtype: DTypeLike | None) -> int:
    """Bytes of the weights in memory, in `dtype` or (`None`) as they are in the file; an estimate from above.

    GGUF's K-quants count as float16, which they become where they have no packed layout.
    """
    return sum(_tensor_bytes(tensor, dtype) for tensor in checkpoint.tensors.values())


def _tensor_bytes(tensor: LazyTensor, dtype: DTypeLike | None) -> int:
    elements = math.prod(tensor.shape)
    if dtype is not None:
        return elements * jnp.dtype(dtype).itemsize
    is_k_quant = tensor.quantization is not None and "_K" in tensor.quantization
    return elements * 2 if is_k_quant else tensor.nbytes


def available_bytes(device: jax.Device | None = None, root: Path = Path("/")) -> int | None:
    """Bytes that this process may still take on `device` (the first one); `None` where the device does not tell.

    On a CPU that is what the machine has free or could free, and no more than its control groups leave. `root` is where
    their files are looked for.
    """
    device = device or jax.devices()[0]
    if device.platform != "cpu":
        stats: dict[str, Any] | None = device.memory_stats()
        if not stats or "bytes_limit" not in stats:
            return None
        return max(0, int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0)))
    room = control_group_bytes(root)
    free = int(psutil.virtual_memory().available)
    return free if room is None else min(free, room)


def control_group_bytes(root: Path = Path("/")) -> int | None:
    """Bytes that the control groups of this process leave it, version 2 or 1; `None` where they set no limit.

    A group's limit holds for all below it, so that every group on the way up is asked. Pages of files that nobody has
    used for a while count as free: the kernel gives them up first. (Linux, Documentation/admin-guide/cgroup-v2.rst and
    cgroup-v1/memory.rst.)
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    mount = root / "sys/fs/cgroup"
    rooms = []
    for line in lines:
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0" and not controllers:
            names = ("memory.max", "memory.current", "inactive_file")
            rooms += _rooms(mount, path, names)
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            rooms += _rooms(mount / "memory", path, names)
    return min(rooms, default=None)


def _rooms(mount: Path, path: str, names: tuple[str, str, str]) -> list[int]:
    """What each group from `path` up to the mount leaves. In a container the path may be one of the host's."""
    parts = [part for part in path.split("/") if part not in ("", "..")]
    groups = [mount.joinpath(*parts[:count]) for count in range(len(parts), -1, -1)]
    rooms = (_room(group, *names) for group in groups)
    return [room for room in rooms if room is not None]


def _room(group: Path, limit_name: str, usage_name: str, reclaimable_name: str) -> int | None:
    limit = _number(group / limit_name)
    usage = _number(group / usage_name)
    if limit is None or limit >= UNLIMITED or usage is None:
        return None
    return max(0, limit - usage + _reclaimable(group / "memory.stat", reclaimable_name))


def _number(path: Path) -> int | None:
    """The number in a file; `None` for no file, and for `max`."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _reclaimable(path: Path, name: str) -> int:
    try:
        fields = dict(line.split() for line in path.read_text().splitlines())
        return int(fields.get(name, 0))
    except (OSError, ValueError):
        return 0


def cache_tokens_for(
    config: ModelConfig,
    dtype: DTypeLike,
    *,
    max_context: int,
    max_batch: int,
    page_size: int,
    available: int | None,
    weights: int = 0,
    fraction: float | None = None,
    cache_bytes: int | None = None,
    cache_tokens: int | None = None,
) -> int:
    """Positions of the KV cache: as many as were asked for in one of three ways, or as `max_batch` requests can use.

    Args:
      config, dtype: what a position costs.
      max_context: positions that one request may use, the least that the cache will hold.
      max_batch: requests that run together.
      page_size: positions of a page; the cache has one page more than it has positions for.
      available: bytes that there are for weights and cache together, `None` if unknown.
      weights: bytes of the weights, if they are not among what is in use yet.
      fraction: of what the weights leave, which the cache may take.
      cache_bytes: which the cache may take.
      cache_tokens: positions of the cache.

    Raises:
      RequestError: more than one way was chosen, one is out of range, not one request of `max_context` fits, or what
        was asked for is more than there is.
    """
    ways = {"memory_fraction": fraction, "cache_memory": cache_bytes, "cache_tokens": cache_tokens}
    chosen = [name for name, value in ways.items() if value is not None]
    if len(chosen) > 1:
        raise RequestError(f"the size of the KV cache was given by {' and by '.join(chosen)}; choose one of them.")
    if fraction is not None and not 0 < fraction <= 1:
        raise RequestError(f"memory_fraction must be a number above 0 up to 1, got {fraction!r}.")
    for name in ("cache_memory", "cache_tokens"):
        value = ways[name]
        if value is not None and value < 1:
            raise RequestError(f"{name} must be at least 1, got {value!r}.")
    position = bytes_per_position(config, dtype)
    room = None if available is None else max(0, available - weights)
    if cache_tokens is None and cache_bytes is None:
        if room is None:
            raise RequestError(
                "this device does not tell how much memory it has; give the size of the KV cache by cache_tokens or "
                "cache_memory."
            )
        cache_bytes = int(room * (DEFAULT_FRACTION if fraction is None else fraction))
    if cache_bytes is not None:
        # Whole pages, without the null page.
        cache_tokens = max(0, cache_bytes // (position * page_size) - 1) * page_size
    if not chosen:
        cache_tokens = min(cache_tokens or 0, max_batch * max_context)
    tokens = cache_tokens or 0
    if tokens < max_context:
        raise RequestError(
            f"a request of {max_context:,} tokens needs {_mb(max_context * position)} of KV cache ({position:,} bytes "
            f"a token), and there is room for {_mb(tokens * position)}{_account(room, weights)}; lower max_context, "
            "choose kv_dtype int8 or a smaller model, or give the cache more."
        )
    if room is not None and tokens * position > room:
        raise RequestError(
            f"a KV cache of {tokens:,} tokens takes {_mb(tokens * position)} ({position:,} bytes a token), more than "
            f"there is{_account(room, weights)}; ask for less."
        )
    return tokens


def _account(room: int | None, weights: int) -> str:
    if room is None:
        return ""
    return f" ({_mb(room)} are free beside {_mb(weights)} of weights)" if weights else f" ({_mb(room)} are free)"


def _mb(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
