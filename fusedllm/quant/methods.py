"""The methods of `fusedllm.quantize` by name, and a matrix quantized by one of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fusedllm.errors import QuantizationError
from fusedllm.kernels.grouped import GroupedScheme
from fusedllm.kernels.hadamard import hadamard
from fusedllm.kernels.quantize import quantize
from fusedllm.qarray import QuantArray
from fusedllm.quant.clip import clip_grid
from fusedllm.quant.gptq import Factor, factorized, gptq_codes
from fusedllm.quant.grid import Grid, as_array, as_groups, codes_on, nearest_grid
from fusedllm.quant.hqq import hqq_grid
from fusedllm.quant.statistics import Statistics

# Rows are independent of one another given the statistics, so that large matrices are quantized in parts: what the
# methods hold besides is a few times as much.
MOST_WEIGHTS = 2**24

SCALING, GRIDS, ROUNDING = "awq", ("rtn", "clip", "hqq"), "gptq"
STEPS = (*GRIDS, SCALING, ROUNDING)


@dataclass(frozen=True, slots=True)
class Method:
    """How codes are found: up to three steps, in this order.

    Attributes:
      awq: input channels are scaled first, which another part of the model makes up for.
      grid: how scales and zero points are found: `rtn`, `clip` or `hqq`.
      gptq: codes make up for one another's errors; otherwise each is the nearest.
    """

    grid: str = "rtn"
    awq: bool = False
    gptq: bool = False

    def __str__(self) -> str:
        steps = ["awq"] * self.awq + [self.grid] * (self.grid != "rtn") + ["gptq"] * self.gptq
        return "+".join(steps) or "rtn"

    @property
    def needs_calibration(self) -> bool:
        """Whether the method looks at activations. The grids `clip` and `hqq` do where there are any."""
        return self.awq or self.gptq


def method_named(name: str | Method) -> Method:
    """The method that `name` means: `rtn`, `clip`, `hqq`, `awq`, `gptq`, or several of them joined by a plus.

    First comes `awq`, then one of `rtn`, `clip` and `hqq`, then `gptq`; any may be left out: `clip+gptq`, `awq+hqq`.

    Raises:
      QuantizationError: no name, an unknown step, or steps that do not go together in this order.
    """
    if isinstance(name, Method):
        return name
    if not isinstance(name, str):
        raise QuantizationError(f"a method is a name such as 'clip+gptq', got {name!r}.")
    steps = name.split("+")
    for step in steps:
        if step not in STEPS:
            raise QuantizationError(
                f"there is no quantization method {step!r}; known are {', '.join(STEPS)} and, joined by a plus in this "
                "order, awq, one of rtn, clip and hqq, and gptq."
            )
    grids = [step for step in steps if step in GRIDS]
    expected = [SCALING] * (SCALING in steps) + grids[:1] + [ROUNDING] * (ROUNDING in steps)
    if steps != expected:
        raise QuantizationError(
            f"the steps of {name!r} can't be joined like this: awq comes first, one of rtn, clip and hqq next, and "
            f"gptq last, as in {'+'.join(expected)!r}."
        )
    return Method(grid=(grids or ["rtn"])[0], awq=SCALING in steps, gptq=ROUNDING in steps)


def quantize_matrices(
    matrices: Sequence[tuple[jax.Array, GroupedScheme]],
    method: str | Method,
    statistics: Statistics | None = None,
    *,
    scale_dtype: DTypeLike = jnp.float16,
) -> list[QuantArray]:
    """Each of `matrices`, float `[out, in]` with its scheme, quantized by `method`; `statistics` of their one input.

    The weights are what they are: for `awq` they have been scaled already. Grids weight the error of a column by its
    mean square where there are statistics. The same arguments give the same bits. A scheme that turns its inputs is
    given turned statistics, which need the Hessian.

    Raises:
      QuantizationError: an unknown method, or one that needs statistics, or their Hessian, without them, or a Hessian
        that is not finite.
    """
    method = method_named(method)
    if method.gptq and (statistics is None or statistics.hessian is None):
        raise QuantizationError(f"the method {method} needs the Hessian of the inputs, and there is none: calibrate.")
    # By whether inputs are turned: a Hessian is factorized once for all matrices that meet the same.
    known: dict[bool, _Known] = {}
    dtype = jnp.dtype(scale_dtype)
    results = []
    for weights, scheme in matrices:
        if scheme.turned not in known:
            seen = statistics.of_turned() if scheme.turned and statistics is not None else statistics
            known[scheme.turned] = _known(method, seen)
        # Turned here, so that grids and errors are those of what is stored and of what it meets.
        matrix = hadamard(weights) if scheme.turned else weights
        parts = [_quantized(rows, scheme.unturned, method, known[scheme.turned], dtype) for rows in _in_parts(matrix)]
        results.append(dataclasses.replace(_joined(parts), scheme=scheme))
    return results


@dataclass(frozen=True)
class _Known:
    """What is known of inputs: how much an error of each column costs, and for `gptq` the Hessian's factor."""

    importance: jax.Array | None
    factor: Factor | None


def _known(method: Method, statistics: Statistics | None) -> _Known:
    if statistics is None:
        return _Known(None, None)
    factor = factorized(statistics.hessian) if method.gptq and statistics.hessian is not None else None
    if factor is not None and not bool(jnp.isfinite(factor.upper).all()):
        raise QuantizationError(
            f"the method {method} needs a finite Hessian of the inputs, and this one has no factor: what goes through "
            "the model is infinite or no number somewhere before."
        )
    return _Known(statistics.mean_square, factor)


def _quantized(
    rows: jax.Array, scheme: GroupedScheme, method: Method, known: _Known, scale_dtype: DTypeLike
) -> QuantArray:
    if not method.gptq and method.grid == "rtn":
        return quantize(rows, scheme, scale_dtype=scale_dtype)
    grid = _grid(method, rows, scheme, known.importance, scale_dtype)
    if known.factor is None:
        codes = codes_on(grid, as_groups(rows, scheme), scheme)
    else:
        grid, codes = gptq_codes(rows, known.factor, scheme, grid, scale_dtype)
    return as_array(grid, codes, scheme, rows.shape[1], scale_dtype)


def quantize_matrix(
    weights: jax.Array,
    scheme: GroupedScheme,
    method: str | Method,
    statistics: Statistics | None = None,
    *,
    scale_dtype: DTypeLike = jnp.float16,
) -> QuantArray:
    """One matrix; see `quantize_matrices`."""
    return quantize_matrices([(weights, scheme)], method, statistics, scale_dtype=scale_dtype)[0]


def _grid(
    method: Method, weights: jax.Array, scheme: GroupedScheme, importance: jax.Array | None, scale_dtype: DTypeLike
) -> Grid:
    if method.grid == "rtn":
        return nearest_grid(weights, scheme, scale_dtype)
    find = {"clip": clip_grid, "hqq": hqq_grid}[method.grid]
    return find(weights, scheme, importance, scale_dtype)


def _in_parts(weights: jax.Array) -> Iterator[jax.Array]:
    rows, width = weights.shape
    count = max(1, -(-rows * width // MOST_WEIGHTS))
    step = -(-rows // count)
    for first in range(0, rows, step):
        yield weights[first : first + step]


def _joined(parts: list[QuantArray]) -> QuantArray:
    if len(parts) == 1:
        return parts[0]
    shape = (sum(part.shape[0] for part in parts), parts[0].shape[1])
    same = [dataclasses.replace(part, shape=shape) for part in parts]
    joined: QuantArray = jax.tree.map(lambda *buffers: jnp.concatenate(buffers), *same)
    return joined
