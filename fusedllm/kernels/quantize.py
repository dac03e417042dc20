"""`quantize`: a float matrix into grouped codes, each rounded to the nearest."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int8

from fusedllm.errors import ImplementationError
from fusedllm.kernels import native_grouping
from fusedllm.kernels.choose import choose, platform
from fusedllm.kernels.grouped import LARGEST_FLOAT8, GroupedScheme, pack
from fusedllm.kernels.hadamard import hadamard
from fusedllm.kernels.pallas_support import interprets, why_not_codes
from fusedllm.qarray import QuantArray

# A token whose magnitudes are all smaller counts as zeros, so that no step on the way to its codes is denormal.
SMALLEST_TOKEN = 2.0**-88

# A group whose scale would be smaller counts as zeros. It is so far above the least normal float32, 2 ** -126, that no
# denormal weight, which some processors and XLA's threads take for zero, changes a bit of what is at least as large.
SMALLEST_REACH = 2.0**-100

# No other scale is smaller: of float16 it is the least positive number.
SMALLEST_SCALE = {np.dtype(np.float16): 2.0**-24, np.dtype(np.float32): SMALLEST_REACH}


def quantize(
    weights: Float[Array, "out in"],
    scheme: GroupedScheme,
    *,
    scale_dtype: DTypeLike = jnp.float16,
    implementation: str | None = None,
) -> QuantArray:
    """`weights` in `scheme`, by its groups' extremes; a code is off by half a step at most.

    A symmetric scale spreads the group's largest magnitude over half of the codes: 127 of 8 bits, 7.5 of 4, 3.5 of 3.
    An asymmetric scale spreads the distance of the group's extremes (zero among them) over all of them, and the zero
    point is a code. Scales are rounded up to `scale_dtype`, float16 or float32, so that no weight falls off the grid.
    What is infinite or no number has no code: the caller looks. In a scheme whose rows are turned the extremes and
    codes are those of the turned rows (`kernels/hadamard.py`).

    Raises:
      ImplementationError: `implementation` names one that does not exist, can't run here, or can't write the scheme.
    """
    if scheme.turned:
        turned = quantize(hadamard(weights), scheme.unturned, scale_dtype=scale_dtype, implementation=implementation)
        return dataclasses.replace(turned, scheme=scheme)
    if problem := why_not_codes(scheme):
        if implementation in ("pallas", "triton"):
            raise ImplementationError(
                f"quantize: the implementation {implementation!r} can't write {scheme.name}: {problem}."
            )
        if platform() == "gpu":
            implementation = implementation or "xla"
    implementations: dict[str, Callable[..., QuantArray]] = {
        "xla": _quantize_xla,
        "ffi": _quantize_ffi,
        "triton": _quantize_triton,
    }
    return choose("quantize", implementations, implementation)(weights, scheme, np.dtype(scale_dtype))


def _quantize_triton(weights: jax.Array, scheme: GroupedScheme, scale_dtype: np.dtype) -> QuantArray:
    from fusedllm.kernels.quantize_triton import quantize_triton  # Imports Pallas: see `pallas_support`.

    return quantize_triton(weights, scheme, scale_dtype, interprets())


@functools.partial(jax.jit, static_argnums=(1, 2))
def _quantize_xla(weights: jax.Array, scheme: GroupedScheme, scale_dtype: np.dtype) -> QuantArray:
    rows, width = weights.shape
    padding = scheme.padded(width) - width
    groups = jnp.pad(weights.astype(jnp.float32), ((0, 0), (0, padding))).reshape(rows, scheme.groups(width), -1)
    if scheme.symmetric:
        reach = jnp.abs(groups).max(-1, keepdims=True)
        scale = round_up(reach * np.float32(1 / largest_code(scheme)), scale_dtype)
    else:
        low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
        low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
        scale = round_up((high - low) * np.float32(1 / scheme.highest), scale_dtype)
    inverse = jnp.where(scale > 0, 1 / scale.astype(jnp.float32), 0)
    steps = groups * inverse
    zero = jnp.full_like(inverse, scheme.center)
    if not scheme.symmetric:
        zero = jnp.clip(jnp.round(-low * inverse), scheme.lowest, scheme.highest)
    if scheme.codes == "float8":
        # Within half of the last bit's step of it, and the cast makes what is above no number.
        codes = jnp.clip(steps, -LARGEST_FLOAT8, LARGEST_FLOAT8).astype(jnp.float8_e4m3fn).reshape(rows, -1)
        values = jax.lax.bitcast_convert_type(codes, jnp.uint8)
    else:
        codes = jnp.clip(jnp.round(steps) + zero, scheme.lowest, scheme.highest)
        values = pack(jnp, codes.astype(jnp.int32).reshape(rows, -1), scheme.bits)
    zeros = None if scheme.symmetric else zero[..., 0].astype(scale_dtype)
    return QuantArray(values, scale[..., 0], zeros, scheme, (rows, width))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _quantize_ffi(weights: jax.Array, scheme: GroupedScheme, scale_dtype: np.dtype) -> QuantArray:
    if not native_grouping.can_encode(scheme) or weights.dtype not in native_grouping.NUMBERS:
        return _quantize_xla(weights, scheme, scale_dtype)
    rows, width = weights.shape
    numbers = jax.ShapeDtypeStruct((rows, scheme.groups(width)), scale_dtype)
    results = [jax.ShapeDtypeStruct((rows, scheme.row_bytes(width)), np.uint8), numbers]
    call = jax.ffi.ffi_call("fusedllm_quantize", results if scheme.symmetric else [*results, numbers])
    values, scales, *zeros = call(weights, group=np.int64(scheme.group_size), bits=np.int32(scheme.bits))
    return QuantArray(values, scales, zeros[0] if zeros else None, scheme, (rows, width))


def largest_code(scheme: GroupedScheme) -> float:
    """What the largest magnitude of a symmetric group becomes, in steps."""
    if scheme.codes == "float8":
        return LARGEST_FLOAT8
    # Of an even number of codes the last half step on both sides is used too.
    return 127.0 if scheme.signed else scheme.center - 0.5


def round_up(
    positive: jax.Array, dtype: np.dtype, keep: Callable[[jax.Array], jax.Array] = jax.lax.optimization_barrier
) -> jax.Array:
    """The least number of `dtype`, float16 or float32, that is not below `positive` nor below its `SMALLEST_SCALE`.

    What is smaller than `SMALLEST_REACH` becomes zero.

    `keep` returns its argument, and keeps the compiler from seeing through: XLA's for GPUs takes what was rounded to
    float16 and widened again for the number itself.
    """
    positive = jnp.where(positive >= SMALLEST_REACH, jnp.maximum(positive, SMALLEST_SCALE[np.dtype(dtype)]), 0)
    if dtype == np.float32:
        return positive
    nearest = keep(positive.astype(jnp.float16))
    bits = jax.lax.bitcast_convert_type(nearest, jnp.uint16)
    above = jax.lax.bitcast_convert_type(bits + np.uint16(1), jnp.float16)
    return jnp.where(nearest.astype(jnp.float32) < positive, above, nearest)


def round_activations(x: Float[Array, "tokens in"]) -> tuple[Int8[Array, "tokens in"], Float32[Array, "tokens 1"]]:
    """`x` as codes from -127 to 127 and the scale of each token, its largest magnitude over 127; see `linear`."""
    wide = x.astype(jnp.float32)
    magnitude = jnp.abs(wide).max(axis=-1, keepdims=True)
    finite = jnp.isfinite(magnitude)
    coded = finite & (magnitude >= np.float32(SMALLEST_TOKEN))
    # Not divided by 127: XLA would multiply with the inverse or not, as it sees fit, and that is another rounding.
    scale = jnp.where(coded, magnitude * np.float32(1 / 127), jnp.where(finite, 0, jnp.nan))
    inverse = jnp.where(coded, np.float32(127) / magnitude, 0)
    codes = jnp.where(coded, jnp.round(wide * inverse), 0)
    return codes.astype(jnp.int8), scale
