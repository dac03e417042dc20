"""`linear`: the products of activations with weight matrices `[out, in]`, plain or quantized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from fusedllm.errors import ImplementationError
from fusedllm.kernels.choose import choose, platform
from fusedllm.kernels.few_tokens_support import why_not_few_tokens, why_not_some_tokens
from fusedllm.kernels.grouped import MOST_INTEGER_COLUMNS, GroupedScheme, grouped_scheme, unpack
from fusedllm.kernels.hadamard import hadamard
from fusedllm.kernels.mosaic_limits import why_not_linear_mosaic
from fusedllm.kernels.packed import PLAIN_NUMBERS, PackedScheme, packed_scheme
from fusedllm.kernels.pallas_support import casts_float8, interprets, why_not_codes
from fusedllm.kernels.quantize import round_activations
from fusedllm.qarray import QuantArray

# Up to here the rows go to the right-hand side on the CPU: `W @ x.T` reads W along its rows at twice to four times the
# rate of `x @ W.T` (2 to 8 rows of a 2048 x 8192 float32 product: 31 to 25 GB/s against 16 to 6).
FEW_ROWS = 32

# Of one native call.
MOST_WEIGHTS = 8


def linear(
    x: Float[Array, "*rows in"],
    *weights: Float[Array, "_ in"] | QuantArray,
    precise: bool = False,
    out_dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "*rows _"], ...]:
    """`x @ weight.T` for each of `weights`, accumulated in float32, in `out_dtype` (by default that of `x`).

    With packed weights the native implementation (`"ffi"`) rounds the activations to eight bits in groups of 32, or if
    `precise` to sixteen; the sums of products inside a group are exact then. For bfloat16 weights it rounds them to
    bfloat16 where the processor multiplies those and `precise` is not asked for. A scheme whose `activation_bits` are
    eight rounds them to eight bits, one scale a token, everywhere. All other products take the activations as they are.
    A weight of a kind that an implementation does not read is left to XLA where nothing was asked for; `"pallas"` reads
    grouped codes, and `"mosaic"` those of four and eight bits for many tokens.

    A weight whose scheme has activations of eight bits (`w8a8`) is multiplied in integers, whatever `precise` says, and
    with the same bits by every implementation. For each token, in float32:

        code = round(x * (127 / max|x|)), ties to even          int8
        sum  = the sum over the row of code * weight's code     int32, exact
        out  = sum * (max|x| * (1 / 127)) * weight's scale

    Where the scheme's rows are turned (`w8a8-h`) `x` stands for `hadamard(x)` here, float32, whose magnitudes are more
    even; the weight's codes are of rows turned by the same matrix, so that the product is that of `x`.

    Both scales are outside of the sum, which is all that has to run where the weights are. A token of nothing but
    magnitudes below 2^-88 gives zeros, and one with what is infinite or no number gives no numbers.

    Raises:
      ImplementationError: `implementation` names one that does not exist, can't run here, or can't read a weight.
      ValueError: a weight is no matrix with as many columns as `x` has elements in a row; or its scheme has activations
        of eight bits, and it is not int8 with one scale a row or has more than 65,536 columns.
    """
    _check_shapes(x, weights)
    implementations = {"xla": _linear_xla, "ffi": _linear_ffi, "triton": _linear_triton, "mosaic": _linear_mosaic}
    return choose("linear", implementations, implementation)(
        x, weights, out_dtype or x.dtype, precise, implementation is not None
    )


def _check_shapes(x: jax.Array, weights: tuple[jax.Array | QuantArray, ...]) -> None:
    for weight in weights:
        if len(weight.shape) != 2 or weight.shape[1] != x.shape[-1] or 0 in weight.shape:
            raise ValueError(f"linear: a weight must be [out, {x.shape[-1]}] for this x, got {list(weight.shape)}.")
        scheme = weight.scheme if isinstance(weight, QuantArray) else None
        if isinstance(scheme, GroupedScheme) and scheme.activation_bits is not None:
            if not scheme.sums_integers:
                raise ValueError(
                    f"linear: activations are rounded for weights of int8 with one scale a row and no zero points, and "
                    f"the scheme {scheme.name} is another."
                )
            if weight.shape[1] > MOST_INTEGER_COLUMNS:
                raise ValueError(
                    f"linear: int32 holds the sums of {MOST_INTEGER_COLUMNS} columns of {scheme.name}, and this weight "
                    f"has {weight.shape[1]}."
                )


def _linear_xla(
    x: jax.Array, weights: tuple[jax.Array | QuantArray, ...], out_dtype: DTypeLike, precise: bool, strict: bool
) -> tuple[jax.Array, ...]:
    del precise, strict
    return tuple(_product_xla(x, weight, out_dtype) for weight in weights)


def _product_xla(x: jax.Array, weight: jax.Array | QuantArray, out_dtype: DTypeLike) -> jax.Array:
    integers = integer_codes(weight)
    if integers is not None:
        rounded = hadamard(x, implementation="xla") if turns(weight) else x
        return _integer_product(rounded, *integers).astype(out_dtype)
    matrix = weight.dequantize(x.dtype) if isinstance(weight, QuantArray) else weight.astype(x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    # The default lets a GPU round float32 operands to TF32.
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    if rows.shape[0] <= FEW_ROWS and platform() == "cpu":
        product = jnp.dot(matrix, rows.T, precision=precision, preferred_element_type=jnp.float32).T
    else:
        product = jnp.dot(rows, matrix.T, precision=precision, preferred_element_type=jnp.float32)
    return product.astype(out_dtype).reshape(*x.shape[:-1], matrix.shape[0])


def _sums_integers(weight: QuantArray) -> bool:
    return isinstance(weight.scheme, GroupedScheme | PackedScheme) and weight.scheme.sums_integers


def integer_codes(weight: jax.Array | QuantArray) -> tuple[jax.Array, jax.Array] | None:
    """The codes of a weight whose products are sums of integers (`w8a8`), int8 `[out, in]`, and the scales of its
    rows, float32 `[out]`; `None` for any other weight. They meet activations that `hadamard` turned where `turns` says.
    """
    if not isinstance(weight, QuantArray) or not _sums_integers(weight):
        return None
    if isinstance(weight.scheme, PackedScheme):
        return weight.scheme.integers(weight)
    assert weight.scales is not None
    return unpack(jnp, weight.values, 8), weight.scales[:, 0].astype(jnp.float32)


def turns(weight: jax.Array | QuantArray) -> bool:
    """Whether products with `weight` turn the activations first (`w8a8-h`)."""
    scheme = weight.scheme if isinstance(weight, QuantArray) else None
    return isinstance(scheme, GroupedScheme | PackedScheme) and scheme.turned


def _integer_product(x: jax.Array, matrix: jax.Array, scales: jax.Array) -> jax.Array:
    codes, token_scales = round_activations(x.reshape(-1, x.shape[-1]))
    sums = jnp.dot(codes, matrix.T, preferred_element_type=jnp.int32).astype(jnp.float32)
    return (sums * token_scales * scales).reshape(*x.shape[:-1], matrix.shape[0])


def _linear_triton(
    x: jax.Array, weights: tuple[jax.Array | QuantArray, ...], out_dtype: DTypeLike, precise: bool, strict: bool
) -> tuple[jax.Array, ...]:
    del precise
    ways = [_way_triton(x, weight) for weight in weights]
    if strict and (problem := next((way for way in ways if isinstance(way, str)), None)):
        raise ImplementationError(f"linear: the implementation 'triton' can't run: {problem}.")
    products: dict[int, jax.Array] = {}
    for launch in (_few_tokens_triton, _some_tokens_triton):
        some = [at for at, way in enumerate(ways) if way is launch]
        if some:
            made = launch(x, [weights[at] for at in some], out_dtype)
            products |= dict(zip(some, made, strict=True))
    return tuple(
        products[at]
        if at in products
        else _product_xla(x, weight, out_dtype)
        if isinstance(way, str)
        else _product_triton(x, weight, out_dtype)
        for at, (weight, way) in enumerate(zip(weights, ways, strict=True))
    )


def _way_triton(x: jax.Array, weight: Any) -> Any:
    """The function that takes several such weights in one launch, `None` for launches of each by itself, or else what
    is against it.
    """
    if x.size == 0:
        return "there is no token"
    if why_not_few_tokens(x, weight) is None:
        return _few_tokens_triton
    if why_not_some_tokens(x, weight) is None:
        return _some_tokens_triton
    scheme = grouped_scheme(weight)
    if scheme is None:
        few, some = why_not_few_tokens(x, weight), why_not_some_tokens(x, weight)
        return f"it multiplies with grouped codes, got {_kind(weight)}, of which {few} ({some})"
    if x.dtype.name not in PLAIN_NUMBERS:
        return f"it takes activations in {', '.join(PLAIN_NUMBERS)}, got {x.dtype}"
    return why_not_codes(scheme)


def _few_tokens_triton(
    x: jax.Array, weights: Sequence[jax.Array | QuantArray], out_dtype: DTypeLike
) -> tuple[jax.Array, ...]:
    from fusedllm.kernels.few_tokens_triton import products_triton  # Imports Pallas: see `pallas_support`.

    rows = x.reshape(-1, x.shape[-1])
    static = {"out_dtype": np.dtype(out_dtype), "interpret": interprets(), "native_float8": casts_float8()}
    _, products = products_triton(rows, tuple(weights), **static)
    return tuple(product.reshape(*x.shape[:-1], -1) for product in products)


def _some_tokens_triton(x: jax.Array, weights: Sequence[Any], out_dtype: DTypeLike) -> tuple[jax.Array, ...]:
    from fusedllm.kernels.some_tokens_triton import tiles_triton  # Imports Pallas: see `pallas_support`.

    rows = x.reshape(-1, x.shape[-1])
    products = tiles_triton(rows, tuple(weights), out_dtype=np.dtype(out_dtype), interpret=interprets())
    return tuple(product.reshape(*x.shape[:-1], -1) for product in products)


def _product_triton(x: jax.Array, weight: Any, out_dtype: DTypeLike) -> jax.Array:
    from fusedllm.kernels.linear_triton import product_triton  # Imports Pallas: see `pallas_support`.

    rows = hadamard(x) if turns(weight) else x
    product = product_triton(rows.reshape(-1, x.shape[-1]), weight, np.dtype(out_dtype), interprets(), casts_float8())
    return product.reshape(*x.shape[:-1], weight.shape[0])


def _linear_mosaic(
    x: jax.Array, weights: tuple[jax.Array | QuantArray, ...], out_dtype: DTypeLike, precise: bool, strict: bool
) -> tuple[jax.Array, ...]:
    problems = [why_not_linear_mosaic(x, weight, out_dtype) for weight in weights]
    if strict and (problem := next(filter(None, problems), None)):
        raise ImplementationError(f"linear: the implementation 'mosaic' can't run: {problem}.")
    return tuple(
        _linear_triton(x, (weight,), out_dtype, precise, False)[0] if problem else _product_mosaic(x, weight, out_dtype)
        for weight, problem in zip(weights, problems, strict=True)
    )


def _product_mosaic(x: jax.Array, weight: Any, out_dtype: DTypeLike) -> jax.Array:
    from fusedllm.kernels.linear_mosaic import product_mosaic  # Imports Pallas: see `pallas_support`.

    rows = hadamard(x) if turns(weight) else x
    product = product_mosaic(rows.reshape(-1, x.shape[-1]), weight, np.dtype(out_dtype), interprets())
    return product.reshape(*x.shape[:-1], weight.shape[0])


def _linear_ffi(
    x: jax.Array, weights: tuple[jax.Array | QuantArray, ...], out_dtype: DTypeLike, precise: bool, strict: bool
) -> tuple[jax.Array, ...]:
    if strict and any(_format_number(weight) is None for weight in weights):
        raise ImplementationError(
            "linear: the implementation 'ffi' reads packed and floating-point weights; got "
            + ", ".join(_kind(weight) for weight in weights if _format_number(weight) is None)
            + "."
        )
    if len(weights) > MOST_WEIGHTS:
        parts = (weights[:MOST_WEIGHTS], weights[MOST_WEIGHTS:])
        return tuple(out for part in parts for out in _linear_ffi(x, part, out_dtype, precise, strict))
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    products: dict[int, jax.Array] = {}
    for turned in (False, True):
        some = [at for at, one in enumerate(weights) if _format_number(one) is not None and turns(one) == turned]
        if some:
            made = _products_ffi(hadamard(rows) if turned else rows, [weights[at] for at in some], precise)
            products |= dict(zip(some, made, strict=True))
    return tuple(
        products[at].astype(out_dtype).reshape(*x.shape[:-1], weight.shape[0])
        if at in products
        else _product_xla(x, weight, out_dtype)
        for at, weight in enumerate(weights)
    )


def _products_ffi(rows: jax.Array, weights: Sequence[jax.Array | QuantArray], precise: bool) -> Sequence[jax.Array]:
    call = jax.ffi.ffi_call(
        "fusedllm_linear", [jax.ShapeDtypeStruct((rows.shape[0], weight.shape[0]), jnp.float32) for weight in weights]
    )
    made: Sequence[jax.Array] = call(
        rows,
        *(weight.values if isinstance(weight, QuantArray) else weight for weight in weights),
        formats=np.asarray([_format_number(weight) for weight in weights], np.int32),
        shared=np.asarray([_shared(weight) for weight in weights], np.int64),
        rows=np.asarray([weight.shape[0] for weight in weights], np.int64),
        levels=np.int32(2 if precise else 1),
    )
    return made


def _format_number(weight: jax.Array | QuantArray) -> int | None:
    if isinstance(weight, QuantArray):
        scheme = packed_scheme(weight)
        return None if scheme is None else scheme.number
    return PLAIN_NUMBERS.get(weight.dtype.name)


def _shared(weight: jax.Array | QuantArray) -> int:
    scheme = packed_scheme(weight)
    return 1 if scheme is None else scheme.shared


def _kind(weight: jax.Array | QuantArray) -> str:
    return weight.scheme.name if isinstance(weight, QuantArray) else str(weight.dtype)
