"""Finished layers on the disk: a calibration that was stopped goes on where it was."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fusedllm.errors import QuantizationError
from fusedllm.weights.files import disk_errors

_SETTINGS = "settings.json"


class Finished:
    """Layers in a directory: after each, what became of its tensors and the hidden states that leave it.

    Each file appears whole, under its own name, after those that it needs; so a calibration may be killed at any time.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any]) -> None:
        self.directory = directory
        with disk_errors(directory, QuantizationError):
            directory.mkdir(parents=True, exist_ok=True)
        found = directory / _SETTINGS
        text = json.dumps(settings, sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()
        if found.exists():
            with self._whole(found):
                known = json.loads(found.read_text(encoding="utf-8"))["digest"]
            if known != digest:
                raise QuantizationError(
                    f"{directory} holds layers of a calibration of other weights or with other settings: remove it, or "
                    "choose another."
                )
        else:
            self._write(found, json.dumps({"digest": digest, "settings": text}).encode())

    def count(self) -> int:
        """Layers that need not be done again."""
        count = 0
        while self._layer(count).exists():
            count += 1
        while count and not self._hidden(count - 1).exists():
            count -= 1
        return count

    def save(self, index: int, hidden: np.ndarray, arrays: Mapping[str, np.ndarray]) -> None:
        """Keeps a layer; the hidden states of the one before are not needed any more."""
        self._write(self._hidden(index), hidden)
        temporary = self.directory / f".layer-{os.getpid()}.npz"
        with disk_errors(self._layer(index), QuantizationError):
            np.savez(temporary, **arrays)  # type: ignore[arg-type]
            os.replace(temporary, self._layer(index))
        self._hidden(index - 1).unlink(missing_ok=True)

    def arrays(self, index: int) -> dict[str, np.ndarray]:
        """What `save` was given."""
        # Of a damaged file NumPy leaves open what it has opened itself.
        with self._whole(self._layer(index)), self._layer(index).open("rb") as file, np.load(file) as stored:
            return dict(stored)

    def hidden(self, index: int) -> np.ndarray:
        """The hidden states that leave a layer."""
        with self._whole(self._hidden(index)):
            found: np.ndarray = np.load(self._hidden(index))
        return found

    def _layer(self, index: int) -> Path:
        return self.directory / f"layer-{index:04}.npz"

    def _hidden(self, index: int) -> Path:
        return self.directory / f"hidden-{index:04}.npy"

    def _write(self, path: Path, content: bytes | np.ndarray) -> None:
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        with disk_errors(path, QuantizationError):
            with temporary.open("wb") as file:
                if isinstance(content, bytes):
                    file.write(content)
                else:
                    np.save(file, content)
            os.replace(temporary, path)

    @contextlib.contextmanager
    def _whole(self, path: Path) -> Iterator[None]:
        """What goes wrong while `path` is read, as one sentence."""
        try:
            yield
        except (ValueError, KeyError, TypeError, EOFError, OSError, zipfile.BadZipFile) as error:
            raise QuantizationError(
                f"{path} is damaged: remove {self.directory}, and all layers are done again."
            ) from error
