"""`dequantize`: grouped codes back into floats."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from fusedllm.kernels.choose import choose
from fusedllm.qarray import QuantArray


def dequantize(array: QuantArray, dtype: DTypeLike = jnp.float32, *, implementation: str | None = None) -> jax.Array:
    """The values of `array`, whose scheme is a `GroupedScheme`, decoded in float32 and then rounded to `dtype`.

    Raises:
      ImplementationError: `implementation` names one that does not exist or can't run here.
    """
    return choose("dequantize", {"xla": _dequantize_xla}, implementation)(array, np.dtype(dtype))


@functools.partial(jax.jit, static_argnums=1)
def _dequantize_xla(array: QuantArray, dtype: np.dtype) -> jax.Array:
    return array.dequantize(dtype)
