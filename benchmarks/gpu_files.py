"""An Arrow file into the device's memory beside the link, and compiling cold and warm: parts of `gpu.py`."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import Spread, Worker, seconds, serve
from gpu_part import Part, config_of

# Of a file's size, that must be free where it is written.
ROOM = 1.2


def arrow_part(part: Part) -> None:
    """Writes the model's shape as an Arrow file, and loads it from the page cache."""
    import jax
    import numpy as np

    from fusedllm.weights.convert import convert
    from fusedllm.weights.load import load_params
    from fusedllm.weights.open import open_checkpoint
    from fusedllm.weights.random import random_checkpoint

    with tempfile.TemporaryDirectory(
        prefix="fusedllm-gpu-", dir=_shared_memory(2 * config_of(part.scale).num_parameters)
    ) as directory:
        path = Path(directory, "model.arrow")
        checkpoint = random_checkpoint(config_of(part.scale), np.dtype(part.scale.dtype))
        part.put("write_seconds", seconds(lambda: convert(checkpoint, path)))
        part.put("directory", str(Path(directory).parent))
        size = path.stat().st_size
        part.put("file_bytes", size)
        samples: list[float] = []
        for turn in range(part.scale.repetitions + 1):
            if part.left() <= 0 and samples:
                break
            began = time.perf_counter()
            params, report = load_params(open_checkpoint(path), dtype=np.dtype(part.scale.dtype))
            jax.block_until_ready(params)
            if turn:
                samples.append(time.perf_counter() - began)
            del params
            part.put("bytes", report.bytes)
        rates = [report.bytes / sample for sample in samples]
        part.put("load_seconds", Spread.of(samples))
        part.put("bytes_per_second", Spread.of(rates))
        print(f"  {report.bytes:,} bytes in {Spread.of(samples)} s: {Spread.of(rates).median / 1e9:.1f} GB/s")
        read = seconds(path.read_bytes)
        part.put("file_read_bytes_per_second", size / read)


def _shared_memory(size: int) -> str | None:
    """A file there is certain to be in memory, as one in a page cache is; `None` where `size` bytes have no room."""
    place = Path("/dev/shm")
    is_usable = place.is_dir() and os.access(place, os.W_OK)
    return str(place) if is_usable and shutil.disk_usage(place).free > ROOM * size else None


class Compiler:
    """A process that compiles the programs of one model: none of them is in its memory yet."""

    def run(self, scale: dict[str, Any], directory: str) -> dict[str, float]:
        """Seconds to compile decode of one request and a prompt, and until the first answer was there."""
        import jax
        from gpu_model import random_params
        from gpu_part import GPU, TINY

        from fusedllm.engine.config import EngineConfig
        from fusedllm.llm import LLM

        if directory:
            jax.config.update("jax_compilation_cache_dir", directory)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
            jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        chosen = TINY if scale["tiny"] else GPU
        config, tokens = config_of(chosen), max(size for size in chosen.prefill if size <= 1024)
        params = random_params(config, chosen.dtype)
        engine = EngineConfig.suited(
            jax.default_backend(),
            max_context=tokens + 64,
            prefill_buckets=(tokens,),
            batch_buckets=(1,),
            prefix_cache=False,
        )
        llm = LLM(config, params, engine=engine, dtype=chosen.dtype)
        began = time.perf_counter()
        llm.warm_up()
        took = time.perf_counter() - began
        return {"warm_up_seconds": took, "compile_seconds": llm.engine.runner.compile_seconds}


def compile_part(part: Part) -> None:
    """Two processes that share a directory of compiled programs, which is empty for the first."""
    with tempfile.TemporaryDirectory(prefix="fusedllm-programs-") as directory:
        for name in ("cold", "warm"):
            if part.left() <= 0:
                part.skip(name, "no time was left")
                return
            began = time.perf_counter()
            worker = Worker([sys.executable, __file__])
            try:
                found = worker.ask("run", {"tiny": part.tiny}, directory)
            finally:
                worker.close()
            part.row(programs=name, **found, process_seconds=time.perf_counter() - began)


if __name__ == "__main__":
    serve(Compiler)
