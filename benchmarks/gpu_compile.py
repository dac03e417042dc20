"""Compiles the model's decode and prefill for a GPU that is not here, and says what came out: no GPU is needed.

    pip install -e ".[gpu-compile]"
    python benchmarks/gpu_compile.py
    python benchmarks/gpu_compile.py --target a100 --programs prefill --prefill 1024 --keep DIR

XLA's own compiler for CUDA, Triton's and Mosaic's included, runs on any machine; `targets/*.txtpb` tell it of the chip.
The kernels are those that are chosen on that chip. Autotuning needs a device, so that XLA's own products are not those
of a real one; numbers of kernels, copies, memory, and what our kernels take of registers are. A loop counts once.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import significant, table, write_json
from gpu_hlo import Count, Program

HERE = Path(__file__).parent
TARGETS = {path.stem: path for path in sorted((HERE / "targets").glob("*.txtpb"))}
PROGRAMS = ("decode", "prefill")
PAGE_SIZE = 16
# To see what a layer adds.
FEW_LAYERS = (2, 3)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a program came to: kernels of a step or a prompt and of a layer of it, bytes, and seconds to compile."""

    seconds: float
    count: Count
    layer: Count
    arguments: int
    aliased: int
    temporary: int
    cache: int


def capability(target: str) -> float:
    """The compute capability that a target's text says."""
    found = re.search(r"cuda_compute_capability\s*\{\s*major:\s*(\d+)(?:\s*minor:\s*(\d+))?", target)
    if not found:
        raise SystemExit("the target's text says no cuda_compute_capability.")
    return float(f"{found.group(1)}.{found.group(2) or 0}")


def kind(target: str) -> str:
    """What jax calls the chip that the text of a target describes; any of NVIDIA's where it does not say."""
    found = re.search(r'device_description_str:\s*"([^"]+)"', target)
    return found.group(1) if found else "NVIDIA"


class Compiler:
    """Compiles programs of one model for one chip."""

    def __init__(self, target: str, ckpt: str, dtype: str, max_context: int, prefill: int, batch: int) -> None:
        import jax
        from jax.experimental import topologies
        from jax.sharding import SingleDeviceSharding

        from fusedllm.weights.registry import architecture

        topology = topologies.get_topology_desc("", platform="cuda", target_config=target, topology="1x1x1")
        self._home = SingleDeviceSharding(topology.devices[0])
        self._capability = capability(target)
        self._kind = kind(target)
        self.config = architecture(ckpt)
        self._dtype = jax.numpy.dtype(dtype)
        self._context, self._prefill, self._batch = max_context, prefill, batch

    def compile(self, program: str, scheme: str | None) -> Compiled:
        """The whole model's, and what one layer of it adds."""
        began = time.perf_counter()
        made, cache = self._made(program, scheme, self.config)
        seconds = time.perf_counter() - began
        few = []
        for layers in FEW_LAYERS:
            windows = self.config.sliding_windows[:layers]
            config = dataclasses.replace(self.config, num_layers=layers, sliding_windows=windows)
            few.append(_count(program, self._made(program, scheme, config)[0]))
        memory: Any = made.memory_analysis()
        return Compiled(
            seconds=seconds,
            count=_count(program, made),
            layer=Count(few[1].kernels - few[0].kernels, few[1].copies[len(few[0].copies) :]),
            arguments=memory.argument_size_in_bytes,
            aliased=memory.alias_size_in_bytes,
            temporary=memory.temp_size_in_bytes,
            cache=cache,
        )

    def _made(self, program: str, scheme: str | None, config: Any) -> tuple[Any, int]:
        """The compiled program, and how many bytes the KV cache has that it is given."""
        import jax
        import numpy as np

        from fusedllm.config import Sampler
        from fusedllm.engine.config import EngineConfig
        from fusedllm.engine.programs import Programs
        from fusedllm.engine.slots import empty_seats, mask_words
        from fusedllm.kernels.choose import traced_for
        from fusedllm.model.cache import empty_cache
        from fusedllm.partition.plain import Plain

        engine = EngineConfig.suited(
            "gpu",
            max_context=self._context,
            cache_tokens=self._batch * self._context,
            page_size=PAGE_SIZE,
            prefill_buckets=(self._prefill,),
            batch_buckets=(self._batch,),
        )
        params = jax.eval_shape(functools.partial(_params, config, self._dtype, scheme))
        cache = jax.eval_shape(lambda: empty_cache(config, engine.num_pages, PAGE_SIZE, self._dtype))
        seats = jax.eval_shape(lambda: empty_seats(config, engine.max_batch, engine.table_entries, 4))
        programs = Programs(config, Plain(), self._dtype)
        shape, whole = jax.ShapeDtypeStruct, np.dtype(np.int32)
        function: Callable[..., Any]
        if program == "decode":
            decode = functools.partial(
                programs.decode,
                most=engine.decode_steps,
                sampler=Sampler.UNFILTERED,
                free_steps=engine.free_steps,
            )
            function, donated = decode, (1, 2)
            orders = shape((self._batch, 3 + engine.new_pages), whole)
            allowed = shape((self._batch, mask_words(config)), np.dtype(np.uint32))
            arguments = (params, cache, seats, orders, shape((), whole), allowed)
        else:
            function, donated = programs.prefill, (1,)
            tokens, table_ = shape((1, self._prefill), whole), shape((1, engine.table_entries), whole)
            arguments = (params, cache, tokens, shape((1,), whole), table_, shape((), whole))
        placed = jax.tree.map(lambda leaf: shape(leaf.shape, leaf.dtype, sharding=self._home), arguments)
        # From jax 0.11 on Pallas asks for a device; of NVIDIA's it knows the names.
        device = jax.sharding.AbstractDevice(device_kind=self._kind, num_cores=None, platform="gpu")
        mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
        with traced_for("gpu", self._capability), jax.sharding.use_abstract_mesh(mesh):
            made = jax.jit(function, donate_argnums=donated).lower(*placed).compile()
        return made, sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))


def _params(config: Any, dtype: Any, scheme: str | None) -> Any:
    """Zeros of the parameters' shapes, for `jax.eval_shape`."""
    import jax
    import jax.numpy as jnp

    from fusedllm.kernels.quantize import quantize
    from fusedllm.model.params import ParamSpec, describe
    from fusedllm.quant.schemes import SCHEMES

    def leaf(spec: ParamSpec) -> Any:
        weight = jnp.zeros(spec.shape, dtype)
        plain = scheme is None or spec.init != "normal"
        return weight if plain else quantize(weight, SCHEMES[str(scheme)], implementation="xla")

    return jax.tree.map(leaf, describe(config), is_leaf=lambda each: isinstance(each, ParamSpec))


def _count(program: str, made: Any) -> Count:
    """Of a decode program a step, of a prompt all."""
    read = Program(made.as_text())
    return read.largest_loop() if program == "decode" else read.count()


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What `ptxas` says of a kernel: registers of a thread, and bytes that did not fit them."""

    name: str
    registers: int
    spilled: int
    shared: int


def kernels(directory: Path, major: float) -> list[Kernel] | None:
    """Every kernel of the PTX that was dumped into `directory`; `None` without `ptxas`."""
    tool = ptxas()
    if tool is None:
        return None
    # The features of one generation alone (wgmma and the like) have names with an "a", from Hopper on.
    target = f"sm_{round(10 * major)}" + "a" * (major >= 9)
    found: dict[str, Kernel] = {}
    for path in sorted(directory.glob("*.ptx")):
        ran = subprocess.run(
            [tool, "-v", f"-arch={target}", str(path), "-o", os.devnull], capture_output=True, text=True, check=False
        )
        for one in _read(ran.stderr):
            found[one.name] = one
    return list(found.values())


def _read(text: str) -> list[Kernel]:
    found, name, spilled = [], "", 0
    for line in text.splitlines():
        if entry := re.search(r"Compiling entry function '([^']+)'", line):
            name, spilled = entry.group(1), 0
        elif spills := re.search(r"(\d+) bytes spill stores", line):
            spilled = int(spills.group(1))
        elif used := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            found.append(Kernel(name, int(used.group(1)), spilled, int(shared.group(1)) if shared else 0))
    return found


def ptxas() -> str | None:
    """CUDA's assembler: on the path, where CUDA is usually installed, or of the wheel `nvidia-cuda-nvcc`."""
    places = [shutil.which("ptxas"), f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin/ptxas"]
    nvidia = importlib.util.find_spec("nvidia")
    for root in (nvidia.submodule_search_locations or []) if nvidia else []:
        places += map(str, Path(root).glob("*/bin/ptxas"))
    return next((place for place in places if place and os.access(place, os.X_OK)), None)


def report(chip: str, rows: dict[str, Compiled], used: Sequence[Kernel] | None) -> str:
    """The table, and kernels that spill or use most registers."""
    columns = [f"for {chip}", "compiled in s", "kernels", "a layer", "copies", "of MB", "cache MB", "aliased MB",
               "temporary MB"]  # fmt: skip
    lines = [
        [
            name,
            f"{one.seconds:.1f}",
            str(one.count.kernels),
            str(one.layer.kernels),
            str(len(one.count.copies)),
            significant(sum(one.count.copies) / 1e6),
            significant(one.cache / 1e6),
            significant(one.aliased / 1e6),
            significant(one.temporary / 1e6),
        ]
        for name, one in rows.items()
    ]
    text = table(columns, lines)
    if used is None:
        return text + "\n\nptxas was not found, so that nothing is said of registers."
    spilling = [kernel for kernel in used if kernel.spilled]
    text += f"\n\n{len(used)} kernels, {len(spilling)} of them spill."
    most = sorted(used, key=lambda kernel: (-kernel.spilled, -kernel.registers))[:8]
    lines = [[one.name[:60], str(one.registers), str(one.spilled), str(one.shared)] for one in most]
    return text + "\n\n" + table(["kernel", "registers", "bytes spilled", "bytes shared, static"], lines)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="h200", help=f"{', '.join(TARGETS)}, or a file (default: %(default)s)")
    parser.add_argument("--ckpt", default="llama-1b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--scheme", help="quantized weights")
    parser.add_argument("--programs", nargs="+", default=list(PROGRAMS), choices=PROGRAMS)
    parser.add_argument("--max-context", type=int, default=2048)
    parser.add_argument("--prefill", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="what XLA writes of its passes, PTX included")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    target = TARGETS.get(arguments.target, Path(arguments.target)).read_text(encoding="utf-8")
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        raise SystemExit("XLA's compiler for CUDA is not installed: pip install jax-cuda13-plugin jax-cuda13-pjrt.")
    with tempfile.TemporaryDirectory(prefix="fusedllm-dump-") as scratch:
        directory = arguments.keep or Path(scratch)
        # Before jax is imported. The tests' CPU is the default device, so that nothing looks for a GPU.
        os.environ["JAX_PLATFORMS"] = "cpu"
        flags = f"--xla_gpu_autotune_level=0 --xla_dump_to={directory}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
        sys.path.insert(0, str(HERE.parent))
        compiler = Compiler(
            target, arguments.ckpt, arguments.dtype, arguments.max_context, arguments.prefill, arguments.batch
        )
        rows = {
            (f"prefill of {arguments.prefill}" if name == "prefill" else f"decode, batch {arguments.batch}"):
            compiler.compile(name, arguments.scheme)
            for name in arguments.programs
        }  # fmt: skip
        used = kernels(directory, capability(target))
    print(report(arguments.target, rows, used))
    if arguments.json:
        plain = {name: dataclasses.asdict(row) for name, row in rows.items()}
        told = [dataclasses.asdict(kernel) for kernel in used or ()]
        write_json(arguments.json, {"target": arguments.target, "programs": plain, "kernels": told})


if __name__ == "__main__":
    main()
