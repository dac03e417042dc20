"""The core of `quantize`: layers in, a batch of a quantized table out, and what it took.

Rounding to the nearest runs in the native library, on the input's memory and into Arrow's, one call for all layers of a
batch. Other methods, and machines without the library, go through XLA layer by layer.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa

from fusedllm.errors import QuantizationError
from fusedllm.kernels import native, native_grouping
from fusedllm.kernels.dequantize import dequantize
from fusedllm.kernels.grouped import GroupedScheme
from fusedllm.kernels.quantize import quantize
from fusedllm.qarray import QuantArray
from fusedllm.quant.layers import Layers
from fusedllm.quant.report import LayerReport
from fusedllm.quant.schemes import scheme_named
from fusedllm.quant.table import Memory, Place, table_schema

# What a rule says of layers that are to stay as they are.
KEEP = "keep"
# What XLA's CPU client asks of host memory that it uses as a device buffer.
ALIGNMENT = 64
ROUND = "rtn"
UNTOUCHED = "none"

# How one matrix `[rows, width]` of the layer of that name becomes codes.
Method = Callable[[str, jax.Array, GroupedScheme], QuantArray]


@dataclass(frozen=True)
class Plan:
    """What becomes of which layer.

    Attributes:
      scheme: of layers that no rule names.
      rules: patterns (`re.search`) of names, and the scheme or `keep` for the layers that they find; the first one
        decides.
      method: the name of how codes are chosen.
      choose: the method itself, where it is not rounding to the nearest.
      scale_dtype: of scales and zero points.
      schemes: of single layers by their names, before any rule.
    """

    scheme: GroupedScheme
    rules: Mapping[str, GroupedScheme | None] = field(default_factory=dict)
    method: str = ROUND
    choose: Method | None = None
    scale_dtype: np.dtype = field(default_factory=lambda: np.dtype(np.float16))
    schemes: Mapping[str, GroupedScheme | None] = field(default_factory=dict)

    def scheme_of(self, name: str, shape: tuple[int, ...], declared: bool) -> GroupedScheme | None:
        """The scheme of a layer; `None` for one that stays: what a rule keeps, and vectors that are said to be such."""
        if name in self.schemes:
            return self.schemes[name]
        for pattern, scheme in self.rules.items():
            if re.search(pattern, name):
                return scheme
        return None if declared and len(shape) < 2 else self.scheme


def plan_rules(rules: Mapping[str, str] | None) -> dict[str, GroupedScheme | None]:
    """Rules as `Plan` takes them.

    Raises:
      QuantizationError: no mapping, a pattern that is no regular expression, or an unknown scheme.
    """
    if not isinstance(rules, Mapping | None) or not all(isinstance(pattern, str) for pattern in rules or ()):
        raise QuantizationError(f"rules are a mapping from regular expressions to schemes or 'keep', got {rules!r}.")
    found: dict[str, GroupedScheme | None] = {}
    for pattern, scheme in (rules or {}).items():
        try:
            re.compile(pattern)
        except re.error as error:
            raise QuantizationError(f"the rule {pattern!r} is no regular expression: {error}.") from error
        found[pattern] = None if scheme == KEEP else scheme_named(scheme)
    return found


def encode(
    layers: Layers, plan: Plan, metadata: Mapping[bytes, bytes], started: float
) -> tuple[pa.RecordBatch, list[LayerReport]]:
    """A batch of a quantized table; `started` is when (`time.perf_counter`) the work on these layers began.

    Raises:
      QuantizationError: a weight is infinite or no number, or too large for float16 scales; the layer is named.
    """
    work = _Work.of(layers, plan)
    work.run()
    pairs = [(place.scheme, dtype) for place, dtype in zip(work.places, layers.dtypes, strict=True)]
    kinds = [(8 * dtype.itemsize, 0) if scheme is None else (scheme.bits, scheme.group_size) for scheme, dtype in pairs]
    names = [dtype.name if scheme is None else scheme.name for scheme, dtype in pairs]
    methods = [UNTOUCHED if scheme is None else plan.method for scheme, _ in pairs]
    schema = table_schema(plan.scale_dtype, metadata)
    batch = work.memory.batch(schema, layers.names, layers.shapes, names, kinds, methods)
    return batch, work.reports(names, methods, started)


def encode_arrays(layers: Layers, plan: Plan) -> list[QuantArray]:
    """The layers as arrays on the default device; on the CPU they are used where they were made. Raises as `encode`."""
    work = _Work.of(layers, plan, ALIGNMENT)
    work.run()
    return [work.array(index) for index in range(len(layers))]


@dataclass
class _Work:
    layers: Layers
    places: list[Place]
    memory: Memory
    plan: Plan
    jobs: np.ndarray
    copied: dict[int, tuple[int, str]] = field(default_factory=dict)

    @classmethod
    def of(cls, layers: Layers, plan: Plan, alignment: int = 1) -> _Work:
        known: dict[object, Place] = {}
        places = []
        for name, shape, declared, dtype in zip(
            layers.names, layers.shapes, layers.declared, layers.dtypes, strict=True
        ):
            scheme = plan.scheme_of(name, shape, declared)
            key = (shape, scheme, dtype.itemsize)
            place = known.get(key)
            if place is None:
                place = known[key] = Place.of(shape, scheme, dtype.itemsize)
            places.append(place)
        memory = Memory(places, plan.scale_dtype, alignment)
        return cls(layers, places, memory, plan, np.zeros(len(layers), native_grouping.JOB))

    def array(self, index: int) -> QuantArray:
        place, shape = self.places[index], self.layers.shapes[index]
        assert place.scheme is not None

        def put(kind: int) -> jax.Array:
            part = self.memory.part(kind, index).reshape(*shape[:-1], -1)
            part.flags.writeable = False
            array: jax.Array = jax.device_put(part)
            return array

        return QuantArray(put(0), put(1), put(2) if place.zeros else None, place.scheme, shape)

    def run(self) -> None:
        native_rows = []
        is_native = self.plan.choose is None and native.available()
        for index, place in enumerate(self.places):
            if place.scheme is None:
                self._keep(index)
            elif is_native and native_grouping.can_encode(place.scheme):
                native_rows.append(index)
            else:
                self._choose(index, place, place.scheme)
        if native_rows:
            self._encode(native_rows)
        for index in np.flatnonzero(self.jobs["problem"]).tolist():
            self._refuse(index)

    def _encode(self, rows: list[int]) -> None:
        layers, places = self.layers, self.places
        jobs = np.zeros(len(rows), native_grouping.JOB)
        addresses = self.memory.addresses[rows]
        jobs["weights"] = [layers.addresses[row] for row in rows]
        jobs["codes"], jobs["scales"] = addresses[:, 0], addresses[:, 1]
        jobs["rows"] = [places[row].rows for row in rows]
        jobs["width"] = [places[row].width for row in rows]
        jobs["number"] = [native_grouping.NUMBERS[layers.dtypes[row]] for row in rows]
        jobs["wide"] = self.plan.scale_dtype == np.float32
        has_zeros = np.array([places[row].zeros > 0 for row in rows])
        jobs["zeros"] = np.where(has_zeros, addresses[:, 2], 0)
        chosen = [places[row].scheme for row in rows]
        jobs["group"] = [scheme.group_size for scheme in chosen if scheme is not None]
        jobs["bits"] = [scheme.bits for scheme in chosen if scheme is not None]
        native_grouping.encode(jobs)
        self.jobs[rows] = jobs

    def _keep(self, index: int) -> None:
        started = time.perf_counter()
        weights = self.layers.view(index)
        part = self.memory.part(0, index)
        part[...] = weights.reshape(-1).view(np.uint8)
        if not np.isfinite(weights).all():
            self.jobs["problem"][index] = native_grouping.NOT_FINITE
        self.copied[index] = (part.nbytes, "left as it is")
        self.jobs["seconds"][index] = time.perf_counter() - started

    def _choose(self, index: int, place: Place, scheme: GroupedScheme) -> None:
        started = time.perf_counter()
        weights = jnp.asarray(self.layers.view(index)).reshape(place.rows, place.width)
        if not bool(jnp.isfinite(weights).all()):
            self.jobs["problem"][index] = native_grouping.NOT_FINITE
            return
        if self.plan.choose is None:
            array = quantize(weights, scheme, scale_dtype=self.plan.scale_dtype)
        else:
            array = self.plan.choose(self.layers.names[index], weights, scheme)
        error, power = _error(weights, array)
        buffers = (array.values, array.scales, array.zeros)
        for kind, buffer in enumerate(buffers):
            if buffer is not None:
                self.memory.part(kind, index)[...] = np.asarray(buffer).reshape(-1)
        self.copied[index] = (array.nbytes, "made by XLA")
        job = self.jobs[index]
        job["error"], job["power"] = float(error), float(power)
        if array.scales is not None and not bool(jnp.isfinite(array.scales).all()):
            job["problem"] = native_grouping.SCALE_TOO_LARGE
        job["seconds"] = time.perf_counter() - started

    def _refuse(self, index: int) -> None:
        name = self.layers.names[index]
        if self.jobs["problem"][index] & native_grouping.NOT_FINITE:
            weights = self.layers.view(index).reshape(-1)
            place = int(np.flatnonzero(~np.isfinite(weights))[0])
            raise QuantizationError(f"layer {name!r} has {weights[place]} at place {place:,} of its weights.")
        raise QuantizationError(
            f"layer {name!r} has weights too large for float16 scales; ask for scale_dtype='float32'."
        )

    def reports(self, schemes: list[str], methods: list[str], started: float) -> list[LayerReport]:
        layers, places = self.layers, self.places
        power, seconds = self.jobs["power"], self.jobs["seconds"].tolist()
        errors = np.sqrt(np.divide(self.jobs["error"], power, out=np.zeros_like(power), where=power > 0)).tolist()
        item = self.plan.scale_dtype.itemsize
        # What no layer's own quantizing took is everybody's share of the conversion.
        share = max(0.0, time.perf_counter() - started - sum(seconds)) / max(1, len(layers))
        made = []
        for index, place in enumerate(places):
            copied, reason = self.copied.get(index, (0, ""))
            if layers.copied[index]:
                copied, reason = copied + layers.copied[index], ", ".join(filter(None, (layers.reasons[index], reason)))
            made.append(
                LayerReport(
                    layers.names[index],
                    schemes[index],
                    methods[index],
                    layers.shapes[index],
                    seconds[index] + share,
                    share,
                    place.rows * place.width * layers.dtypes[index].itemsize,
                    place.code_bytes + item * (place.numbers + place.zeros),
                    copied,
                    reason,
                    errors[index],
                )
            )
        return made


@jax.jit
def _error(weights: jax.Array, array: QuantArray) -> tuple[jax.Array, jax.Array]:
    """Squared errors and squared weights, in units of the largest weight, so that no square overflows or is lost."""
    exact = weights.astype(jnp.float32)
    peak = jnp.abs(exact).max()
    unit = jnp.where(peak > 0, peak, 1)
    off = dequantize(array, implementation="xla") - exact
    return jnp.square(off / unit).sum(), jnp.square(exact / unit).sum()
