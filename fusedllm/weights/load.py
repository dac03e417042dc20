"""From a `Checkpoint` to parameters on a device, without a copy wherever the bytes can be used as they lie."""

from __future__ import annotations

import dataclasses
import math
import re
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from tqdm import tqdm

from fusedllm.config import ModelConfig
from fusedllm.errors import CheckpointError
from fusedllm.kernels import packed
from fusedllm.kernels.grouped import grouped_scheme
from fusedllm.kernels.pallas_support import why_not_codes
from fusedllm.model.params import Params, ParamSpec, describe, map_specs, specs
from fusedllm.qarray import QuantArray
from fusedllm.quant.blocks import BlockScheme
from fusedllm.sharding.layout import Layout
from fusedllm.weights.arena import ALIGNMENT, Arena, aligned_empty
from fusedllm.weights.checkpoint import Checkpoint, LazyTensor
from fusedllm.weights.spread import Spreader

# NumPy lets go of the interpreter while it casts and copies; two threads reach the memory's limit on small machines.
THREADS = 2
# The pages of a file that is packed are let go of each time that so many bytes have been read.
RELEASE_BYTES = 256 * 2**20
# Decoded at a time where a quantized matrix becomes float16.
DECODED_WEIGHTS = 2**21

# Tensors that some exporters write and that are not parameters: they are computed from the configuration.
_BUFFERS = re.compile(r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
_TIED_HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What loading took: counts of tensors, bytes on the device, and the bytes that had to be copied, by reason."""

    tensors: int
    bytes: int
    bytes_copied: int
    copies: Mapping[str, int]
    seconds: float

    @property
    def gigabytes_per_second(self) -> float:
        """Bytes on the device over the time that loading took, in 1e9 bytes a second."""
        return self.bytes / 1e9 / max(self.seconds, 1e-9)

    def __str__(self) -> str:
        text = (
            f"{self.tensors} tensors, {self.bytes / 1e9:.3f} GB in {self.seconds:.3f} s "
            f"({self.gigabytes_per_second:.1f} GB/s), {self.bytes_copied:,} bytes copied"
        )
        reasons = [f"{reason}: {count:,}" for reason, count in sorted(self.copies.items())]
        return f"{text} ({'; '.join(reasons)})" if reasons else text


def load_params(
    checkpoint: Checkpoint,
    *,
    dtype: DTypeLike | None = None,
    keep_quantized: bool | Literal["codes"] = False,
    pack: bool = False,
    device: jax.Device | None = None,
    layout: Layout | None = None,
    progress: bool = False,
) -> tuple[Params, LoadReport]:
    """The parameters of `checkpoint` on `device`, or cut over the mesh of `layout`, and a report of what was copied.

    On the CPU, read-only memory on a 64-byte boundary becomes an array as it lies (the array keeps the map alive);
    all else is copied once, straight to where it stays. `dtype=None` keeps the file's. With `keep_quantized` a matrix
    that is quantized in the file becomes a `QuantArray` with the file's blocks or codes, whatever `dtype` says; with
    `"codes"` only one of grouped codes that the kernels of a GPU read does, and all others become numbers. With `pack`
    it gets the layout of the native kernels; of those that have none there, GGUF's blocks become float16.

    Raises:
      CheckpointError: a tensor that the configuration asks for is missing or has another shape, the file has one that
        the configuration doesn't know, or a tensor can't be read.
      ShardingError: a quantized matrix can't be cut for the mesh.
    """
    started = time.perf_counter()
    wanted = specs(checkpoint.config)
    check_tensors(checkpoint, wanted)
    loader = _Loader(
        dtype=None if dtype is None else np.dtype(dtype),
        keep_quantized=keep_quantized,
        pack=pack,
        device=device or jax.devices()[0],
        release=checkpoint.release,
    )
    if layout is not None:
        loader.spreader = Spreader(layout, loader.count)
    total = sum(checkpoint.tensors[name].nbytes for name in wanted)
    arrays: dict[str, Any] = {}
    with (
        tqdm(
            total=total, desc="loading", unit="B", unit_scale=True, leave=False, disable=None if progress else True
        ) as bar,
        ThreadPoolExecutor(THREADS, thread_name_prefix="fusedllm-load") as pool,
    ):
        futures = {name: pool.submit(loader.load, checkpoint.tensors[name], spec) for name, spec in wanted.items()}
        try:
            for name, future in futures.items():
                arrays[name] = future.result()
                bar.update(checkpoint.tensors[name].nbytes)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    # What is used where it lies stays.
    if loader.copies:
        checkpoint.release()
    params = map_specs(lambda spec: arrays[spec.name], describe(checkpoint.config))
    report = LoadReport(
        tensors=len(arrays),
        bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
        bytes_copied=sum(loader.copies.values()),
        copies=dict(loader.copies),
        seconds=time.perf_counter() - started,
    )
    return params, report


def check_tensors(checkpoint: Checkpoint, wanted: Mapping[str, ParamSpec]) -> None:
    """Compares the tensors of `checkpoint` with those that its configuration asks for; reads none of them.

    Raises:
      CheckpointError: the first one that is missing, has another shape or a dtype that is no float, or is unknown.
    """
    where = checkpoint.path
    for name, spec in wanted.items():
        tensor = checkpoint.tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"{where} has no tensor {name!r}; the model needs one of shape {list(spec.shape)}.")
        if tensor.shape != spec.shape:
            raise CheckpointError(
                f"{where}: {name!r} has the shape {list(tensor.shape)}, and its configuration asks for "
                f"{list(spec.shape)}."
            )
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise CheckpointError(f"{where}: {name!r} is {tensor.dtype}; weights must be floating-point numbers.")
    for name in checkpoint.tensors:
        if name not in wanted and not _can_be_ignored(name, checkpoint.config):
            raise CheckpointError(f"{where} has the tensor {name!r}, which its configuration has no place for.")


def wanted_tensors(checkpoint: Checkpoint) -> list[str]:
    """The names of the tensors that the configuration asks for, in its order; checked as `check_tensors` does."""
    wanted = specs(checkpoint.config)
    check_tensors(checkpoint, wanted)
    return list(wanted)


def _can_be_ignored(name: str, config: ModelConfig) -> bool:
    return bool(_BUFFERS.search(name)) or (config.tie_embeddings and name == _TIED_HEAD)


def _kernels_read(array: QuantArray) -> bool:
    scheme = grouped_scheme(array)
    return scheme is not None and why_not_codes(scheme) is None


@dataclass
class _Loader:
    dtype: np.dtype | None
    keep_quantized: bool | Literal["codes"]
    pack: bool
    device: jax.Device
    release: Callable[[], object]
    # Where packed matrices lie: small ones too are then in huge pages of memory.
    arena: Arena = dataclasses.field(default_factory=Arena)
    unreleased: int = 0
    copies: dict[str, int] = dataclasses.field(default_factory=dict)
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    # Where there is a mesh.
    spreader: Spreader | None = None

    def load(self, tensor: LazyTensor, spec: ParamSpec) -> jax.Array | QuantArray:
        if self.keep_quantized and tensor.read_quantized is not None and len(tensor.shape) == 2:
            array = tensor.read_quantized()
            if self.keep_quantized != "codes" or _kernels_read(array):
                return self._quantized(tensor, array, spec)
        values = tensor.read()
        _check_shape(tensor, values.shape)
        reason = f"dequantized from {tensor.quantization}" if tensor.quantization else None
        dtype = values.dtype if self.dtype is None else self.dtype
        if self.spreader is not None:
            return self.spreader.plain(values, dtype, spec, reason)
        return self._put(values, dtype, reason)

    def _quantized(self, tensor: LazyTensor, array: QuantArray, spec: ParamSpec) -> jax.Array | QuantArray:
        _check_shape(tensor, array.shape)
        if self.spreader is not None:
            return self._spread(array, spec, self.spreader)
        if self.pack:
            layout = packed.layout_of(array)
            if layout is not None:
                return self._packed(array, layout)
            if isinstance(array.scheme, BlockScheme):
                narrow = self._narrowed(array, array.scheme)
                return self._put(narrow, narrow.dtype, f"dequantized from {array.scheme.name}")
        placed: QuantArray = jax.tree.map(lambda leaf: self._put(leaf, leaf.dtype), array)
        return placed

    def _spread(self, array: QuantArray, spec: ParamSpec, spreader: Spreader) -> jax.Array | QuantArray:
        if not self.pack:
            return spreader.codes(array, spec)
        if isinstance(array.scheme, BlockScheme) and packed.layout_of(array) is None:
            narrow = self._narrowed(array, array.scheme)
            return spreader.plain(narrow, narrow.dtype, spec, f"dequantized from {array.scheme.name}")
        placed = spreader.packed(array, spec)
        self._count_released(array.nbytes)
        return spreader.codes(array, spec) if placed is None else placed

    def _packed(self, array: QuantArray, layout: packed.PackedScheme) -> QuantArray:
        shape = layout.packed_shape(array.shape)
        place = self.arena.take(math.prod(shape)).reshape(shape)
        packed.pack(array, layout, place)
        values = self._put(place, place.dtype, f"packed from {array.scheme.name}")
        self._count_released(array.nbytes)
        return QuantArray(values, None, None, layout, array.shape)

    def _narrowed(self, blocks: QuantArray, scheme: BlockScheme) -> np.ndarray:
        """float16, decoded some rows at a time: a whole matrix of float32 would be the most that loading ever holds."""
        rows, width = blocks.shape
        narrow = aligned_empty((rows, width), np.dtype(np.float16))
        step = max(1, DECODED_WEIGHTS // width)
        for first in range(0, rows, step):
            part = narrow[first : first + step]
            with np.errstate(over="ignore"):
                part[...] = scheme.decode_numpy(np.asarray(blocks.values[first : first + step]), part.shape)
        self._count_released(blocks.values.nbytes)
        return narrow

    def _count_released(self, nbytes: int) -> None:
        """Lets go of the file's pages now and then: what is packed is not read again."""
        with self.lock:
            self.unreleased += nbytes
            if self.unreleased < RELEASE_BYTES:
                return
            self.unreleased = 0
        self.release()

    def _put(self, values: np.ndarray, dtype: np.dtype, reason: str | None = None) -> jax.Array:
        if values.dtype != dtype:
            reason = reason or f"cast from {values.dtype} to {dtype}"
        if self.device.platform != "cpu":
            # The transfer is asynchronous and holds the host's copy: waiting bounds how many of them are alive.
            array: jax.Array = jax.device_put(values.astype(dtype, copy=False), self.device)
            array.block_until_ready()
            self.count(reason or f"from the host to the {self.device.platform}", array.nbytes)
            return array
        # Writeable memory would be aliased too, and then whoever writes to it writes into the model.
        if values.dtype != dtype or (values.flags.writeable and reason is None) or _is_unaligned(values):
            reason = reason or ("not 64-byte aligned" if _is_unaligned(values) else "writeable memory")
            copy = aligned_empty(values.shape, dtype)
            np.copyto(copy, values, casting="unsafe")
            values = copy
        values.flags.writeable = False
        array = jax.device_put(values, self.device)
        if reason is None and array.unsafe_buffer_pointer() != values.ctypes.data:
            reason = "copied by the runtime"
        if reason is not None:
            self.count(reason, array.nbytes)
        return array

    def count(self, reason: str, nbytes: int) -> None:
        with self.lock:
            self.copies[reason] = self.copies.get(reason, 0) + nbytes


def _check_shape(tensor: LazyTensor, shape: tuple[int, ...]) -> None:
    if shape != tensor.shape:
        raise CheckpointError(f"{tensor.name!r} was read as {list(shape)} and not as {list(tensor.shape)}.")


def _is_unaligned(values: np.ndarray) -> bool:
    return values.ctypes.data % ALIGNMENT != 0 or not values.flags.c_contiguous
