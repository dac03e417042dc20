"""What Mosaic GPU kernels are made of, in one place: the launch, products of tiles, and what versions of jax differ in.

A kernel here is one program for each point of a grid, run by a few warpgroups of 128 threads, which share memory and
barriers. Pallas calls a warpgroup a thread. Copies and products are asynchronous, and order is what barriers make it.

Interpretation runs the warpgroups of one program as threads of the CPU, with shared memory, copies, barriers and their
counts, so that a barrier that nobody arrives at is found there. It knows no layouts of registers, and in jax 0.10 no
products from registers: inside of it `product` multiplies what the shared memory holds with XLA, and layouts are not
asked for. So what interpretation does not test is the product instruction itself, the layouts, and that the
asynchronous unit sees what threads wrote before it reads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as gpu

# The name of the axis that numbers the warpgroups of a program.
WARPGROUP = "warpgroup"

# Rows of the narrowest product that a warpgroup makes.
LEAST_ROWS = 64

# Bytes of a row of a tile in shared memory, within which the copy engine permutes 16-byte pieces, so that a product
# reads them from all banks at once; and rows after which the permutation repeats.
SWIZZLE = 128
SWIZZLED_ROWS = 8

# Registers of a thread that computes beside one that only starts copies: a processor has 65,536, and two warpgroups of
# the one with one of the other take 64,512. The numbers are those of the FlashAttention-3 that jax ships.
COMPUTING_REGISTERS = 232
COPYING_REGISTERS = 40


# Releases of CUDA, as numbers, whose ptxas compiles comparisons of positions wrongly, says the kernel that jax ships.
WRONG_FROM, WRONG_BELOW = 12080, 12091


def why_not_compiled() -> str | None:
    """Why the CUDA that is here can't compile masked scores, or `None` if it can or none is here."""
    from jax._src.lib import cuda_versions

    version = None if cuda_versions is None else cuda_versions.cuda_runtime_get_version()
    if version is not None and WRONG_FROM <= version < WRONG_BELOW:
        return f"the ptxas of CUDA {version // 1000}.{version % 1000 // 10} compiles it wrongly; 12.9.1 is needed"
    return None


def launch(
    kernel: Callable[..., None],
    out: jax.ShapeDtypeStruct,
    *operands: jax.Array,
    grid: Mapping[str, int],
    scratch: Mapping[str, Any],
    warpgroups: int,
    interpret: bool,
) -> jax.Array:
    """The result of `kernel`, which gets references to all operands and the result, and `scratch` by name."""
    parameters = gpu.CompilerParams(approx_math=True, lowering_semantics=gpu.LoweringSemantics.Lane)
    result: jax.Array = gpu.kernel(
        kernel,
        out_type=out,
        scratch_types=dict(scratch),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=warpgroups,
        thread_name=WARPGROUP,
        compiler_params=parameters,
        interpret=_interpreter() if interpret else None,
    )(*operands)
    return result


def _interpreter() -> Any:
    if (public := getattr(gpu, "InterpretGPUParams", None)) is not None:
        return public()
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # Of jax 0.10.

    return InterpretGPUParams()


def shared(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory whose last two axes are a matrix that the copy engine fills and products read."""
    row_bytes = shape[-1] * np.dtype(dtype).itemsize
    swizzle = min(SWIZZLE, row_bytes)
    tiling = gpu.TilingTransform((SWIZZLED_ROWS, swizzle // np.dtype(dtype).itemsize))
    return gpu.SMEM(shape, dtype, transforms=(tiling, gpu.SwizzleTransform(swizzle)))


def shared_numbers(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory for numbers that only threads read."""
    return gpu.SMEM(shape, dtype)


def barriers(count: int, arrivals: int = 1) -> Any:
    """`count` barriers, each of which opens when `arrivals` copies have landed, or warpgroups have arrived."""
    return gpu.Barrier(num_arrivals=arrivals, num_barriers=count)


def roles(interpret: bool, copying: Callable[[], None], computing: Callable[[Any], None], workers: int) -> None:
    """Runs `computing` in the warpgroups 0 to `workers - 1`, with their number, and `copying` in the one after them."""
    number = lax.axis_index(WARPGROUP)

    @pl.when(number < workers)
    def _() -> None:
        if not interpret:
            gpu.set_max_registers(COMPUTING_REGISTERS, action="increase")
        computing(number)

    @pl.when(number == workers)
    def _() -> None:
        if not interpret:
            gpu.set_max_registers(COPYING_REGISTERS, action="decrease")
        copying()


def transposed(ref: Any) -> Any:
    """A matrix in shared memory, read with its axes exchanged."""
    return ref.transpose((1, 0)) if hasattr(ref, "transpose") else gpu.transpose_ref(ref, (1, 0))


def product(a: Any, b: Any, turned: bool, interpret: bool, total: jax.Array | None = None) -> jax.Array:
    """`total + a @ b`, float32 (int32 of int8), of tiles; with `turned` `a @ b.T`. Done when it returns.

    `b` is in shared memory, `a` there or in registers.
    """
    columns = b.shape[0] if turned else b.shape[1]
    dtype = jnp.dtype(jnp.int32 if a.dtype == jnp.int8 else jnp.float32)
    if interpret:
        contracted = (((1,), (1 if turned else 0,)), ((), ()))
        # Widened because the CPU rounds products of 16 bits as it likes; float32 holds each of them.
        left, right = (x[...].astype(dtype) for x in (a, b))
        sums = lax.dot_general(left, right, contracted, precision=lax.Precision.HIGHEST, preferred_element_type=dtype)
        return sums if total is None else total + sums
    right = transposed(b) if turned else b

    def multiply(accumulator: Any) -> Any:
        gpu.wgmma(accumulator, a, right)
        return accumulator[...]

    if total is None:
        result: jax.Array = pl.run_scoped(multiply, gpu.WGMMAAccumulatorRef((a.shape[0], columns), dtype))
        return result
    add = pl.run_state(lambda accumulator: gpu.wgmma(accumulator, a, right))
    added: jax.Array = add(gpu.WGMMAAccumulatorRef.init(total))
    return added


def filled(shape: tuple[int, ...], value: float, interpret: bool) -> jax.Array:
    """float32 of one value, a matrix as `product` returns it, or a number for each of its rows."""
    layout = gpu.Layout.WGMMA if len(shape) == 2 else gpu.Layout.WGMMA.reduce(1)
    numbers = jnp.full(shape, value, jnp.float32)
    return numbers if interpret else gpu.layout_cast(numbers, layout)


def numbered(shape: tuple[int, ...], axis: int, interpret: bool) -> jax.Array:
    """The number of each element's row or column, int32, as a matrix as `product` returns it."""
    if interpret:
        return lax.broadcasted_iota(jnp.int32, shape, axis)
    numbers: jax.Array = gpu.broadcasted_iota(jnp.int32, shape, axis, layout=gpu.Layout.WGMMA)
    return numbers


def along_rows(numbers: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A number for each row, as a matrix."""
    return lax.broadcast_in_dim(numbers, shape, (0,))


def along_code_rows(numbers: jax.Array, shape: tuple[int, ...], interpret: bool) -> jax.Array:
    """A number for each row of `codes`, as a matrix that matches what is made of them."""
    spread = along_rows(numbers, shape)
    return spread if interpret else gpu.layout_cast(spread, gpu.Layout.WGMMA_UPCAST_2X)


def rewrite(ref: Any, change: Callable[[jax.Array], jax.Array], interpret: bool) -> None:
    """Replaces a matrix in shared memory by `change` of it, before products that read it."""
    if interpret:
        ref[...] = change(ref[...])
        return
    ref[...] = change(_load(ref, gpu.Layout.WGMMA))
    gpu.commit_smem()


def _load(ref: Any, layout: Any) -> jax.Array:
    load: Any = functools.partial(gpu.load, layout=layout)
    # jax 0.10 wants an index, and jax 0.11 none.
    values: jax.Array = load(ref) if hasattr(gpu, "InterpretGPUParams") else load(ref, ())
    return values


def row_numbers(ref: Any, interpret: bool, of_codes: bool = False) -> jax.Array:
    """Numbers in shared memory, one for each row of a product, or of `codes`."""
    layout = gpu.Layout.WGMMA_UPCAST_2X if of_codes else gpu.Layout.WGMMA
    return ref[...] if interpret else _load(ref, layout.reduce(1))


def codes(ref: Any, interpret: bool) -> jax.Array:
    """int8 of shared memory that will be an operand of 16 bits."""
    return ref[...] if interpret else _load(ref, gpu.Layout.WGMMA_UPCAST_2X)


def operand(values: jax.Array, interpret: bool) -> jax.Array:
    """What was made of `codes`, 16 bits wide, as the left operand of `product`."""
    return values if interpret else gpu.layout_cast(values, gpu.Layout.WGMMA)


def write_out(values: jax.Array, through: Any, to: Any) -> None:
    """Copies a matrix from registers to the device's memory by way of shared memory, and waits."""
    through[...] = values.astype(through.dtype)
    gpu.commit_smem()
    gpu.copy_smem_to_gmem(through, to)
    gpu.wait_smem_to_gmem(0)


def write_out_turned(values: jax.Array, through: Any, to: Any, interpret: bool) -> None:
    """As `write_out`, with the axes exchanged."""
    rounded = values.astype(through.dtype)
    if interpret:
        through[...] = rounded.T
    else:
        transposed(through)[...] = gpu.layout_cast(rounded, gpu.Layout.WGMMA_TRANSPOSED)
    gpu.commit_smem()
    gpu.copy_smem_to_gmem(through, to)
    gpu.wait_smem_to_gmem(0)
