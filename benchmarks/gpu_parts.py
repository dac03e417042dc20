"""The parts of `gpu.py`, in the order in which they run: where each is, and how long it may take on a GPU."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Each:
    """A part: `function` of `module` takes a `gpu_part.Part`; `seconds` it may take of the whole's eight minutes."""

    name: str
    title: str
    module: str
    function: str
    seconds: float


PARTS = (
    Each("environment", "device, driver, versions and clocks", "gpu_ceilings", "environment_part", 15),
    Each("tests", "the kernels' tests (pytest -m gpu)", "gpu_ceilings", "tests_part", 45),
    Each("ceilings", "copies, products, the link, a launch", "gpu_ceilings", "ceilings_part", 25),
    Each("decode", "tokens a second at several contexts and batches", "gpu_model", "decode_part", 60),
    Each("prefill", "prompts of several lengths", "gpu_model", "prefill_part", 45),
    Each("quantized", "decode and prefill of quantized weights beside bfloat16", "gpu_model", "quantized_part", 70),
    Each("peers", "transformers on the same device, eager and compiled", "gpu_peers", "peers_part", 65),
    Each("kernels", "each operation by each of its implementations", "gpu_kernels", "kernels_part", 45),
    Each("quantize", "quantizing beside a copy", "gpu_kernels", "quantize_part", 10),
    Each("arrow", "an Arrow file into the device's memory, beside the link", "gpu_files", "arrow_part", 15),
    Each("crossings", "one crossing of the trust boundary", "gpu_policies", "crossings_part", 10),
    Each("policies", "a prompt under each policy", "gpu_policies", "policies_part", 30),
    Each("ladder", "the predecessor's calls, improved step by step", "gpu_policies", "ladder_part", 25),
    Each("compile", "compiling, cold and warm", "gpu_files", "compile_part", 30),
    Each("tables", "the kernels' tables of tiles, varied", "gpu_tables", "tables_part", 30),
    Each("mosaic", "the same of Mosaic's kernels, apart: one may hang", "gpu_kernels", "mosaic_part", 20),
)
