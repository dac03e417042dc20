"""`Sharded`: the plain placement on one device of a mesh that shares the weights, with what the devices exchange.

Tensor parallelism as in Megatron-LM (arXiv:1909.08053), written out: each device has some of the heads, of the columns
of the feed-forward part and of the vocabulary. It multiplies with its own part of each matrix, by the same kernels as a
model of that size. Two sums a layer (after o and after down), one of the embedding's rows, and one gathering of logits
make the rest the same on every device. No confidentiality claim, as under `plain`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from fusedllm.model.params import Weight
from fusedllm.model.placement import Site
from fusedllm.partition.plain import Plain
from fusedllm.sharding.rules import TENSOR

Result = TypeVar("Result")

# Products of a part of the columns: the sum of what the devices have is the product.
SUMMED = ("o", "down")

# Products whose rows are needed together.
GATHERED = ("head",)


def _is_alone() -> bool:
    """Whether the device has everything: groups of one exchange nothing."""
    return int(jax.lax.axis_size(TENSOR)) == 1


@dataclass(frozen=True, slots=True)
class Sharded(Plain):
    """The placement inside of a program that runs on each device of a mesh (`sharding/layout.py`)."""

    def linear(self, site: Site, x: jax.Array, weights: tuple[Weight, ...]) -> tuple[jax.Array, ...]:
        """The product with the device's part of the weights; what needs the others' is put together."""
        return self._together(site, Plain.linear(self, site, x, weights))

    def protected(self, site: Site, function: Callable[..., Result], *operands: object, **static: Hashable) -> Result:
        """Traced where it is called; rows of the embedding come from the device that has them."""
        if site.name != "embedding" or _is_alone():
            return Plain.protected(self, site, function, *operands, **static)
        table, tokens, *rest = operands
        return self._rows(site, function, table, tokens, *rest, **static)

    def _together(self, site: Site, products: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        if _is_alone():
            return products
        with jax.named_scope(site.name):
            if site.name in SUMMED:
                return tuple(jax.lax.psum(product, TENSOR) for product in products)
            if site.name in GATHERED:
                return tuple(jax.lax.all_gather(part, TENSOR, axis=part.ndim - 1, tiled=True) for part in products)
            return products

    def _rows(
        self, site: Site, function: Callable[..., Any], table: Any, tokens: Any, *rest: Any, **static: Any
    ) -> Any:
        own = table.shape[0]
        at = tokens - jax.lax.axis_index(TENSOR) * own
        is_own = (at >= 0) & (at < own)
        rows = Plain.protected(self, site, function, table, jnp.where(is_own, at, 0), *rest, **static)
        # All but one of the summands are zeros, so that the sum is exact.
        with jax.named_scope(site.name):
            return jax.lax.psum(jnp.where(is_own[..., None], rows, 0), TENSOR)
