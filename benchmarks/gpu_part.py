"""One part of `gpu.py` in a process of its own: sizes, the clock for a device's queue, figures written as they come.

    python benchmarks/gpu_part.py NAME --out FILE [--tiny] [--seconds N]

A process of its own gives its GPU's memory back, and takes nobody with it where a kernel fails. What it found is
written after every row, so that a part that is killed keeps what it has.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import Spread, plain_json

ROOT = Path(__file__).parent.parent
if str(ROOT) not in sys.path:  # From the source tree: nothing needs to be installed.
    sys.path.insert(0, str(ROOT))

# A client of a GPU takes no more than 32 programs that have not run yet, the one that plugs the queue among them.
QUEUED = 24
PLUG_SIZE = 4096
# Longer than the host takes to launch the rest: some 10 to 40 microseconds each.
PLUG_SECONDS = 2e-3
MOST_PLUGS = 64
# Threads that compile.
COMPILERS = 8


@dataclass(frozen=True)
class Scale:
    """How large things are on a kind of device.

    `cold_bytes` is how much is read before the same memory is read again: beyond any cache.
    """

    ckpt: str
    dtype: str
    repetitions: int
    copy_bytes: int
    matmul_size: int
    link_bytes: int
    cold_bytes: int
    prefill: tuple[int, ...]
    chunk: int
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    steps: int
    small: bool = False


# llama-1b as it is. A prompt of 16k goes in chunks of 4,096, as the engine would have it.
GPU = Scale(
    ckpt="llama-1b",
    dtype="bfloat16",
    repetitions=7,
    copy_bytes=2**32,
    matmul_size=8192,
    link_bytes=2**30,
    cold_bytes=2**28,
    prefill=(128, 1024, 4096, 16384),
    chunk=4096,
    contexts=(128, 1024, 8192),
    batches=(1, 8, 32, 128),
    steps=32,
)
# To see that the programs work. What it measures says nothing about anything.
TINY = Scale(
    ckpt="smollm2-135m",
    dtype="float32",
    repetitions=2,
    copy_bytes=2**20,
    matmul_size=128,
    link_bytes=2**20,
    cold_bytes=2**16,
    prefill=(16, 32),
    chunk=16,
    contexts=(16,),
    batches=(1, 2),
    steps=4,
    small=True,
)

# The shape of the model then.
SMALL = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_layers": 1,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 32,
    "sliding_windows": (None,),
}


@dataclass
class Part:
    """What a part is given: its scale, until when it may work, and where its figures go."""

    scale: Scale
    tiny: bool
    deadline: float
    write: Callable[[dict[str, Any]], None]
    found: dict[str, Any] = field(default_factory=dict)

    def left(self) -> float:
        """Seconds until the part must end."""
        return self.deadline - time.monotonic()

    def put(self, name: str, value: Any) -> None:
        """One figure of the part."""
        self.found[name] = value
        self.write(self.found)

    def row(self, **columns: Any) -> None:
        """One more row of the part's table, printed as it comes."""
        self.put("rows", [*self.found.get("rows", []), columns])
        print("  " + ", ".join(f"{name} {shown(value)}" for name, value in columns.items()), flush=True)

    def attempt(self, what: str, function: Callable[[], Any]) -> Any:
        """What `function` returns; `None` and a line that says why where it fails or there is no time left for it."""
        if self.left() <= 0:
            self.skip(what, "no time was left")
            return None
        try:
            return function()
        except Exception as error:
            self.skip(what, reason(error))
            return None

    def skip(self, what: str, why: str) -> None:
        """`what` was not measured."""
        self.put("skipped", {**self.found.get("skipped", {}), what: why})
        print(f"  not measured: {what} ({why})", flush=True)


def shown(value: Any) -> str:
    """A figure of a row, short."""
    number = value.median if isinstance(value, Spread) else value
    return f"{number:.4g}" if isinstance(number, float) else str(number)


def reason(error: BaseException) -> str:
    """The error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {(lines or ['no message'])[0][:300]}"


def peak_memory() -> int | None:
    """The most bytes of the device that were in use, where jax tells."""
    import jax

    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use")


def config_of(scale: Scale) -> Any:
    """The shape of the scale's model."""
    import dataclasses

    from fusedllm.weights.registry import architecture

    config = architecture(scale.ckpt)
    return dataclasses.replace(config, **SMALL) if scale.small else config


def on_gpu() -> bool:
    """Whether jax computes on something else than this CPU."""
    import jax

    return jax.default_backend() != "cpu"


def normal(shape: Sequence[int], dtype: Any, number: int = 0, scale: float = 1.0) -> Any:
    """Normal numbers made on the device: never zeros, which a GPU multiplies faster."""
    import numpy as np

    return _drawn(tuple(shape), np.dtype(dtype).name, number, scale)


@functools.cache
def _drawing() -> Any:
    import jax

    def draw(shape: tuple[int, ...], dtype: str, number: Any, scale: Any) -> Any:
        return (jax.random.normal(jax.random.key(number), shape) * scale).astype(dtype)

    return jax.jit(draw, static_argnums=(0, 1))


def _drawn(shape: tuple[int, ...], dtype: str, number: int, scale: float) -> Any:
    return _drawing()(shape, dtype, number, scale)


@dataclass(frozen=True)
class Clocked:
    """Seconds of one run, in several samples; `late` if the device waited for the host, whose time it is then."""

    samples: tuple[float, ...]
    late: bool

    def spread(self) -> Spread:
        """The median of the samples."""
        return Spread.of(self.samples)


class Clock:
    """Seconds that the device takes for a program, without the host's time to launch it.

    Launches wait in the device's queue behind a plug, products that last longer than launching all of them, and what
    the plug takes alone is subtracted. On a CPU there is no such queue: runs are timed as they are.
    """

    def __init__(self) -> None:
        self._plug: Callable[[], Any] | None = None
        if on_gpu():
            self._plug = self._make_plug()

    def time(self, runs: Sequence[Callable[[], Any]], repetitions: int, most: int = QUEUED) -> Clocked:
        """Of one of `runs`, which take turns: each should read other memory, more than fits a cache together."""
        import jax

        for run in runs:
            jax.block_until_ready(run())
        if self._plug is None:
            samples = []
            for _ in range(repetitions):
                began = time.perf_counter()
                for run in runs[:most]:
                    jax.block_until_ready(run())
                samples.append((time.perf_counter() - began) / len(runs[:most]))
            return Clocked(tuple(samples), False)
        count = max(1, most)
        turns = [runs[at % len(runs)] for at in range(count)]
        samples, late = [], False
        for _ in range(repetitions):
            alone, _ = self._queue([])
            took, launching = self._queue(turns)
            late |= launching > alone
            samples.append(max(took - alone, 1e-9) / count)
        return Clocked(tuple(samples), late)

    def _queue(self, runs: Sequence[Callable[[], Any]]) -> tuple[float, float]:
        """Seconds of the plug and `runs` after it, and when the last was launched."""
        import jax

        assert self._plug is not None
        began = time.perf_counter()
        results = [self._plug()]
        for run in runs:
            # All but the last are let go of as soon as the device is done with them.
            results[-1:] = [run()]
        launching = time.perf_counter() - began
        jax.block_until_ready(results)
        return time.perf_counter() - began, launching

    def _make_plug(self) -> Callable[[], Any]:
        import jax
        import jax.numpy as jnp

        x = normal((PLUG_SIZE, PLUG_SIZE), jnp.bfloat16, scale=1 / PLUG_SIZE**0.5)

        def products(x: Any, count: int) -> Any:
            # No loop: of one whose turns are counted on the device the host waits for each.
            y = x
            for _ in range(count):
                y = jnp.dot(y, x)
            return y

        turn = jax.jit(products, static_argnums=1)

        def took(count: int) -> float:
            turn(x, count).block_until_ready()
            began = time.perf_counter()
            turn(x, count).block_until_ready()
            return time.perf_counter() - began

        each = max((took(10) - took(2)) / 8, 1e-6)
        count = min(max(2, round(PLUG_SECONDS / each)), MOST_PLUGS)
        turn(x, count).block_until_ready()
        return lambda: turn(x, count)


def compile_together(lowered: Sequence[Any]) -> list[Any]:
    """Each of jax's lowered programs compiled, or the error that it met: compilers use one core each."""

    def one(program: Any) -> Any:
        try:
            return program.compile()
        except Exception as error:
            return error

    with ThreadPoolExecutor(max(1, min(COMPILERS, os.cpu_count() or 1))) as pool:
        return list(pool.map(one, lowered))


def copies(make: Callable[[int], Any], scale: Scale, most: int = 64) -> list[Any]:
    """`make(number)` so often that together they are more than any cache holds."""
    import jax

    first = make(0)
    size = max(1, sum(leaf.nbytes for leaf in jax.tree.leaves(first)))
    return [first, *(make(number) for number in range(1, min(most, -(-scale.cold_bytes // size))))]


def atomically(path: Path, found: dict[str, Any]) -> None:
    """Writes `found`, so that whoever reads meets the old or the new."""
    new = path.with_suffix(".new")
    new.write_text(plain_json(found), encoding="utf-8")
    os.replace(new, path)


def run(module: str, function: str, part: Part) -> None:
    """Runs a part in this process; what went wrong goes into what it found."""
    began = time.perf_counter()
    try:
        getattr(importlib.import_module(module), function)(part)
    except Exception as error:
        part.put("failed", reason(error))
        if not part.tiny:
            import traceback

            traceback.print_exc()
    part.put("seconds", round(time.perf_counter() - began, 2))
    gc.collect()


def main() -> None:
    """The command, for `gpu.py`."""
    from gpu_parts import PARTS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[each.name for each in PARTS])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--seconds", type=float, default=600)
    arguments = parser.parse_args()
    each = next(each for each in PARTS if each.name == arguments.name)
    part = Part(
        scale=TINY if arguments.tiny else GPU,
        tiny=arguments.tiny,
        deadline=time.monotonic() + arguments.seconds,
        write=lambda found: atomically(arguments.out, found),
    )
    run(each.module, each.function, part)
    sys.exit(1 if "failed" in json.loads(plain_json(part.found)) else 0)


if __name__ == "__main__":
    main()
