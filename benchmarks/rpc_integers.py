"""What the policies of integer products need in `rpc_ladder.py`: random weights in w8a8, pads beforehand, and the same
products alone.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fusedllm.config import ModelConfig
from fusedllm.kernels.quantize import quantize
from fusedllm.kernels.ring_linear import ring_linear
from fusedllm.model.placement import Site
from fusedllm.partition.pad_pool import PadPool
from fusedllm.partition.pad_supply import PadReport, PoolLimits
from fusedllm.partition.pads import site_name
from fusedllm.qarray import QuantArray
from fusedllm.quant.schemes import SCHEMES
from fusedllm.weights.checkpoint import Checkpoint, LazyTensor

W8A8 = SCHEMES["w8a8"]

# Quantized at a time, so that no matrix is ever there in float32: its rows have scales of their own.
QUANTIZED_WEIGHTS = 2**23


def quantized(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint with its matrices in w8a8, each quantized when it is read."""
    tensors = {
        name: dataclasses.replace(tensor, quantization=W8A8.name, read_quantized=functools.partial(_codes, tensor))
        if len(tensor.shape) == 2
        else tensor
        for name, tensor in checkpoint.tensors.items()
    }
    return dataclasses.replace(checkpoint, tensors=tensors)


def _codes(tensor: LazyTensor) -> QuantArray:
    """As `fusedllm quantize --scheme w8a8` makes them, in memory of the host."""
    weights = tensor.read()
    step = max(1, QUANTIZED_WEIGHTS // weights.shape[1])
    parts = [
        jax.tree.map(np.asarray, quantize(jnp.asarray(weights[first : first + step], jnp.float32), W8A8))
        for first in range(0, len(weights), step)
    ]
    # NumPy's arrays, where a type checker expects jax's.
    values, scales = (np.concatenate([getattr(part, name) for part in parts]) for name in ("values", "scales"))
    fields: dict[str, Any] = {"values": values, "scales": scales, "zeros": None}
    return QuantArray(**fields, scheme=W8A8, shape=tensor.shape)


class Pads:
    """The pads of a loaded model: made while nobody waits, and what those of one prompt took."""

    def __init__(self, pool: PadPool, rows: int) -> None:
        """Makes room for so many rows a site, and has none made behind our back."""
        pool.limits = PoolLimits(capacity=rows, low_water=0, exhausted="make")
        self._pool = pool
        self._burned_before, self._made_before = self._burned(), self._made()

    def fill(self) -> None:
        """Makes what is missing, so that no prompt waits for it; what is burned counts from here."""
        self._pool.fill()
        self._burned_before, self._made_before = self._burned(), self._made()

    def used(self) -> dict[str, float]:
        """Of the rows that were burned since `fill`: seconds that they took to draw and to multiply, and their bytes;
        and how many were made since then, while somebody waited.

        A site's rows cost what all of its rows have cost on average: the pool makes many at a time.
        """
        reports = self._pool.report()
        rows = {site: burned - self._burned_before[site] for site, burned in self._burned().items()}
        return {
            "offline": sum(count * _row_seconds(reports[site]) for site, count in rows.items()),
            "pad_bytes": sum(count * reports[site].row_bytes for site, count in rows.items()),
            "made_meanwhile": self._made() - self._made_before,
        }

    def row_seconds(self) -> float:
        """Seconds of one row at every site: the pads of a token."""
        return sum(_row_seconds(report) for report in self._pool.report().values())

    def _made(self) -> int:
        return sum(report.rows for report in self._pool.report().values())

    def _burned(self) -> dict[Any, int]:
        return {site: self._pool.ledger.counts(self._pool.session, site_name(site))[0] for site in self._pool.report()}


def _row_seconds(report: PadReport) -> float:
    return report.seconds / max(report.rows, 1)


class RingProducts:
    """The products of `masked` and `verify` on a device: int8 weights of the model's sites, operands of the ring."""

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self._product = jax.jit(ring_linear)
        width, narrow = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        hidden, ffn = config.hidden_size, config.intermediate_size
        shapes = {
            "qkv": (width + 2 * narrow, hidden),
            "o": (hidden, width),
            "gate_up": (2 * ffn, hidden),
            "down": (hidden, ffn),
        }
        sites = {Site(name, layer): shape for layer in range(config.num_layers) for name, shape in shapes.items()}
        sites[Site("head")] = (config.vocab_size, hidden)
        rng = np.random.default_rng(seed)
        # Bytes cost a tenth of what integers of a range do; 128 as a magnitude changes no time.
        self._weights = {
            site: jax.device_put(np.frombuffer(rng.bytes(rows * columns), np.int8).reshape(rows, columns))
            for site, (rows, columns) in sites.items()
        }
        self._operands: dict[tuple[int, int], jax.Array] = {}

    def __call__(self, site: Site, rows: int) -> jax.Array:
        """A site's product with so many rows."""
        weight = self._weights[site]
        return self._product(self._operand(rows, weight.shape[1]), weight)

    def prepare(self, rows: int) -> None:
        """Makes the operands, so that nobody is timed at it."""
        for weight in self._weights.values():
            jax.block_until_ready([self._operand(count, weight.shape[1]) for count in (1, rows)])

    def _operand(self, rows: int, columns: int) -> jax.Array:
        if (rows, columns) not in self._operands:
            numbers = np.random.default_rng(rows).integers(-(2**31), 2**31, (rows, columns)).astype(np.int32)
            self._operands[rows, columns] = jax.device_put(numbers)
        return self._operands[rows, columns]
