"""`RULES`: which logical axis is split over which axis of the mesh; one table for parameters, cache and activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jax.sharding import PartitionSpec

from fusedllm.errors import ShardingError

DATA, TENSOR = "dp", "tp"

# From the outside in: the devices of a `tp` lie next to one another.
MESH_AXES = (DATA, TENSOR)

# Logical axis -> axis of the mesh, or `None` where every device has the whole. Products that read `hidden` give a part
# of their rows on each device (q, k, v, gate, up, head); those that write it (o, down) sum what the devices have
# (Megatron-LM, arXiv:1909.08053).
RULES: Mapping[str, str | None] = {
    "heads_dim": TENSOR,
    "kv_heads_dim": TENSOR,
    "kv_heads": TENSOR,
    "ffn": TENSOR,
    "vocab": TENSOR,
    "hidden": None,
    "head_dim": None,
    "page_size": None,
    "batch": DATA,
    "seats": DATA,
    "pages": DATA,
}

# The axes of a layer's part of the KV cache; its scales lack the last one.
CACHE_AXES = ("pages", "kv_heads", "page_size", "head_dim")


def spec_of(
    axes: Sequence[str],
    *,
    what: str = "an array",
    rules: Mapping[str, str | None] = RULES,
    mesh_axes: Sequence[str] = MESH_AXES,
) -> PartitionSpec:
    """How an array with these logical axes is split; `what` names it in messages.

    Raises:
      ShardingError: an axis without a rule, a rule for what is no axis of the mesh, or two axes for one of the mesh.
    """
    taken: dict[str, str] = {}
    for axis in axes:
        if axis not in rules:
            raise ShardingError(
                f"{what} has the axis {axis!r}, for which there is no rule; known are {', '.join(rules)}."
            )
        target = rules[axis]
        if target is None:
            continue
        if target not in mesh_axes:
            raise ShardingError(
                f"the rule for {axis!r} names {target!r}, which is no axis of the mesh; it has {', '.join(mesh_axes)}."
            )
        if target in taken:
            raise ShardingError(
                f"{what} has two axes for {target!r} of the mesh, {taken[target]!r} and {axis!r}; one can be split."
            )
        taken[target] = axis
    return PartitionSpec(*(rules[axis] for axis in axes))
