"""What lies at a path: the format of a checkpoint is told by its content, never by the name it was asked for with."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fusedllm.errors import CheckpointError
from fusedllm.weights.checkpoint import Checkpoint

_LONGEST_LIST = 6


@dataclass(frozen=True, slots=True)
class Format:
    """One format: its name, which is also the module of this package that reads it, and how it is recognized."""

    name: str
    is_at: Callable[[Path, bytes], bool]


# The first that recognizes what is there reads it. A directory has no first bytes.
FORMATS = (
    Format("safetensors", lambda path, head: (path / "config.json").is_file()),
    Format("orbax", lambda path, head: (path / "_CHECKPOINT_METADATA").is_file() or (path / "params").is_dir()),
    Format("gguf", lambda path, head: head.startswith(b"GGUF")),
    Format("arrow", lambda path, head: head.startswith(b"ARROW1")),
    Format("parquet", lambda path, head: head.startswith(b"PAR1")),
    # The first eight bytes are the length of a JSON object.
    Format("safetensors", lambda path, head: path.suffix == ".safetensors" or head[8:9] == b"{"),
)

# Files that a person would try, and what to say instead of their first bytes.
_FOREIGN = (
    (b"PK\x03\x04", "a zip archive (such as a PyTorch file)"),
    (b"\x80", "a Python pickle (such as a PyTorch file), which can run code when it is opened"),
    (b"ARRO", "a truncated Arrow file"),
    (b"version https://git-lfs", "a Git LFS pointer; run `git lfs pull` for the file itself"),
    (b"<", "an HTML or XML page"),
)


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`, opened lazily: a HF, Orbax or single-checkpoint directory, or a file of any format.

    Raises:
      CheckpointError: nothing is there, it can't be read, or it is no checkpoint; the message says what was found.
      ConfigError, TokenizerError: what the checkpoint says of the model or its tokenizer is not understood.
    """
    path = Path(path).expanduser()
    try:
        if not path.exists():
            raise CheckpointError(f"there is no file or directory {path}.")
        head = b"" if path.is_dir() else _first_bytes(path)
        for one in FORMATS:
            if one.is_at(path, head):
                read: Callable[[Path], Checkpoint] = importlib.import_module(f"fusedllm.weights.{one.name}").read
                return read(path)
        if path.is_dir():
            return open_checkpoint(_only_file(path))
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror or error}.") from error
    raise CheckpointError(
        f"{path} is not a checkpoint: it is {_describe(head)}. Known are GGUF, Arrow, Parquet and .safetensors files, "
        "and HF and Orbax directories."
    )


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(32)


def _only_file(directory: Path) -> Path:
    names = sorted(entry.name for entry in directory.iterdir() if not entry.name.startswith("."))
    files = [name for name in names if Path(name).suffix in (".gguf", ".arrow", ".parquet")]
    if len(files) == 1:
        return directory / files[0]
    listed = ", ".join(names[:_LONGEST_LIST]) + (", ..." if len(names) > _LONGEST_LIST else "")
    found = f"it holds {listed}" if names else "it is empty"
    raise CheckpointError(
        f"{directory} is not a checkpoint directory: {found}. A HF directory has config.json, an Orbax directory "
        "_CHECKPOINT_METADATA; of .gguf, .arrow and .parquet files there may be one."
    )


def _describe(head: bytes) -> str:
    if not head:
        return "an empty file"
    for start, words in _FOREIGN:
        if head.startswith(start):
            return words
    return f"a file that begins with {head[:8]!r}"
