"""Operations one by one, by each implementation that they have: the part `kernels` of `gpu.py`, and `quantize`.

A case makes its operands on the device, several times if a cache could hold them, and the device's queue is timed. An
implementation that an operation does not have, or that does not take the operands, says so itself.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from common import Spread
from gpu_part import Clock, Clocked, Part, compile_together, config_of, copies, normal, on_gpu, reason

LINEAR_SCHEMES = (None, "int8", "int4-g64", "fp8", "w8a8", "int4-g64-sym", "int8-g64", "int3-g128")
LINEAR_TOKENS = (1, 16, 64, 512)
PREFILL_TOKENS = (128, 1024, 4096)
DECODE_CASES = ((1, 128), (1, 8192), (32, 1024), (128, 1024))
RING_TOKENS = (1, 16, 1024)
QUANTIZE_SCHEMES = ("int8", "int4-g64", "int8-g64", "fp8", "w8a8", "int4-g64-sym", "int3-g128")
PAGE_SIZE = 16
# That have a kernel of Mosaic.
MOSAIC_OPERATIONS = ("attention", "cached_attention", "linear")
# Cases that are compiled together.
TOGETHER = 8


@dataclass(frozen=True)
class Case:
    """An operation on operands of some size.

    `run(implementation, *operands)` is traced; `make(number)` makes operands; bytes and operations are the fewest.
    """

    operation: str
    name: str
    run: Callable[..., Any]
    make: Callable[[int], tuple[Any, ...]]
    bytes: float
    operations: float


def implementations() -> tuple[str, ...]:
    """The names that are tried here; Mosaic's kernels have a part of their own."""
    return ("xla", "triton") if on_gpu() else ("xla", "ffi", "triton")


def linear_cases(part: Part) -> Iterator[Case]:
    """The largest matrix of a layer, plain and in each scheme."""
    import jax
    import jax.numpy as jnp

    from fusedllm.kernels.linear import linear
    from fusedllm.kernels.quantize import quantize
    from fusedllm.quant.schemes import SCHEMES

    config, dtype = config_of(part.scale), part.scale.dtype
    rows, width = config.intermediate_size, config.hidden_size
    for scheme in LINEAR_SCHEMES[:3] if part.tiny else LINEAR_SCHEMES:

        def weights(number: int, scheme: str | None = scheme) -> Any:
            plain = normal((rows, width), dtype, number, width**-0.5)
            return plain if scheme is None else jax.block_until_ready(quantize(plain, SCHEMES[scheme]))

        size = sum(leaf.nbytes for leaf in jax.tree.leaves(weights(0)))
        for tokens in LINEAR_TOKENS[:2] if part.tiny else LINEAR_TOKENS:

            def make(number: int, tokens: int = tokens, weights: Any = weights) -> tuple[Any, ...]:
                return normal((tokens, width), dtype, 10**6 + number), weights(number)

            def run(implementation: str | None, x: Any, weight: Any) -> Any:
                return linear(x, weight, implementation=implementation)[0]

            moved = size + tokens * (rows + width) * jnp.dtype(dtype).itemsize
            name = f"{scheme or dtype}, {tokens} tokens"
            yield Case("linear", name, run, make, moved, 2.0 * tokens * rows * width)


def _pages(config: Any, dtype: str, batch: int, context: int, number: int) -> tuple[Any, ...]:
    """K and V of random numbers, and a page table that has no order, as after a while of serving."""
    import jax.numpy as jnp
    import numpy as np

    entries = -(-context // PAGE_SIZE)
    shape = (batch * entries + 1, config.num_kv_heads, PAGE_SIZE, config.head_dim)
    places = np.random.RandomState(number).permutation(batch * entries).reshape(batch, entries) + 1
    return normal(shape, dtype, number), normal(shape, dtype, number + 10**6), jnp.asarray(places, jnp.int32)


def attention_cases(part: Part) -> Iterator[Case]:
    """Attention over pages, of a prompt and of one token a request."""
    import jax.numpy as jnp

    from fusedllm.kernels.attention import paged_attention

    config, dtype = config_of(part.scale), part.scale.dtype
    heads, size = config.num_heads * config.head_dim, jnp.dtype(dtype).itemsize
    narrow = 2 * config.num_kv_heads * config.head_dim

    def run(implementation: str | None, q: Any, k: Any, v: Any, table: Any, start: Any) -> Any:
        return paged_attention(q, k, v, table, start, implementation=implementation)

    def case(name: str, batch: int, seq: int, context: int) -> Case:
        def make(number: int) -> tuple[Any, ...]:
            q = normal((batch, seq, config.num_heads, config.head_dim), dtype, number)
            return q, *_pages(config, dtype, batch, context, number), jnp.full((batch,), context - seq, jnp.int32)

        pairs = seq * (context - seq) + seq * (seq + 1) / 2
        moved = size * batch * (2 * seq * heads + context * narrow)
        return Case("attention", name, run, make, moved, 4.0 * batch * heads * pairs)

    for tokens in (32,) if part.tiny else PREFILL_TOKENS:
        yield case(f"prefill of {tokens}", 1, tokens, tokens)
    for batch, context in ((2, 32),) if part.tiny else DECODE_CASES:
        yield case(f"decode at {context}, batch {batch}", batch, 1, context)


def cached_cases(part: Part) -> Iterator[Case]:
    """What a layer calls: rotates, writes the new keys and values, and attends."""
    import jax.numpy as jnp

    from fusedllm.kernels.cached_attention import cached_attention

    config, dtype = config_of(part.scale), part.scale.dtype
    heads, size = config.num_heads * config.head_dim, jnp.dtype(dtype).itemsize
    narrow = 2 * config.num_kv_heads * config.head_dim

    def run(implementation: str | None, q: Any, k: Any, v: Any, cos: Any, sin: Any, *cache: Any) -> Any:
        keys, values, table, start = cache
        return cached_attention(q, k, v, cos, sin, (keys, values), table, start, implementation=implementation)

    for batch, seq, context in ((1, 16, 16),) if part.tiny else ((1, 1, 1024), (32, 1, 1024), (1, 1024, 1024)):

        def make(number: int, batch: int = batch, seq: int = seq, context: int = context) -> tuple[Any, ...]:
            q = normal((batch, seq, config.num_heads, config.head_dim), dtype, number)
            k, v = (normal((batch, seq, config.num_kv_heads, config.head_dim), dtype, number + at) for at in (1, 2))
            angles = (normal((batch, seq, config.head_dim // 2), "float32", number + at) for at in (3, 4))
            start = jnp.full((batch,), context - seq, jnp.int32)
            return q, k, v, *angles, *_pages(config, dtype, batch, context, number), start

        pairs = seq * (context - seq) + seq * (seq + 1) / 2
        moved = size * batch * (2 * seq * heads + (context + 2 * seq) * narrow)
        # The pages are not donated here: what a copy of them costs is in every implementation's time alike.
        yield Case("cached_attention", f"{seq} at {context}, batch {batch}, pages copied", run, make, moved,
                   4.0 * batch * heads * pairs)  # fmt: skip


def ring_cases(part: Part) -> Iterator[Case]:
    """The product of the masked policies."""
    import jax

    from fusedllm.kernels.ring_linear import LIMBS, ring_linear

    config = config_of(part.scale)
    rows, width = config.intermediate_size, config.hidden_size

    def run(implementation: str | None, x: Any, weight: Any) -> Any:
        return ring_linear(x, weight, implementation=implementation)

    for tokens in RING_TOKENS[:1] if part.tiny else RING_TOKENS:

        def make(number: int, tokens: int = tokens) -> tuple[Any, ...]:
            key = jax.random.key(number)
            x = jax.random.randint(key, (tokens, width), -(2**31), 2**31 - 1, "int32")
            return x, jax.random.randint(key, (rows, width), -128, 128, "int8")

        moved = rows * width + 4 * tokens * (rows + width)
        yield Case("ring_linear", f"{tokens} tokens", run, make, moved, LIMBS * 2.0 * tokens * rows * width)


def small_cases(part: Part) -> Iterator[Case]:
    """Norm and activation, which have one implementation on a GPU today: what they take beside their bytes."""
    import jax.numpy as jnp

    from fusedllm.kernels.rms_norm import rms_norm
    from fusedllm.kernels.swiglu import swiglu

    config, dtype = config_of(part.scale), part.scale.dtype
    size, tokens = jnp.dtype(dtype).itemsize, 16 if part.tiny else 1024
    width, wide = config.hidden_size, config.intermediate_size

    def norm(implementation: str | None, x: Any, delta: Any, weight: Any) -> Any:
        return rms_norm(x, weight, 1e-5, delta=delta, implementation=implementation)

    def activate(implementation: str | None, gate: Any, up: Any) -> Any:
        return swiglu(gate, up, implementation=implementation)

    def two(columns: int, number: int) -> tuple[Any, ...]:
        return tuple(normal((tokens, columns), dtype, number + at) for at in range(2))

    yield Case("rms_norm", f"{tokens} tokens", norm, lambda number: (*two(width, number), normal((width,), dtype)),
               4.0 * size * tokens * width, 5.0 * tokens * width)  # fmt: skip
    yield Case("swiglu", f"{tokens} tokens", activate, lambda number: two(wide, number),
               3.0 * size * tokens * wide, 5.0 * tokens * wide)  # fmt: skip


def norm_cases(part: Part) -> Iterator[Case]:
    """Norm and products in one, where there is such an operation: the two of a layer that begin with a norm."""
    import jax.numpy as jnp

    try:
        from fusedllm.kernels.norm_linear import norm_linear, norm_swiglu
    except ImportError:
        return
    config, dtype = config_of(part.scale), part.scale.dtype
    width, wide, size = config.hidden_size, config.intermediate_size, jnp.dtype(dtype).itemsize
    narrow = config.num_kv_heads * config.head_dim
    products: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
        "norm_linear": (norm_linear, (config.num_heads * config.head_dim, narrow, narrow)),
        "norm_swiglu": (norm_swiglu, (wide, wide)),
    }
    for tokens in (1,) if part.tiny else (1, 4, 16):
        for operation, (function, rows) in products.items():

            def make(number: int, tokens: int = tokens, rows: tuple[int, ...] = rows) -> tuple[Any, ...]:
                x, delta = (normal((tokens, width), dtype, number + at) for at in (1, 2))
                weights = (normal((out, width), dtype, number + 3 + at, width**-0.5) for at, out in enumerate(rows))
                return x, delta, normal((width,), dtype, number), *weights

            def run(
                implementation: str | None, x: Any, delta: Any, norm: Any, *weights: Any, of: Any = function
            ) -> Any:
                return of(x, norm, *weights, eps=1e-5, delta=delta, implementation=implementation)

            out = sum(rows)
            moved = size * (out * width + tokens * (3 * width + out))
            yield Case(operation, f"{tokens} tokens", run, make, moved, 2.0 * tokens * out * width)


FAMILIES = (linear_cases, attention_cases, cached_cases, norm_cases, ring_cases, small_cases)


def lowered(case: Case, implementation: str | None, operands: tuple[Any, ...]) -> Any:
    """The case's program, not compiled yet.

    Raises:
      ImplementationError: there is no such implementation, or it does not take the operands.
    """
    import jax

    return jax.jit(functools.partial(case.run, implementation)).lower(*operands)


def timed(clock: Clock, program: Callable[..., Any], sets: list[tuple[Any, ...]], repetitions: int) -> Clocked:
    """A compiled program on its sets of operands, in turn."""
    return clock.time([functools.partial(program, *operands) for operands in sets], repetitions)


def in_turn(part: Part) -> Iterator[Case]:
    """The cases of all families, one of each at a time: little time leaves no family out."""
    families = [family(part) for family in FAMILIES]
    for together in itertools.zip_longest(*families):
        yield from (case for case in together if case is not None)


def kernels_part(part: Part) -> None:
    """Every case by every implementation: microseconds, GB/s, TFLOP/s."""
    _measure(part, in_turn(part), implementations())


def mosaic_part(part: Part) -> None:
    """The same of Mosaic's kernels, where nothing else is lost if one of them hangs."""
    if not on_gpu():
        part.skip("all cases", "there is no GPU to time them on")
        return
    _measure(part, (case for case in in_turn(part) if case.operation in MOSAIC_OPERATIONS), ("mosaic",))


def _measure(part: Part, cases: Iterator[Case], implementations: tuple[str, ...]) -> None:
    """Some cases are compiled together, and then timed."""
    clock = Clock()
    while part.left() > 0:
        batch = list(itertools.islice(cases, TOGETHER))
        if not batch:
            return
        sets = [case.make(0) for case in batch]
        programs = []
        for at, case in enumerate(batch):
            for name in implementations:
                try:
                    programs.append((at, name, lowered(case, name, sets[at])))
                except Exception as error:
                    _refused(part, case, name, error)
        made = compile_together([program for _, _, program in programs])
        del sets
        for at, case in enumerate(batch):
            own = [(name, program) for (of, name, _), program in zip(programs, made, strict=True) if of == at]
            operands = part.attempt(f"{case.operation}, {case.name}", functools.partial(copies, case.make, part.scale))
            for name, program in own if operands else ():
                try:
                    if isinstance(program, Exception):
                        raise program
                    _row(part, case, name, timed(clock, program, operands, part.scale.repetitions))
                except Exception as error:
                    _refused(part, case, name, error)
    left = sum(1 for _ in cases)
    if left:
        part.skip(f"{left} more cases", "no time was left")


def _refused(part: Part, case: Case, implementation: str, error: Exception) -> None:
    """Tells of an implementation that said itself that it can't, and of one that failed."""
    from fusedllm.errors import ImplementationError

    prefix = "" if isinstance(error, ImplementationError) else "FAILED: "
    part.skip(f"{case.operation}, {case.name}, {implementation}", prefix + reason(error))


def _row(part: Part, case: Case, implementation: str, found: Clocked) -> None:
    seconds = found.spread()
    part.row(
        operation=case.operation,
        case=case.name,
        implementation=implementation,
        microseconds=1e6 * seconds.median,
        spread=1e6 * seconds.iqr,
        bytes=case.bytes,
        operations=case.operations,
        gigabytes_per_second=case.bytes / seconds.median / 1e9,
        teraoperations_per_second=case.operations / seconds.median / 1e12,
        waited_for_the_host=found.late,
    )


def quantize_part(part: Part) -> None:
    """Quantizing and dequantizing, in bytes read and written a second, beside a copy in the same process."""
    import jax

    from fusedllm.kernels.dequantize import dequantize
    from fusedllm.kernels.quantize import quantize
    from fusedllm.quant.schemes import SCHEMES

    clock, scale = Clock(), part.scale
    config = config_of(scale)
    shape = (config.vocab_size // (16 if part.tiny else 1), config.hidden_size)
    plain = normal(shape, scale.dtype, 1)
    copy = jax.jit(lambda x: x + 1)
    took = clock.time([lambda: copy(plain)], scale.repetitions).spread()
    limit = 2 * plain.nbytes / took.median
    part.put("copy", Spread.of([limit]))
    for scheme in QUANTIZE_SCHEMES[:2] if part.tiny else QUANTIZE_SCHEMES:
        encode = jax.jit(lambda x, scheme=scheme: quantize(x, SCHEMES[scheme]))
        codes = part.attempt(f"quantize, {scheme}", lambda encode=encode: jax.block_until_ready(encode(plain)))
        if codes is None:
            continue
        decode = jax.jit(lambda codes: dequantize(codes, scale.dtype))
        moved = plain.nbytes + sum(leaf.nbytes for leaf in jax.tree.leaves(codes))
        runs = {"quantize": functools.partial(encode, plain), "dequantize": functools.partial(decode, codes)}
        for name, run in runs.items():
            found = part.attempt(f"{name}, {scheme}", lambda run=run: clock.time([run], scale.repetitions).spread())
            if found is not None:
                rate = moved / found.median
                part.row(operation=name, scheme=scheme, seconds=found, bytes_per_second=rate, of_copy=rate / limit)
