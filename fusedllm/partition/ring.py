"""The trusted side's arithmetic of products over the ring modulo 2^32: activations to codes and pads, and back.

A product of `w8a8` (`kernels/linear.py`) is a sum of integers and two scales outside of it. The sum alone runs on the
device, on codes that pads hide:

    sent      = codes + r                modulo 2^32     r uniform over the ring, so that this is, too
    received  = (codes + r) W            modulo 2^32
    sum       = received - r W           modulo 2^32     r W was computed beforehand
    out       = sum * token's scale * output's scale     float32, in this order

Where the weight's rows are turned (`w8a8-h`), so are activations before they are rounded (`kernels/hadamard.py`); from
there on nothing differs.

`sum` has a magnitude of at most 127 * 127 * 65,536 < 2^30 and comes back as it is: a masked product has the bits of the
unmasked one. This runs inside host callbacks: NumPy, or the same natively, and never JAX.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Int8, Int32

from fusedllm.kernels import native_ring
from fusedllm.kernels.hadamard import hadamard_numpy

# Codes are of -127 to 127, weights are too where this package made them.
LARGEST_CODE = 127

# As `kernels/grouped.py`: more columns might make sums that int32 does not hold.
MOST_COLUMNS = 65536

# As `kernels/quantize.py`: a token whose magnitudes are all smaller counts as zeros.
SMALLEST_TOKEN = 2.0**-88


@dataclass(frozen=True, slots=True)
class Encoded:
    """Activations on their way out.

    Attributes:
      sent: what the device gets: codes plus pads modulo 2^32, or the codes alone.
      codes: the activations, rounded to eight bits.
      scales: of tokens, float32.
    """

    sent: Int32[np.ndarray, "tokens in"]
    codes: Int8[np.ndarray, "tokens in"]
    scales: Float32[np.ndarray, "tokens 1"]


@dataclass(frozen=True, slots=True)
class Decoded:
    """A product on its way back.

    Attributes:
      out: the product, float32.
      sums: of integers, before scales.
      in_range: whether no magnitude of `sums` is above the bound.
    """

    out: Float32[np.ndarray, "tokens out"]
    sums: Int32[np.ndarray, "tokens out"]
    in_range: bool


def quantize(
    x: Float[np.ndarray, "tokens in"],
) -> tuple[Int8[np.ndarray, "tokens in"], Float32[np.ndarray, "tokens 1"]]:
    """`x` as codes from -127 to 127 and the scale of each token: bit for bit what `round_activations` returns."""
    wide = np.asarray(x, np.float32)
    magnitude = np.abs(wide).max(axis=-1, keepdims=True)
    finite = np.isfinite(magnitude)
    coded = finite & (magnitude >= np.float32(SMALLEST_TOKEN))
    scale = np.where(
        coded, magnitude * np.float32(1 / LARGEST_CODE), np.where(finite, np.float32(0), np.float32(np.nan))
    )
    inverse = np.divide(np.float32(LARGEST_CODE), magnitude, out=np.zeros_like(magnitude), where=coded)
    codes = np.rint(np.where(coded, wide, np.float32(0)) * inverse)
    return codes.astype(np.int8), scale.astype(np.float32)


def add(left: Int32[np.ndarray, "*shape"], right: Int32[np.ndarray, "*shape"]) -> Int32[np.ndarray, "*shape"]:
    """`left + right` modulo 2^32."""
    return (left.view(np.uint32) + right.view(np.uint32)).view(np.int32)


def subtract(left: Int32[np.ndarray, "*shape"], right: Int32[np.ndarray, "*shape"]) -> Int32[np.ndarray, "*shape"]:
    """`left - right` modulo 2^32."""
    return (left.view(np.uint32) - right.view(np.uint32)).view(np.int32)


def scale(
    sums: Int32[np.ndarray, "tokens out"],
    token_scales: Float32[np.ndarray, "tokens 1"],
    output_scales: Float32[np.ndarray, " out"],
) -> Float32[np.ndarray, "tokens out"]:
    """`sums` times both scales, in the order of `linear`."""
    return sums.astype(np.float32) * token_scales * output_scales


def check_weight(weight: Int8[np.ndarray, "out in"]) -> None:
    """Refuses what has no exact product over the ring.

    Raises:
      ValueError: the weight is no int8 matrix of at most 65,536 columns.
    """
    if weight.dtype != np.int8 or weight.ndim != 2 or not 0 < weight.shape[1] <= MOST_COLUMNS or not len(weight):
        raise ValueError(
            f"a product over the ring has an int8 weight of 1 to {MOST_COLUMNS} columns, got {weight.dtype} "
            f"{list(weight.shape)}."
        )


def range_bound(weight: Int8[np.ndarray, "out in"], *, native: bool | None = None) -> int:
    """The largest magnitude of an honest sum: 127 times the largest sum of a row's magnitudes.

    At most 127 * 127 * in where weights are those of `w8a8`, and less than 2^30 of any, so that a sum to which 2^31 was
    added, or a multiple of 2^31 - 1, is outside.

    Raises:
      ValueError: as `check_weight`.
    """
    check_weight(weight)
    if _use(native):
        return LARGEST_CODE * native_ring.largest_row(np.ascontiguousarray(weight))
    # In parts: int8 magnitudes would not hold 128, and wider ones of a whole vocabulary's matrix take half a gigabyte.
    part = max(1, 2**22 // weight.shape[1])
    largest = 0
    for first in range(0, len(weight), part):
        rows = np.abs(weight[first : first + part].astype(np.int16))
        largest = max(largest, int(rows.sum(axis=1, dtype=np.int64).max()))
    return LARGEST_CODE * largest


def encode(
    x: Float[np.ndarray, "tokens in"],
    pads: Int32[np.ndarray, "tokens in"] | None = None,
    *,
    turned: bool = False,
    sent: Int32[np.ndarray, "tokens in"] | None = None,
    native: bool | None = None,
) -> Encoded:
    """Rounds `x`, which is `turned` first where that is asked for, to codes and adds `pads` modulo 2^32.

    `sent` is memory for what is sent, which saves the pages of new memory where it is megabytes. `native` chooses
    compiled code, by default where it is.
    """
    sent = np.empty(x.shape, np.int32) if sent is None else sent
    if _use(native):
        wide, scales = np.ascontiguousarray(x, np.float32), np.empty((len(x), 1), np.float32)
        codes = native_ring.encode(wide, pads, sent, scales, turned=turned)
        return Encoded(sent, codes, scales)
    codes, scales = quantize(hadamard_numpy(x) if turned else x)
    sent[:] = codes if pads is None else add(codes.astype(np.int32), pads)
    return Encoded(sent, codes, scales)


def decode(
    received: Int32[np.ndarray, "tokens out"],
    pads: Int32[np.ndarray, "tokens out"] | None,
    token_scales: Float32[np.ndarray, "tokens 1"],
    output_scales: Float32[np.ndarray, " out"],
    bound: int,
    *,
    out: Float32[np.ndarray, "tokens out"] | None = None,
    sums: Int32[np.ndarray, "tokens out"] | None = None,
    native: bool | None = None,
) -> Decoded:
    """Subtracts `pads` (r W), compares magnitudes with `bound`, and scales.

    `out` and `sums` are memory for both, `native` is as for `encode`.
    """
    out = np.empty(received.shape, np.float32) if out is None else out
    sums = np.empty(received.shape, np.int32) if sums is None else sums
    if _use(native):
        received = np.ascontiguousarray(received)
        inside = native_ring.decode(received, pads, token_scales, output_scales, bound, sums, out)
        return Decoded(out, sums, inside)
    sums[:] = received if pads is None else subtract(received, pads)
    out[:] = scale(sums, token_scales, output_scales)
    return Decoded(out, sums, in_range(sums, bound))


def in_range(sums: Int32[np.ndarray, "tokens out"], bound: int) -> bool:
    """Whether no magnitude of `sums` is above `bound`."""
    return sums.size == 0 or bool(-bound <= sums.min() and sums.max() <= bound)


def product(
    x: Int32[np.ndarray, "tokens in"], weight: Int8[np.ndarray, "out in"], *, native: bool | None = None
) -> Int32[np.ndarray, "tokens out"]:
    """`x @ weight.T` modulo 2^32 on the host, for what pads make of a product.

    NumPy's way cuts numbers into halves of sixteen bits, whose float64 products are exact: sums of 65,536 products of
    magnitude 2^23 stay below 2^53.
    """
    if _use(native):
        return native_ring.product(np.ascontiguousarray(x), np.ascontiguousarray(weight))
    numbers = x.view(np.uint32)
    out = np.empty((len(x), len(weight)), np.uint32)
    low, high = ((numbers >> shift & 0xFFFF).astype(np.float64) for shift in (0, 16))
    part = max(1, 2**22 // weight.shape[1])
    for first in range(0, len(weight), part):
        rows = weight[first : first + part].astype(np.float64).T
        # Through int64, as a float64 that is negative has no unsigned number.
        sums = (low @ rows).astype(np.int64) + ((high @ rows).astype(np.int64) << 16)
        out[:, first : first + part] = sums.astype(np.uint32)
    return out.view(np.int32)


def _use(native: bool | None) -> bool:
    return native_ring.available() if native is None else native
