"""`ring_linear`: the product of int32 activations with int8 weights modulo 2^32, a device's part of a masked one."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int8, Int32

from fusedllm.kernels.choose import choose
from fusedllm.kernels.grouped import MOST_INTEGER_COLUMNS
from fusedllm.kernels.pallas_support import interprets

# Of a number of 32 bits.
LIMBS = 4

# 128 in each byte, which makes unsigned bytes signed ones and back.
CENTER = np.uint32(0x80808080).view(np.int32)


def ring_linear(
    x: Int32[Array, "*rows in"], weight: Int8[Array, "out in"], *, implementation: str | None = None
) -> Int32[Array, "*rows out"]:
    """`x @ weight.T` over the ring of integers modulo 2^32, as the int32 of the same bits; exact, so that every
    implementation gives the same bits.

    No matrix unit multiplies int32, so a number becomes four limbs, signed bytes, and the product is a sum of products
    of bytes. With u = x + 0x80808080 modulo 2^32 and u's bytes u_k, least significant first, and limbs d_k = u_k - 128:

        sum_k d_k 2^(8 k) = u - 0x80808080 = x            modulo 2^32
        x W = sum_k (d_k W) 2^(8 k)                        modulo 2^32

    That is an addition and an exclusive or (0x80 in a byte is 128 less, read as signed). To split the bytes of x itself
    would leave 128 times the sums of W's rows to be added; here the carries of one addition did that. The limbs of all
    rows are stacked, so that one product of int8 with int8 reads W once. Its sums are those of at most 65,536 products
    of magnitude 2^14 and do not overflow; what overflows in the shifts and additions is what modulo 2^32 means.

    Raises:
      ImplementationError: `implementation` names one that does not exist or can't run here.
      ValueError: `x` is not int32, or the weight is not an int8 matrix `[out, in]` of 1 to 65,536 columns for this `x`.
    """
    _check(x, weight)
    implementations: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
        "xla": _ring_linear_xla,
        "ffi": _ring_linear_ffi,
        "triton": _ring_linear_triton,
    }
    product = choose("ring_linear", implementations, implementation)(x.reshape(-1, x.shape[-1]), weight)
    return product.reshape(*x.shape[:-1], weight.shape[0])


def _check(x: jax.Array, weight: jax.Array) -> None:
    fits = len(weight.shape) == 2 and x.ndim > 0 and weight.shape[1] == x.shape[-1] and 0 not in weight.shape
    if not fits or x.dtype != jnp.int32 or weight.dtype != jnp.int8:
        raise ValueError(
            f"ring_linear: int32 [..., in] is multiplied with int8 [out, in], got {x.dtype} {list(x.shape)} and "
            f"{weight.dtype} {list(weight.shape)}."
        )
    if weight.shape[1] > MOST_INTEGER_COLUMNS:
        raise ValueError(
            f"ring_linear: int32 holds the sums of {MOST_INTEGER_COLUMNS} columns, and this weight has "
            f"{weight.shape[1]}."
        )


def split(x: Int32[Array, "tokens in"]) -> Int8[Array, "limbs tokens in"]:
    """The four limbs of each number, the least significant first; see `ring_linear`."""
    limbs = jax.lax.bitcast_convert_type((x + CENTER) ^ CENTER, jnp.int8)
    return jnp.moveaxis(limbs, -1, 0)


def join(products: Int32[Array, "limbs tokens out"]) -> Int32[Array, "tokens out"]:
    """The sum of the products of limbs, each times its power of two, modulo 2^32."""
    shifted = [products[limb] << (8 * limb) for limb in range(LIMBS)]
    return (shifted[0] + shifted[1]) + (shifted[2] + shifted[3])


def _ring_linear_xla(x: jax.Array, weight: jax.Array) -> jax.Array:
    limbs = split(x).reshape(-1, x.shape[1])
    products = jnp.dot(limbs, weight.T, preferred_element_type=jnp.int32)
    return join(products.reshape(LIMBS, len(x), len(weight)))


def _ring_linear_ffi(x: jax.Array, weight: jax.Array) -> jax.Array:
    out = jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), jnp.int32)
    product: jax.Array = jax.ffi.ffi_call("fusedllm_ring_linear", out)(x, weight)
    return product


def _ring_linear_triton(x: jax.Array, weight: jax.Array) -> jax.Array:
    from fusedllm.kernels.ring_linear_triton import ring_linear_triton  # Imports Pallas: see `pallas_support`.

    return ring_linear_triton(x, weight, interprets())
