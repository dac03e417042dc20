"""fusedllm: a LLaMA that runs as one compiled XLA program.

`load` makes an `LLM`; `SamplingParams` says how it answers; `quantize` makes the weights in an Arrow table small.
Everything is imported when it is first used, so that `import fusedllm` is instant and chooses no backend.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusedllm.config import ModelConfig, SamplingParams
    from fusedllm.engine.compile_guard import forbid_compile
    from fusedllm.engine.config import EngineConfig
    from fusedllm.engine.results import Completion, Usage
    from fusedllm.errors import FusedLLMError
    from fusedllm.llm import LLM, load
    from fusedllm.quant.faces import quantize_array, quantize_arrays, quantize_report
    from fusedllm.quant.report import QuantizeReport
    from fusedllm.quantizing import dequantize, quantize

__version__ = "0.1.0"

_HOMES = {
    "Completion": "fusedllm.engine.results",
    "EngineConfig": "fusedllm.engine.config",
    "FusedLLMError": "fusedllm.errors",
    "LLM": "fusedllm.llm",
    "ModelConfig": "fusedllm.config",
    "SamplingParams": "fusedllm.config",
    "QuantizeReport": "fusedllm.quant.report",
    "Usage": "fusedllm.engine.results",
    "dequantize": "fusedllm.quantizing",
    "forbid_compile": "fusedllm.engine.compile_guard",
    "load": "fusedllm.llm",
    "quantize": "fusedllm.quantizing",
    "quantize_array": "fusedllm.quant.faces",
    "quantize_arrays": "fusedllm.quant.faces",
    "quantize_report": "fusedllm.quant.faces",
}

__all__ = [
    "LLM",
    "Completion",
    "EngineConfig",
    "FusedLLMError",
    "ModelConfig",
    "QuantizeReport",
    "SamplingParams",
    "Usage",
    "dequantize",
    "forbid_compile",
    "load",
    "quantize",
    "quantize_array",
    "quantize_arrays",
    "quantize_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fusedllm' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
