"""Finished layers on the disk: a calibration that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fusedllm.errors import QuantizationError

_SETTINGS = "settings.json"


class Finished:
    """Layers in a directory: after each, what became of its tensors and the hidden states that leave it.

    Each file appears whole, under its own name, after those that it needs; so a calibration may be killed at any time.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any]) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        found = directory / _SETTINGS
        text = json.dumps(settings, sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()
        if found.exists():
            if json.loads(found.read_text(encoding="utf-8")).get("digest") != digest:
                raise QuantizationError(
                    f"{directory} holds layers of a calibration with other settings: remove it, or choose another."
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
        np.savez(temporary, **arrays)  # type: ignore[arg-type]
        os.replace(temporary, self._layer(index))
        self._hidden(index - 1).unlink(missing_ok=True)

    def arrays(self, index: int) -> dict[str, np.ndarray]:
        """What `save` was given."""
        with np.load(self._layer(index)) as stored:
            return dict(stored)

    def hidden(self, index: int) -> np.ndarray:
        """The hidden states that leave a layer."""
        found: np.ndarray = np.load(self._hidden(index))
        return found

    def _layer(self, index: int) -> Path:
        return self.directory / f"layer-{index:04}.npz"

    def _hidden(self, index: int) -> Path:
        return self.directory / f"hidden-{index:04}.npy"

    def _write(self, path: Path, content: bytes | np.ndarray) -> None:
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        with temporary.open("wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                np.save(file, content)
        os.replace(temporary, path)
