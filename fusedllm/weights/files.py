"""Files that are either whole or not there: write beside, flush to the disk, rename; and what went wrong, in words."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from fusedllm.errors import CheckpointError, FusedLLMError

_FULL = (errno.ENOSPC, errno.EDQUOT)
# Libraries that write in C++ or Rust report a full disk in their own exceptions, with the system's words inside.
_FULL_TEXT = ("No space left on device", "Disk quota exceeded")


# What a directory that is a checkpoint has: of Hugging Face, of Orbax.
_MARKS = ("config.json", "_CHECKPOINT_METADATA", "params")


@contextlib.contextmanager
def write_atomically(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Gives a path beside `path` to write a file or a directory to, and renames it to `path` when the block ends.

    Whatever was written is flushed to the disk first. Any exception in the block, Ctrl-C included, removes it again
    and leaves an older `path` as it was. With `force` an older file is replaced in one step; an older directory is
    moved aside first, which no system call of POSIX does in one step, and moved back should the rename fail.

    Raises:
      CheckpointError: `path` exists and `force` is off, or its directory can't be written, or the disk is full.
    """
    path = Path(os.path.abspath(path))
    refuse_existing(path, force)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        with _named(path, temporary), disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            flush_to_disk(temporary)
            refuse_existing(path, force)
            replace(temporary, path)
    finally:
        remove(temporary)


@contextlib.contextmanager
def _named(path: Path, temporary: Path) -> Iterator[None]:
    """Errors about `temporary` speak of `path`, which is the name that the user knows."""
    try:
        yield
    except FusedLLMError as error:
        if error.__cause__ is not None and is_disk_full(error.__cause__):
            raise type(error)(describe_os_error(error.__cause__, path)) from error
        if str(temporary) not in str(error):
            raise
        raise type(error)(str(error).replace(str(temporary), str(path))) from error


@contextlib.contextmanager
def disk_errors(path: Path, error_type: type[FusedLLMError] = CheckpointError) -> Iterator[None]:
    """Turns the system's refusals to write below `path` into `error_type`, one sentence each; others pass."""
    try:
        yield
    except FusedLLMError:
        raise
    except Exception as error:
        if isinstance(error, OSError) or is_disk_full(error):
            raise error_type(describe_os_error(error, path)) from error
        raise


def is_disk_full(error: BaseException) -> bool:
    """Whether `error`, from the system or from a library that quotes it, says that no space is left."""
    return getattr(error, "errno", None) in _FULL or any(text in str(error) for text in _FULL_TEXT)


def describe_os_error(error: BaseException, path: Path) -> str:
    """One sentence about an attempt to write `path` that ended in `error`."""
    if is_disk_full(error):
        free = _free_bytes(path)
        left = "" if free is None else f" ({free / 1e6:,.0f} MB free)"
        return f"{path} can't be written because its disk is full{left}: free some space or choose another place."
    reason = getattr(error, "strerror", None) or str(error)
    where = getattr(error, "filename", None)
    # A temporary name beside `path` would only puzzle the reader.
    named = f" ({where})" if where and not Path(str(where)).name.startswith(".") and str(where) != str(path) else ""
    return f"{path} can't be written: {str(reason).rstrip('.')}{named}."


def replace(source: Path, target: Path) -> None:
    """Renames `source` to `target`, replacing a file or a directory there, and flushes the directory entry."""
    if target.is_dir() and not target.is_symlink():
        aside = target.with_name(f".{target.name}.old-{uuid.uuid4().hex[:8]}")
        os.rename(target, aside)
        try:
            os.rename(source, target)
        except BaseException:
            os.rename(aside, target)
            raise
        remove(aside)
    elif source.is_dir() and target.exists():
        # rename(2) refuses to put a directory where a file is.
        target.unlink()
        os.rename(source, target)
    else:
        os.replace(source, target)
    _fsync(target.parent)


def flush_to_disk(path: Path) -> None:
    """fsync of a file, or of every file and directory below `path`.

    Raises:
      OSError: the system reports a write that did not reach the disk.
    """
    if path.is_dir():
        for directory, _, names in os.walk(path):
            for name in names:
                _fsync(Path(directory, name))
            _fsync(Path(directory))
    else:
        _fsync(path)


def remove(path: Path) -> None:
    """Deletes a file or a directory tree; nothing happens where there is none, or where it can't be deleted."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def refuse_existing(path: Path, force: bool) -> None:
    """Refuses a target that is there already; with `force` only one that is no checkpoint or no plain file.

    Raises:
      CheckpointError: it is.
    """
    if not os.path.lexists(path):
        return
    if not force:
        raise CheckpointError(f"{path} exists already: choose another name, or pass --force to replace it.")
    # --force is meant for a checkpoint, not for whatever else a mistyped name may hit.
    if path.is_dir() and not path.is_symlink():
        if any(path.iterdir()) and not any((path / mark).exists() for mark in _MARKS):
            raise CheckpointError(f"{path} is a directory that holds no checkpoint, so --force does not replace it.")
    elif path.exists() and not path.is_file():
        raise CheckpointError(f"{path} is neither a file nor a directory, so --force does not replace it.")


def _fsync(path: Path) -> None:
    # Windows can neither open a directory nor flush a file that was opened for reading.
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _free_bytes(path: Path) -> int | None:
    for parent in (path, *path.parents):
        try:
            return shutil.disk_usage(parent).free
        except OSError:
            continue
    return None
