"""`dequantize`: grouped codes back into floats."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from fusedllm.errors import ImplementationError
from fusedllm.kernels import native_grouping
from fusedllm.kernels.choose import choose, platform
from fusedllm.kernels.grouped import grouped_scheme
from fusedllm.kernels.hadamard import hadamard
from fusedllm.kernels.pallas_support import casts_float8, interprets, why_not_codes
from fusedllm.qarray import QuantArray


def dequantize(array: QuantArray, dtype: DTypeLike = jnp.float32, *, implementation: str | None = None) -> jax.Array:
    """The values of `array`, whose scheme is a `GroupedScheme`, decoded in float32 and then rounded to `dtype`.

    Raises:
      ImplementationError: `implementation` names one that does not exist, can't run here, or can't read the scheme.
    """
    scheme = grouped_scheme(array)
    if scheme is not None and scheme.turned:
        unturned = dataclasses.replace(array, scheme=scheme.unturned)
        return hadamard(dequantize(unturned, implementation=implementation)).astype(dtype)
    if problem := "no grouped codes" if scheme is None else why_not_codes(scheme):
        if implementation in ("pallas", "triton"):
            raise ImplementationError(
                f"dequantize: the implementation {implementation!r} can't read {array.scheme.name}: {problem}."
            )
        if platform() == "gpu":
            implementation = implementation or "xla"
    implementations: dict[str, Callable[..., jax.Array]] = {
        "xla": _dequantize_xla,
        "ffi": _dequantize_ffi,
        "triton": _dequantize_triton,
    }
    return choose("dequantize", implementations, implementation)(array, np.dtype(dtype))


def _dequantize_triton(array: QuantArray, dtype: np.dtype) -> jax.Array:
    from fusedllm.kernels.dequantize_triton import dequantize_triton  # Imports Pallas: see `pallas_support`.

    return dequantize_triton(array, dtype, interprets(), casts_float8())


@functools.partial(jax.jit, static_argnums=1)
def _dequantize_xla(array: QuantArray, dtype: np.dtype) -> jax.Array:
    return array.dequantize(dtype)


@functools.partial(jax.jit, static_argnums=1)
def _dequantize_ffi(array: QuantArray, dtype: np.dtype) -> jax.Array:
    scheme = grouped_scheme(array)
    fits = scheme is not None and native_grouping.can_encode(scheme) and len(array.shape) == 2
    if scheme is None or not fits or dtype not in native_grouping.NUMBERS:
        return _dequantize_xla(array, dtype)
    buffers = [buffer for buffer in (array.values, array.scales, array.zeros) if buffer is not None]
    call = jax.ffi.ffi_call("fusedllm_dequantize", jax.ShapeDtypeStruct(array.shape, dtype))
    decoded: jax.Array = call(*buffers, group=np.int64(scheme.group_size), bits=np.int32(scheme.bits))
    return decoded
