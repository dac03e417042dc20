"""What the device is, whether the kernels' tests pass there, and what it can do at all: parts of `gpu.py`."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from common import Spread, environment
from gpu_part import ROOT, Clock, Part, normal

# What `nvidia-smi` tells; nothing is ever set.
READINGS = (
    "name",
    "driver_version",
    "memory.total",
    "memory.used",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "power.draw",
    "power.limit",
    "temperature.gpu",
    "pcie.link.gen.current",
    "pcie.link.width.current",
    "utilization.gpu",
)
PACKAGES = ("fusedllm", "jax", "jaxlib", "jax-cuda13-plugin", "numpy", "torch", "transformers", "triton", "pyzmq")

# Processes, each with a client of the GPU.
MOST_TESTS_TOGETHER = 12

# Launches of the smallest program, of which one is timed.
LAUNCHES = 200


def readings() -> dict[str, str]:
    """The GPU's state by its own tool, by the names that it has there; empty without one."""
    if shutil.which("nvidia-smi") is None:
        return {}
    query = ["nvidia-smi", f"--query-gpu={','.join(READINGS)}", "--format=csv,noheader", "--id=0"]
    ran = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30)
    values = [value.strip() for value in ran.stdout.strip().split(",")]
    return dict(zip(READINGS, values, strict=False)) if ran.returncode == 0 else {}


def environment_part(part: Part) -> None:
    """Device, driver, versions, and which packages are missing."""
    import jax

    part.put("environment", environment(*PACKAGES))
    part.put("nvidia_smi", readings())
    device = jax.devices()[0]
    found = {"platform": device.platform, "kind": device.device_kind, "count": len(jax.devices())}
    found["compute_capability"] = getattr(device, "compute_capability", None)
    stats = device.memory_stats() or {}
    found["bytes_limit"] = stats.get("bytes_limit")
    part.put("device", found)
    part.put("flags", {name: os.environ.get(name) for name in ("XLA_FLAGS", "XLA_PYTHON_CLIENT_MEM_FRACTION")})
    for name, value in {**found, **part.found["nvidia_smi"]}.items():
        print(f"  {name}: {value}")


def tests_part(part: Part) -> None:
    """`pytest -m gpu` in processes of its own; without an accelerator only what it would collect.

    Mosaic's kernels come last, and apart: one that is wrong hangs, and until it is killed nothing else runs.
    """
    # The others' packages (servers, clients) need not be here.
    marked = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text("utf-8")]
    is_collected_only = not _has_accelerator()
    texts, ended = [], []
    for last in (False, True):
        files = [str(path) for path in marked if ("mosaic" in path.name) == last]
        if last and part.left() <= 0:
            ended.append("Mosaic's tests were not begun, for want of time")
            break
        text, code = _pytest(part, files, is_collected_only)
        texts.append(text)
        ended.append("killed at the end of its time" if code is None else f"exit code {code}")
        part.put("counts", _sum(texts))
        part.put("ended", ", then ".join(ended))
        part.put("passed", set(ended) == {"exit code 0"} and last)
        part.put("tail", "\n".join(text[-4000:] for text in texts))
        print("\n".join(f"  {line}" for line in text.splitlines()[-25:]), flush=True)
    part.put("ended", ", then ".join(ended))


def _pytest(part: Part, files: list[str], is_collected_only: bool) -> tuple[str, int | None]:
    """What pytest said of the tests for a GPU in `files`, and its exit code; `None` if it was killed."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=line"]
    # A file that can't be imported here takes no other with it.
    command += ["--continue-on-collection-errors", "-p", "no:benchmark", *files]
    for what in ("reading", "writing"):
        # One process may read a compiled program that another is writing; it then compiles, and warnings are errors.
        command += ["-W", f"ignore:Error {what} persistent compilation cache entry"]
    if is_collected_only:
        command += ["--collect-only"]
    elif importlib.util.find_spec("xdist"):
        # Most of a test's time is a compiler's, on one core.
        command += ["-n", str(max(1, min(MOST_TESTS_TOGETHER, (os.cpu_count() or 1) - 2)))]
    # A GPU's memory is shared with nobody, but tests take little of it and should not wait for all to be given.
    where = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    lines: list[str] = []
    process = subprocess.Popen(
        command, cwd=ROOT, env=where, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    assert process.stdout
    os.set_blocking(process.stdout.fileno(), False)
    while process.poll() is None and part.left() > 0:
        time.sleep(0.2)
        lines += process.stdout.readlines()
    ended = process.poll()
    if ended is None:
        process.kill()
        process.wait()
    lines += process.stdout.readlines()
    process.stdout.close()
    return "".join(lines), ended


def _sum(texts: list[str]) -> dict[str, int]:
    """The counts of several runs of pytest."""
    each = [counts(text) for text in texts]
    return {word: sum(one.get(word, 0) for one in each) for word in dict.fromkeys(word for one in each for word in one)}


def counts(text: str) -> dict[str, int]:
    """How many tests passed, failed and so on, by pytest's last line, or by its dots where it was killed."""
    found = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error|skipped|deselected)", text)}
    if "passed" not in found and "failed" not in found:
        dots = "".join(re.findall(r"^[.FEsx]+(?=\s|$)", text, re.MULTILINE))
        found |= {"passed": dots.count("."), "failed": dots.count("F") + dots.count("E")}
    return found


def _has_accelerator() -> bool:
    # In a process of its own: this one must not hold the GPU while the tests have it.
    code = "import jax, sys; sys.exit(jax.default_backend() == 'cpu')"
    return subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


def ceilings_part(part: Part) -> None:
    """Bytes and operations a second that anything else here is divided by."""
    clock = Clock()
    measures: dict[str, Callable[[], Spread]] = {
        "copy": lambda: copy_rate(part, clock),
        "matmul": lambda: matmul_rate(part, clock, part.scale.dtype),
        "matmul_int8": lambda: matmul_rate(part, clock, "int8"),
        "matmul_fp8": lambda: matmul_rate(part, clock, "float8_e4m3fn"),
        "read": lambda: read_rate(part, clock),
        "to_device": lambda: link_rate(part, to_device=True),
        "to_host": lambda: link_rate(part, to_device=False),
        "to_device_pinned": lambda: link_rate(part, to_device=True, pinned=True),
        "launch": lambda: launch_seconds(part),
        "launch_queued": lambda: queued_launch(part, clock),
    }
    for name, measure in measures.items():
        found = part.attempt(name, measure)
        if found is not None:
            part.put(name, found)
            print(f"  {name}: {found} {'s' if 'launch' in name else '/s'}", flush=True)
    part.put("nvidia_smi", readings())


def copy_rate(part: Part, clock: Clock) -> Spread:
    """Bytes read and written a second by a pass over the device's memory; adding one is free beside the traffic."""
    import jax

    x = normal((part.scale.copy_bytes // 4,), "float32")
    program = jax.jit(lambda x: x + 1)
    found = clock.time([lambda: program(x)], part.scale.repetitions, most=4)
    return Spread.of([2 * x.nbytes / sample for sample in found.samples])


def read_rate(part: Part, clock: Clock) -> Spread:
    """Bytes read a second by a sum over the device's memory: what a product of one token could reach."""
    import jax
    import jax.numpy as jnp

    x = normal((part.scale.copy_bytes // 2048, 1024), "bfloat16")
    program = jax.jit(lambda x: jnp.sum(x, axis=1, dtype=jnp.float32))
    found = clock.time([lambda: program(x)], part.scale.repetitions, most=4)
    return Spread.of([x.nbytes / sample for sample in found.samples])


def matmul_rate(part: Part, clock: Clock, dtype: str) -> Spread:
    """Operations a second of a large product of random numbers, its second operand `[out, in]` as weights are."""
    import jax
    import jax.numpy as jnp

    size = part.scale.matmul_size
    shape = (size, size)
    if dtype == "int8":
        x, w = (jax.random.randint(jax.random.key(at), shape, -128, 128, jnp.int8) for at in range(2))
    else:
        x, w = (normal(shape, dtype, at, scale=size**-0.25) for at in range(2))
    out = jnp.int32 if dtype == "int8" else jnp.float32 if dtype == "float32" else jnp.bfloat16
    multiply = jax.jit(lambda x, w: jnp.einsum("mk,nk->mn", x, w, preferred_element_type=out))
    found = clock.time([lambda: multiply(x, w)], part.scale.repetitions, most=8)
    return Spread.of([2 * size**3 / sample for sample in found.samples])


def link_rate(part: Part, to_device: bool, pinned: bool = False) -> Spread:
    """Bytes a second between the host's memory and the device's, from ordinary memory or from pinned."""
    import jax
    import numpy as np

    device = jax.devices()[0]
    values = np.random.default_rng(0).standard_normal(part.scale.link_bytes // 4, np.float32)
    place: Any = device
    source: Any = values
    if pinned:
        place = jax.sharding.SingleDeviceSharding(device)
        source = jax.block_until_ready(jax.device_put(values, place.with_memory_kind("pinned_host")))
    samples = []
    for turn in range(part.scale.repetitions + 1):
        began = time.perf_counter()
        moved = jax.block_until_ready(jax.device_put(source, place, may_alias=False))
        took = time.perf_counter() - began
        if not to_device:
            fresh = jax.block_until_ready(moved + 1)  # Of an array that came from the host it might be remembered.
            began = time.perf_counter()
            np.asarray(fresh)
            took = time.perf_counter() - began
        if turn:
            samples.append(took)
        del moved
    return Spread.of([values.nbytes / sample for sample in samples])


def launch_seconds(part: Part) -> Spread:
    """Seconds from launching the smallest program until its result is there."""
    import jax

    program = jax.jit(lambda x: x + 1)
    x = jax.block_until_ready(program(normal((8,), "float32")))
    samples = []
    for _ in range(LAUNCHES):
        began = time.perf_counter()
        program(x).block_until_ready()
        samples.append(time.perf_counter() - began)
    return Spread.of(samples)


def queued_launch(part: Part, clock: Clock) -> Spread:
    """Seconds that the device takes for the smallest program of those that wait in its queue."""
    import jax

    program = jax.jit(lambda x: x + 1)
    x = normal((8,), "float32")
    return clock.time([lambda: program(x)], 3 * part.scale.repetitions).spread()
