"""From one checkpoint format to another: one tensor at a time, and the target is whole or not there."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from fusedllm.errors import CheckpointError
from fusedllm.weights.arrow import DTYPES
from fusedllm.weights.checkpoint import Checkpoint, LazyTensor
from fusedllm.weights.files import write_atomically
from fusedllm.weights.open import open_checkpoint

# Format -> suffixes that ask for it.
SUFFIXES: Mapping[str, tuple[str, ...]] = {
    "arrow": (".arrow", ".ipc", ".feather"),
    "gguf": (".gguf",),
    "orbax": (".orbax",),
    "safetensors": (".safetensors", ".hf"),
}
# Of this package, those whose `write` is called where it is not the one of the format's name.
_MODULES: Mapping[str | None, str] = {"gguf": "gguf_write"}
FLOATS = ("float32", "bfloat16", "float16")

T = TypeVar("T")


def convert(
    src: str | Path | Checkpoint,
    dst: str | Path,
    *,
    format: str | None = None,
    dtype: str | None = None,
    force: bool = False,
    progress: bool = False,
) -> Path:
    """Writes the checkpoint at `src` to `dst` as `format`, and returns `dst`.

    Arrow and GGUF are one file; Orbax and safetensors (a HF directory) are directories. `format=None` goes by the
    suffix of `dst`. Quantized tensors keep their blocks in a GGUF, where grouped codes become blocks, and grouped codes
    stay as they are in safetensors, as compressed-tensors; otherwise they are dequantized. `dtype` casts every tensor,
    except that the vectors of a GGUF are float32. `dst` appears when all of it is on the disk; on an error, a full disk
    or Ctrl-C nothing of it is left, and an older `dst` stays as it was.

    Raises:
      CheckpointError: `dst` exists and `force` is off, the format or dtype is unknown, `src` can't be read or `dst`
        can't be written.
      ConfigError, TokenizerError: the format has no way to express the model or its tokenizer.
    """
    target = Path(dst).expanduser()
    write = writer_of(target, format)
    if dtype is not None and dtype not in FLOATS:
        raise CheckpointError(f"{dtype!r} is not a dtype to convert to; known are: {', '.join(FLOATS)}.")
    # Before the source is opened, so that a wrong target costs nothing.
    with write_atomically(target, force=force) as temporary:
        checkpoint = src if isinstance(src, Checkpoint) else open_checkpoint(Path(src))
        if dtype is not None:
            checkpoint = cast(checkpoint, DTYPES[dtype])
        with _shown(checkpoint, f"writing {target.name}", progress) as shown:
            write(shown, temporary)
    return target


def cast(checkpoint: Checkpoint, dtype: np.dtype) -> Checkpoint:
    """`checkpoint` with every tensor read as `dtype`, and none of them quantized any more."""

    def one(tensor: LazyTensor) -> LazyTensor:
        if tensor.dtype == dtype and tensor.quantization is None:
            return tensor
        return dataclasses.replace(
            tensor,
            dtype=dtype,
            nbytes=math.prod(tensor.shape) * dtype.itemsize,
            read=lambda: tensor.read().astype(dtype, copy=False),
            quantization=None,
            read_quantized=None,
        )

    return dataclasses.replace(checkpoint, tensors={name: one(tensor) for name, tensor in checkpoint.tensors.items()})


@contextmanager
def _shown(checkpoint: Checkpoint, title: str, progress: bool) -> Iterator[Checkpoint]:
    left = {tensor.name: tensor.nbytes for tensor in checkpoint.tensors.values()}
    with tqdm(total=sum(left.values()), desc=title, unit="B", unit_scale=True, disable=not progress) as bar:

        def counted(read: Callable[[], T], name: str) -> Callable[[], T]:
            def read_and_count() -> T:
                values = read()
                # Some writers read codes twice or more.
                bar.update(left.pop(name, 0))
                return values

            return read_and_count

        def one(tensor: LazyTensor) -> LazyTensor:
            blocks = tensor.read_quantized
            return dataclasses.replace(
                tensor,
                read=counted(tensor.read, tensor.name),
                read_quantized=None if blocks is None else counted(blocks, tensor.name),
            )

        yield dataclasses.replace(checkpoint, tensors={name: one(t) for name, t in checkpoint.tensors.items()})


def format_of(target: Path) -> str | None:
    """The format that the suffix of `target` asks for, in letters of either case; `None` where it asks for none."""
    return next((name for name, suffixes in SUFFIXES.items() if target.suffix.lower() in suffixes), None)


def writer_of(target: Path, format: str | None) -> Callable[[Checkpoint, Path], None]:
    """What writes `format`, or what the suffix of `target` asks for.

    Raises:
      CheckpointError: nobody does.
    """
    name = format or format_of(target)
    if name not in SUFFIXES:
        asked = f"the format {format!r} is unknown" if format else f"the suffix of {target} names no format"
        raise CheckpointError(f"{asked}; say --format {' or '.join(SUFFIXES)}.")
    write: Callable[[Checkpoint, Path], None] = importlib.import_module(
        f"fusedllm.weights.{_MODULES.get(name) or name}"
    ).write
    return write
