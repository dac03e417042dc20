"""`Layout`: where the arrays of one model lie on a mesh, and programs that run there."""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fusedllm.config import ModelConfig
from fusedllm.model.cache import KVCache
from fusedllm.qarray import QuantArray
from fusedllm.sharding.mesh import check_model, grid_of, parse_mesh
from fusedllm.sharding.rules import CACHE_AXES, DATA, TENSOR, spec_of

Tree = TypeVar("Tree")

EVERYWHERE = PartitionSpec()


@dataclass(frozen=True, slots=True)
class Layout:
    """A mesh with what is known of arrays on it.

    Groups of devices that answer side by side share nothing but the file that their weights come from. So the weights
    are put onto the whole mesh once, and then each group (`replicas`) is a mesh of its own with programs of its own.
    """

    mesh: Mesh

    @property
    def tp(self) -> int:
        """Devices that share the weights."""
        return self.mesh.shape[TENSOR]

    @property
    def dp(self) -> int:
        """Groups of them."""
        return self.mesh.shape[DATA]

    @property
    def lockstep(self) -> bool:
        """Whether several processes launch the programs, which they must do in the same order."""
        return self.mesh.is_multi_process

    def sharding(self, axes: Sequence[str], what: str = "an array") -> NamedSharding:
        """That of an array with these logical axes; raises as `rules.spec_of` does."""
        return NamedSharding(self.mesh, spec_of(axes, what=what))

    def counts(self, axes: Sequence[str], what: str = "an array") -> tuple[int, ...]:
        """Into how many parts each of these axes is cut."""
        return tuple(1 if axis is None else self.mesh.shape[axis] for axis in spec_of(axes, what=what))

    @property
    def cache(self) -> NamedSharding:
        """That of every array of a KV cache, scales included."""
        # Of the head's elements there is no part, and scales have no such axis.
        return self.sharding(CACHE_AXES[:2], "the KV cache")

    def everywhere(self, array: np.ndarray) -> jax.Array:
        """`array` as a whole on every device."""
        # Unlike `jax.device_put` this compares nothing between processes.
        sharding = NamedSharding(self.mesh, EVERYWHERE)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    def replicas(self) -> tuple[Layout, ...]:
        """The layout of each group."""
        return tuple(Layout(Mesh(row[None], self.mesh.axis_names)) for row in self.mesh.devices)

    def of_replica(self, whole: Tree, replica: Layout) -> Tree:
        """The group's own part of arrays that lie on the whole mesh; nothing is copied."""
        own = set(replica.mesh.devices.flat)

        def carve(array: jax.Array) -> jax.Array:
            parts = [shard.data for shard in array.addressable_shards if shard.device in own]
            return jax.make_array_from_single_device_arrays(
                array.shape, NamedSharding(replica.mesh, spec_of_array(array)), parts
            )

        carved: Tree = jax.tree.map(carve, whole)
        return carved

    def compile(self, function: Callable[..., Any], **options: Any) -> Program:
        """`function` as one program of all devices, with the options of `jax.jit`."""
        return Program(self, function, options)


class Program:
    """A function of arrays as they lie on one device, launched with those that lie on all of a mesh.

    In the program nothing is left to XLA's partitioner, which could not cut a native or a Pallas kernel: each device
    runs the function on its own parts, and what they tell one another is written out in `partition/sharded.py`.

    What goes in is cut as it lies. Of what comes out, a tuple, the KV cache is cut and all else is the same everywhere:
    the annotation of the function's result says which is which.
    """

    def __init__(self, layout: Layout, function: Callable[..., Any], options: dict[str, Any]) -> None:
        self._layout = layout
        self._function = function
        # Whatever has a name when it is launched is static.
        self._options = {name: value for name, value in options.items() if name != "static_argnames"}
        # Made at the first launch, which knows what the arguments are; one for each choice of what is static.
        self._jitted: dict[Hashable, Any] = {}

    def __call__(self, *arguments: Any, **static: Hashable) -> Any:
        """Launches it."""
        return self.jitted(*arguments, **static)(*arguments)

    def trace(self, *arguments: Any, **static: Hashable) -> Any:
        """As that of `jax.jit`."""
        return self.jitted(*arguments, **static).trace(*arguments)

    def jitted(self, *arguments: Any, **static: Hashable) -> Any:
        """What `jax.jit` made for arguments that lie as these do."""
        key = tuple(sorted(static.items()))
        if key not in self._jitted:
            mesh = self._layout.mesh
            function: Any = functools.partial(self._function, **static)
            named = self._function.func if isinstance(self._function, functools.partial) else self._function
            ins = jax.tree.map(spec_of_array, arguments)
            hint = typing.get_type_hints(named)["return"]
            results = typing.get_args(hint)
            outs = tuple(self._layout.cache.spec if result is KVCache else EVERYWHERE for result in results)

            def local(*operands: Any) -> Any:
                return function(*jax.tree.map(self._localized, operands, ins, is_leaf=_is_quantized))

            local.__name__ = named.__name__
            # What is said to be the same everywhere is: it comes from sums and gathered rows. jax can't see through
            # native calls to check that.
            spread = jax.shard_map(local, mesh=mesh, in_specs=ins, out_specs=outs, check_vma=False)
            placed = jax.tree.map(lambda spec: NamedSharding(mesh, spec), (ins, outs), is_leaf=_is_spec)
            self._jitted[key] = jax.jit(spread, in_shardings=placed[0], out_shardings=placed[1], **self._options)
        return self._jitted[key]

    def _localized(self, operand: Any, spec: Any) -> Any:
        """A quantized matrix knows its shape; on a device it is that of the part."""
        if not _is_quantized(operand):
            return operand
        sizes = [1 if axis is None else self._layout.mesh.shape[axis] for axis in spec.values]
        sizes += [1] * (len(operand.shape) - len(sizes))
        return operand.replace(shape=tuple(size // count for size, count in zip(operand.shape, sizes, strict=True)))


def spec_of_array(array: Any) -> PartitionSpec:
    """How `array` is split; one that lies on no mesh is the same everywhere."""
    sharding = getattr(array, "sharding", None)
    return sharding.spec if isinstance(sharding, NamedSharding) else EVERYWHERE


def lay_out(mesh: str, config: ModelConfig) -> Layout:
    """The layout for a mesh in the words of the user, and a model of `config`.

    Raises:
      ShardingError: it is written wrongly, there are too few devices, or the model can't be cut so.
    """
    shape = parse_mesh(mesh)
    check_model(shape, config)
    return Layout(grid_of(shape))


def _is_quantized(leaf: object) -> bool:
    return isinstance(leaf, QuantArray)


def _is_spec(leaf: object) -> bool:
    return isinstance(leaf, PartitionSpec)
