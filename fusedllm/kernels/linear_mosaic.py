"""`linear` with Mosaic GPU, for prefills on Hopper: codes become numbers in registers, and are scaled after the dot.

A product of Hopper's takes its left operand from registers. So the weight is on the left here, whose codes, exact in
the activations' 16 bits, never go back to shared memory, and what comes out is `[rows, tokens]` turned while it is
written. As in `linear_triton`, a group's scale multiplies the sum over the group, and nothing is rounded but sums and
the result. Learned from the product of int8 that jax ships (`ops.gpu.hopper_mixed_type_matmul_mgpu`), which has no
scales.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as gpu

from fusedllm.kernels import mosaic_support as support
from fusedllm.kernels.grouped import GroupedScheme
from fusedllm.kernels.mosaic_limits import MOSAIC_DEPTH
from fusedllm.qarray import QuantArray

# Warpgroups that compute; one more copies.
WORKERS = 2

# Of a program. Reasoned, not measured: sums of 64 rows of a worker are 64 registers of a thread, and so are those of a
# group before they are scaled.
TOKENS = 128

# Turns of the ring: as many as this memory holds, beside the 32 KB by which results leave, and no more than pay.
# Reasoned, not measured.
RING_BYTES = 190 * 1024
MOST_STAGES = 4

# Programs that there should be before each takes more rows, which then read the activations less often: an H200 has
# 132 processors. Reasoned, not measured.
PROGRAMS = 132


@dataclass(frozen=True, slots=True)
class Plan:
    """How a product is cut.

    Attributes:
      depth: columns of a turn, of one group.
      planes: 2 where two codes share a byte: a turn multiplies by the first of each byte and by the second apart.
      turns: that a program takes.
      each: turns of a group; 0 where a row has one scale.
      parts: blocks of 64 rows of a worker.
      tokens: blocks of tokens.
      rows: blocks of rows.
    """

    depth: int
    planes: int
    turns: int
    each: int
    parts: int
    tokens: int
    rows: int

    @classmethod
    def of(cls, tokens: int, shape: tuple[int, ...], scheme: GroupedScheme) -> Plan:
        """For `tokens` and a weight of `shape`."""
        depth = min(scheme.group_size or MOSAIC_DEPTH, MOSAIC_DEPTH)
        blocks, least = pl.cdiv(tokens, TOKENS), support.LEAST_ROWS * WORKERS
        parts = 2 if shape[0] % (2 * least) == 0 and blocks * shape[0] // (2 * least) >= PROGRAMS else 1
        return cls(
            depth=depth,
            planes=8 // scheme.bits,
            turns=shape[1] // depth,
            each=scheme.group_size // depth,
            parts=parts,
            tokens=blocks,
            rows=shape[0] // (least * parts),
        )

    @property
    def height(self) -> int:
        """Rows of a program."""
        return support.LEAST_ROWS * WORKERS * self.parts

    @property
    def width(self) -> int:
        """Bytes of a row of a turn, and columns of one dot."""
        return self.depth // self.planes

    @property
    def stages(self) -> int:
        """Of the ring: activations of two bytes, codes, and scales and zero points of four."""
        turn = 2 * TOKENS * self.depth + self.height * (self.width + 2 * 4)
        return min(RING_BYTES // turn, MOST_STAGES)


@functools.partial(jax.jit, static_argnums=(2, 3))
def product_mosaic(x: jax.Array, weight: QuantArray, out_dtype: np.dtype, interpret: bool) -> jax.Array:
    """`x @ weight.T` for `x` `[tokens, in]`, as `out_dtype` `[tokens, out]`.

    For operands that `why_not_linear_mosaic` has nothing against.
    """
    scheme = weight.scheme
    assert isinstance(scheme, GroupedScheme)
    assert weight.scales is not None
    plan = Plan.of(x.shape[0], weight.shape, scheme)
    scales = [weight.scales.astype(jnp.float32)]
    scales += [] if weight.zeros is None else [weight.zeros.astype(jnp.float32) - scheme.center]
    operands = [
        _in_planes(x, plan),
        lax.bitcast_convert_type(weight.values, jnp.int8),
        # A turn reads the numbers of one group, of many rows.
        jnp.stack([numbers.T for numbers in scales], axis=1),
    ]
    slots = plan.stages if plan.each else 1
    out = support.launch(
        functools.partial(_program, scheme=scheme, plan=plan, interpret=interpret),
        jax.ShapeDtypeStruct((plan.tokens * TOKENS, weight.shape[0]), out_dtype),
        *operands,
        grid={"rows": plan.rows, "tokens": plan.tokens},
        scratch={
            "x_shared": support.shared((plan.stages, plan.planes, TOKENS, plan.width), x.dtype),
            "codes_shared": support.shared((plan.stages, plan.height, plan.width), jnp.int8),
            "scales_shared": support.shared_numbers((slots, len(scales), plan.height), jnp.float32),
            "out_shared": support.shared((WORKERS, TOKENS, support.LEAST_ROWS), out_dtype),
            "landed": support.barriers(plan.stages, plan.planes + 1 + (len(scales) if plan.each else 0)),
            "scales_landed": support.barriers(1, len(scales)),
            "free": support.barriers(plan.stages, WORKERS),
        },
        warpgroups=WORKERS + 1,
        interpret=interpret,
    )
    return out[: len(x)]


def _in_planes(x: jax.Array, plan: Plan) -> jax.Array:
    """The columns of `x` in the order in which dots take them, and whole blocks of tokens."""
    padded = jnp.pad(x, ((0, plan.tokens * TOKENS - len(x)), (0, 0)))
    if plan.planes == 1:
        return padded
    return padded.reshape(len(padded), plan.turns, -1, plan.planes).swapaxes(2, 3).reshape(padded.shape)


def _program(
    x: Any,
    values: Any,
    scales: Any,
    out: Any,
    *,
    x_shared: Any,
    codes_shared: Any,
    scales_shared: Any,
    out_shared: Any,
    landed: Any,
    scales_landed: Any,
    free: Any,
    scheme: GroupedScheme,
    plan: Plan,
    interpret: bool,
) -> None:
    token, row = lax.axis_index("tokens") * TOKENS, lax.axis_index("rows") * plan.height
    rows = support.LEAST_ROWS

    def slot(turn: Any) -> Any:
        return lax.rem(turn, jnp.int32(plan.stages))

    def copy_scales(group: Any, to: Any, barrier: Any) -> None:
        for number in range(scales.shape[1]):
            gpu.copy_gmem_to_smem(
                scales.at[group, number, pl.ds(row, plan.height)], scales_shared.at[to, number], barrier
            )

    def copying() -> None:
        if not plan.each:
            copy_scales(0, 0, scales_landed.at[0])

        def fill(turn: Any, carry: None) -> None:
            @pl.when(turn >= plan.stages)
            def _() -> None:
                gpu.barrier_wait(free.at[slot(turn)])

            barrier = landed.at[slot(turn)]
            gpu.copy_gmem_to_smem(
                values.at[pl.ds(row, plan.height), pl.ds(turn * plan.width, plan.width)],
                codes_shared.at[slot(turn)],
                barrier,
            )
            for plane in range(plan.planes):
                columns = pl.ds(turn * plan.depth + plane * plan.width, plan.width)
                gpu.copy_gmem_to_smem(x.at[pl.ds(token, TOKENS), columns], x_shared.at[slot(turn), plane], barrier)
            if plan.each:
                copy_scales(lax.div(turn, jnp.int32(plan.each)), slot(turn), barrier)
            return carry

        lax.fori_loop(0, plan.turns, fill, None)

        def drain(turn: Any, carry: None) -> None:
            gpu.barrier_wait(free.at[slot(turn)])
            return carry

        # So that every arrival at a barrier has been waited for.
        lax.fori_loop(max(plan.turns - plan.stages, 0), plan.turns, drain, None)

    def computing(worker: Any) -> None:
        begins = [worker * (rows * plan.parts) + part * rows for part in range(plan.parts)]

        def read(slot: Any, number: int, begin: Any) -> jax.Array:
            numbers = scales_shared.at[slot, number, pl.ds(begin, rows)]
            return support.row_numbers(numbers, interpret, of_codes=number == 1)

        if not plan.each:
            gpu.barrier_wait(scales_landed.at[0])

        def visit(turn: Any, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            gpu.barrier_wait(landed.at[slot(turn)])
            totals = []
            for begin, total in zip(begins, carry, strict=True):
                packed = support.codes(codes_shared.at[slot(turn), pl.ds(begin, rows)], interpret)
                zeros = None if scheme.symmetric else read(slot(turn) if plan.each else 0, 1, begin)
                sums = None if plan.each else total
                for plane in range(plan.planes):
                    numbers = support.operand(_decode(packed, plane, zeros, scheme, x.dtype, interpret), interpret)
                    sums = support.product(numbers, x_shared.at[slot(turn), plane], True, interpret, sums)
                assert sums is not None
                if plan.each:
                    scale = read(slot(turn), 0, begin)
                    sums = total + sums * support.along_rows(scale, sums.shape)
                totals.append(sums)
            gpu.barrier_arrive(free.at[slot(turn)])
            return tuple(totals)

        nothing = tuple(support.filled((rows, TOKENS), 0, interpret) for _ in begins)
        for begin, total in zip(begins, lax.fori_loop(0, plan.turns, visit, nothing), strict=True):
            if not plan.each:
                total = total * support.along_rows(read(0, 0, begin), total.shape)
            place = (pl.ds(token, TOKENS), pl.ds(row + begin, rows))
            support.write_out_turned(total, out_shared.at[worker], out.at[place], interpret)

    support.roles(interpret, copying, computing, WORKERS)


def _decode(
    packed: jax.Array, plane: int, zeros: jax.Array | None, scheme: GroupedScheme, dtype: Any, interpret: bool
) -> jax.Array:
    """The codes of a plane of bytes without their zero points; `zeros` are counted from the scheme's center.

    In registers bytes have no arithmetic but that of bits, and numbers of 16 bits have all of it.
    """
    if scheme.bits == 8:
        codes = packed.astype(dtype)
    elif plane == 0:
        codes = (packed & jnp.int8(0x0F)).astype(dtype) - jnp.asarray(scheme.center, dtype)
    else:
        # With its first bit changed a nibble is that of a signed number, which in the upper half of a byte is 16 times
        # as large.
        sixteenfold = (packed ^ jnp.int8(-0x80)) & jnp.int8(-0x10)
        codes = sixteenfold.astype(dtype) * jnp.asarray(1 / 16, dtype)
    if zeros is None:
        return codes
    return (codes.astype(jnp.float32) - support.along_code_rows(zeros, codes.shape, interpret)).astype(dtype)
