"""`MeshShape`: the user's `tp=2,dp=2`, whether a model can be split so, and the devices that there are for it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh

from fusedllm.config import ModelConfig
from fusedllm.errors import ShardingError
from fusedllm.sharding.rules import DATA, MESH_AXES, RULES, TENSOR


@dataclass(frozen=True, slots=True)
class MeshShape:
    """How many devices share a model's weights (`tp`), and how many such groups answer side by side (`dp`)."""

    tp: int = 1
    dp: int = 1

    @property
    def devices(self) -> int:
        """Of all groups."""
        return self.tp * self.dp

    def __str__(self) -> str:
        return f"tp={self.tp},dp={self.dp}"


def parse_mesh(text: str) -> MeshShape:
    """`tp=2,dp=2`, in any order; what is not named is 1.

    Raises:
      ShardingError: it is written otherwise, names an unknown axis or one twice, or a size is no positive integer.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, sign, size = (word.strip() for word in part.partition("="))
        if not sign:
            raise ShardingError(f"a mesh is written as in tp=2,dp=2, got {text!r}.")
        if name not in MESH_AXES:
            raise ShardingError(f"the mesh {text!r} names the axis {name!r}; known are {TENSOR} and {DATA}.")
        if name in sizes:
            raise ShardingError(f"the mesh {text!r} names the axis {name} twice.")
        if not (size.isascii() and size.isdecimal() and len(size) < 7 and int(size)):
            raise ShardingError(
                f"the mesh {text!r} gives {name} the size {size!r}; it must be an integer of at least 1."
            )
        sizes[name] = int(size)
    return MeshShape(**sizes)


def check_model(shape: MeshShape, config: ModelConfig) -> None:
    """Whether the axes of the model can be split into as many equal parts.

    Raises:
      ShardingError: one can't be; which, and what can be.
    """
    sizes = {
        "heads_dim": ("attention heads", config.num_heads),
        "kv_heads_dim": ("key and value heads", config.num_kv_heads),
        "ffn": ("columns of the feed-forward part", config.intermediate_size),
        "vocab": ("tokens of the vocabulary", config.vocab_size),
    }
    most = math.gcd(*(size for axis, (_, size) in sizes.items() if RULES[axis] == TENSOR))
    for axis, (words, size) in sizes.items():
        if RULES[axis] == TENSOR and size % shape.tp:
            possible = ", ".join(str(number) for number in range(1, most + 1) if most % number == 0)
            raise ShardingError(
                f"tp={shape.tp} does not divide the {size:,} {words} of this {config.family} model; tp can be "
                f"{possible}."
            )


def grid_of(shape: MeshShape) -> Mesh:
    """The devices as a mesh of `MESH_AXES`; a row of it is a group that shares weights.

    Where several processes take part each has as many devices of every group: then each of them sees what every group
    makes. Groups never talk to one another, so that a group a process is better done by separate servers.

    Raises:
      ShardingError: there are too few devices, or the processes can't have as many each.
    """
    processes = jax.process_count()
    if shape.tp % processes:
        raise ShardingError(
            f"{processes} processes share tp={shape.tp}, which must be a multiple of their number; groups of dp that "
            "share nothing are better served by processes of their own."
        )
    own = shape.tp // processes
    rows: list[list[jax.Device]] = [[] for _ in range(shape.dp)]
    for process in range(processes):
        local = [device for device in jax.devices() if device.process_index == process]
        if len(local) < own * shape.dp:
            there = f"jax has {len(local)} ({local[0].platform})" if local else "jax has none"
            where = "" if processes == 1 else f" in process {process}"
            simulated = (
                f"; XLA_FLAGS=--xla_force_host_platform_device_count={own * shape.dp}, set before jax is imported, "
                "makes as many of a CPU, to try it out"
                if local and local[0].platform == "cpu"
                else ""
            )
            raise ShardingError(f"the mesh {shape} needs {own * shape.dp} devices{where}, and {there}{simulated}.")
        for index, row in enumerate(rows):
            row += local[index * own : (index + 1) * own]
    grid = np.empty((shape.dp, shape.tp), object)
    for index, row in enumerate(rows):
        grid[index] = row
    return Mesh(grid, MESH_AXES)
