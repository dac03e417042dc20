"""Fetching from the Hugging Face Hub through `huggingface_hub`, and what stood in the way, in words."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusedllm.errors import SourceError
from fusedllm.weights.download import CACHE_VARIABLE, SourceUnavailableError, cache_directory, cache_errors
from fusedllm.weights.files import is_disk_full

_HUB_FILES = ("*.safetensors", "*.json", "*.jinja")
# The same weights once more, in their author's own layout.
_HUB_SKIPPED = ("original/*", "consolidated*", "onnx/*")


@dataclass(frozen=True, slots=True)
class Hub:
    """A repository of the Hugging Face Hub."""

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"Hub, {self.repository}" + (f" at {self.revision}" if self.revision else "")


def cached_hub(hub: Hub) -> Path | None:
    """The snapshot of `hub` that an earlier `fetch_hub` finished, if every file still has its size."""
    try:
        record = json.loads(_hub_record(hub).read_text())
        path = Path(record["path"])
        whole = all((path / name).stat().st_size == size for name, size in record["sizes"].items())
        return path if whole and record["sizes"] else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def fetch_hub(hub: Hub, progress: bool) -> Path:
    """The snapshot directory of `hub`, downloaded by `huggingface_hub` unless an earlier download is whole.

    The Hub's own cache is used, which other programs share, unless `FUSEDLLM_CACHE` is set.

    Raises:
      SourceUnavailableError: no network, a gated or missing repository.
      SourceError: the cache can't be written.
    """
    if found := cached_hub(hub):
        return found
    record = _hub_record(hub)
    with cache_errors(record.parent):
        record.parent.mkdir(parents=True, exist_ok=True)
        with _hub_errors(hub), _hub_bars(progress):
            from huggingface_hub import snapshot_download

            path = Path(
                snapshot_download(
                    hub.repository,
                    revision=hub.revision,
                    cache_dir=_hub_directory(),
                    allow_patterns=list(_HUB_FILES),
                    ignore_patterns=list(_HUB_SKIPPED),
                )
            )
        sizes = {str(file.relative_to(path)): file.stat().st_size for file in path.rglob("*") if file.is_file()}
        draft = record.with_name(f".{record.name}.{os.getpid()}")
        draft.write_text(json.dumps({"path": str(path), "sizes": sizes}))
        os.replace(draft, record)
    return path


def hub_config(hub: Hub) -> dict[str, Any]:
    """The `config.json` of a repository alone.

    Raises:
      SourceUnavailableError: no network, a gated or missing repository.
    """
    if found := cached_hub(hub):
        path = found / "config.json"
    else:
        with cache_errors(cache_directory()), _hub_errors(hub), _hub_bars(False):
            from huggingface_hub import hf_hub_download

            directory = _hub_directory()
            path = Path(hf_hub_download(hub.repository, "config.json", revision=hub.revision, cache_dir=directory))
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"the config.json of {hub.repository} can't be read: {error}.") from error
    return config


def _hub_directory() -> Path | None:
    return cache_directory() / "hub" if os.environ.get(CACHE_VARIABLE) else None


def _hub_record(hub: Hub) -> Path:
    key = hub.repository.replace("/", "--") + (f"@{hub.revision.replace('/', '--')}" if hub.revision else "")
    return cache_directory() / "hub-complete" / f"{key}.json"


# Exceptions of `huggingface_hub` by name, most telling first: their modules have moved between its versions.
_HUB_REASONS = (
    ("GatedRepoError", "is gated: accept its licence at https://huggingface.co/{repository} and set HF_TOKEN"),
    ("RepositoryNotFoundError", "does not exist, or is private and HF_TOKEN does not open it"),
    ("RevisionNotFoundError", "has no revision {revision}"),
    ("EntryNotFoundError", "has no config.json"),
    ("HFValidationError", "is not a valid repository name"),
)


@contextlib.contextmanager
def _hub_errors(hub: Hub) -> Iterator[None]:
    try:
        yield
    # Below the Hub's own exceptions lie those of whichever HTTP library it uses at the moment.
    except Exception as error:
        if is_disk_full(error) or isinstance(error, PermissionError | NotADirectoryError | FileExistsError):
            raise
        names = {kind.__name__ for kind in type(error).__mro__}
        # Raised for want of a connection, and a kind of EntryNotFoundError nevertheless.
        if "LocalEntryNotFoundError" in names:
            names = set()
        for name, words in _HUB_REASONS:
            if name in names:
                reason = words.format(repository=hub.repository, revision=hub.revision)
                raise SourceUnavailableError(f"{hub.repository} on the Hub {reason}") from error
        raise SourceUnavailableError(f"the Hub can't be reached for {hub.repository} ({_root(error)})") from error


def _root(error: BaseException) -> str:
    """What the lowest layer said, which is the shortest and the most telling."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:160].rstrip(". ") or type(error).__name__


@contextlib.contextmanager
def _hub_bars(progress: bool) -> Iterator[None]:
    # Its names are public and documented, and not re-exported in the way that type checkers ask for.
    utils: Any = importlib.import_module("huggingface_hub.utils")
    if progress or utils.are_progress_bars_disabled():
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()
