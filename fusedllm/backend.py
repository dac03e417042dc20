"""What a model runs on here: dtypes, native kernels, threads, from the words of the user."""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp

from fusedllm.errors import ConfigError, ImplementationError
from fusedllm.kernels import e4m3, native, pallas_support
from fusedllm.kernels.choose import PALLAS, WAYS, platform

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
KV_DTYPES = {**DTYPES, "int8": jnp.int8, "fp8": e4m3.DTYPE}


def compute_dtype(name: str) -> Any:
    """The dtype that `name` means on this backend, or inside `traced_for` on that platform.

    Raises:
      ConfigError: a name that is none of ours.
    """
    try:
        backend = platform()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else "no device was found"
        raise ConfigError(f"jax can't start the backend that JAX_PLATFORMS asks for: {reason}.") from error
    if name == "auto":
        return jnp.float32 if backend == "cpu" else jnp.bfloat16
    if name not in DTYPES:
        raise ConfigError(f"dtype must be auto, {', '.join(DTYPES)}, got {name!r}.")
    return DTYPES[name]


def cache_dtype(name: str, automatic: Any) -> Any:
    """The dtype of a KV cache that `name` means, `automatic` for `auto`.

    Raises:
      ConfigError: a name that is none of ours.
    """
    if name == "auto":
        return automatic
    if name not in KV_DTYPES:
        raise ConfigError(f"kv_dtype must be auto, {', '.join(KV_DTYPES)}, got {name!r}.")
    return KV_DTYPES[name]


def runs_native(implementation: str | None) -> bool:
    """Whether the native kernels run, where `implementation` was asked for (`None`: the best there is).

    Raises:
      ImplementationError: one that does not exist, or one but XLA's was asked for and can't run.
    """
    if implementation not in (None, "xla", "ffi", *WAYS):
        raise ImplementationError(f"implementation must be xla, ffi, pallas, mosaic or triton, got {implementation!r}.")
    if implementation in WAYS:
        lowering = implementation if implementation in PALLAS else "triton"
        if problem := pallas_support.why_not_on(platform(), str(lowering)):
            raise ImplementationError(f"the implementation {implementation!r} can't run: {problem}.")
    if platform() != "cpu" or implementation == "xla":
        return False
    if implementation == "ffi" and (problem := native.why_unavailable()):
        raise ImplementationError(f"the implementation 'ffi' can't run: {problem}.")
    return native.available()


def kept_codes(implementation: str | None) -> Literal["codes", False]:
    """`load_params`'s `keep_quantized` for who wants no more than what the kernels of a GPU read as it is."""
    reads = platform() == "gpu" and implementation != "xla" and pallas_support.why_not_on("gpu", "triton") is None
    return "codes" if reads else False


def set_threads(threads: int, native_kernels: bool) -> None:
    """Sets how many threads the native kernels of this process use.

    Raises:
      ConfigError: no positive integer.
    """
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= native.MOST_THREADS:
        raise ConfigError(f"threads must be an integer from 1 to {native.MOST_THREADS}, got {threads!r}.")
    if native_kernels:
        native.set_threads(threads)


# Models at least this wide have eight bits by default. In narrower ones the rounding is felt (SmolLM2-135M, 576 wide:
# 0.003 nats of divergence from float32, against 0.00004 with sixteen), and their prompts take little time anyway.
WIDE = 2048


def default_activation_bits(width: int) -> int:
    """8 for models that are `width` >= 2,048 wide, 16 for others."""
    return 8 if width >= WIDE else 16


def check_activation_bits(bits: int | None) -> None:
    """Accepts 8, 16, and `None` for the default.

    Raises:
      ConfigError: anything else.
    """
    if bits not in (None, 8, 16):
        raise ConfigError(f"activation_bits must be 8 or 16, got {bits!r}.")
