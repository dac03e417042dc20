"""Files as they lie on disk: memory maps and JSON, every failure one sentence."""

from __future__ import annotations

import json
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np

from fusedllm.errors import CheckpointError

# Far above any real configuration, index or header, and small enough to parse.
MAX_JSON_BYTES = 100 * 1024 * 1024


def map_file(path: Path, at_least: int, what: str) -> np.ndarray:
    """The bytes of `path` as a read-only uint8 view of a memory map; `what` names the format in messages.

    Raises:
      CheckpointError: the file is missing, can't be read, or is shorter than `at_least` bytes.
    """
    try:
        size = os.stat(path).st_size
        if path.is_dir():
            raise CheckpointError(f"{path} is a directory, a {what} file was expected.")
        if size < at_least:
            raise CheckpointError(
                f"{path} has {size} bytes, a {what} file has at least {at_least}; it is truncated or something else."
            )
        # A plain array over the map: slices of np.memmap itself carry Python attributes and are slower to make.
        return np.asarray(np.memmap(path, np.uint8, mode="r"))
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror or error}.") from error
    except ValueError as error:  # a null byte in the path, or a file that shrank since it was measured
        raise CheckpointError(f"{path} can't be read: {error}.") from error


def release_pages(data: np.ndarray) -> None:
    """Takes the pages of `data`, made by `map_file`, out of this process's memory; the next access brings them back."""
    mapped = getattr(data.base, "_mmap", None)
    if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def array_at(data: np.ndarray, start: int, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """The elements that begin at byte `start` of `data`, as a view; the caller has checked that they lie inside."""
    return np.ndarray(shape, dtype, buffer=data.data, offset=start)


def parse_json_object(text: bytes, what: str) -> dict[str, Any]:
    """The JSON object in `text`.

    Raises:
      CheckpointError: it is not JSON, not an object, or names an attribute twice.
    """

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a name appears twice in the same object")
        return result

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} must be a JSON object, got a {type(value).__name__}.")
    return value


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in the file `path`.

    Raises:
      CheckpointError: the file is missing, unreadable, too large, or not a JSON object.
    """
    try:
        size = os.stat(path).st_size
        text = path.read_bytes() if size <= MAX_JSON_BYTES else None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read: {getattr(error, 'strerror', None) or error}.") from error
    if text is None:
        raise CheckpointError(f"{path} has {size} bytes; no configuration has more than {MAX_JSON_BYTES}.")
    return parse_json_object(text, str(path))
