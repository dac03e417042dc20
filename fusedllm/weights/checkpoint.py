"""`Checkpoint`: what each format reads into and writes from. Tensors are named as in a HF LLaMA, and read lazily."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fusedllm.config import ModelConfig
from fusedllm.qarray import QuantArray
from fusedllm.text.data import TokenizerData


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """One tensor of a checkpoint, not read yet.

    Attributes:
      name: HF's name, such as `model.layers.0.self_attn.q_proj.weight`; matrices are `[out, in]`.
      shape: the logical shape.
      dtype: what `read` returns: float32, float16, bfloat16 (of `ml_dtypes`) or an integer type.
      nbytes: bytes in the file.
      read: the values; a view of the memory map where the format has one.
      quantization: the name of the scheme in the file (`Q4_1`, `int4-g64`), or `None`.
      read_quantized: the blocks or codes unchanged; `None` where the tensor is not quantized.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    nbytes: int
    read: Callable[[], np.ndarray]
    quantization: str | None = None
    read_quantized: Callable[[], QuantArray] | None = None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model at rest: its configuration, its tensors by name, its tokenizer if it has one, and where it came from.

    `release` lets go of the memory that reading has filled with the file's pages; they are read again where needed.
    """

    config: ModelConfig
    tensors: Mapping[str, LazyTensor]
    tokenizer: TokenizerData | None
    format: str
    path: Path
    release: Callable[[], object] = lambda: None
