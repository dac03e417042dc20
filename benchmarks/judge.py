"""`Judge`: how far a model's next-token distributions are from float32's, on the windows of text that are stored."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from cpu_quality import STORED, log_softmax

import fusedllm
from fusedllm.weights.checkpoint import Checkpoint


class Judge:
    """The float32 model's distributions on the windows, and what others differ from them by.

    Args:
      checkpoint: of the model.
      windows: how many of those that are stored.
      directory: where the distributions are kept.
      options: of `fusedllm.load`.
    """

    def __init__(self, checkpoint: Checkpoint, windows: int, directory: Path, **options: Any) -> None:
        stored = json.loads(STORED.read_text(encoding="utf-8"))["perplexity"]
        size = stored["window"]
        self.windows = [stored["ids"][start : start + size] for start in range(0, windows * size, size)]
        self._directory = directory
        llm = fusedllm.load(checkpoint, dtype="float32", **options)
        for index, window in enumerate(self.windows):
            np.save(self._path(index), log_softmax(llm.logits(window)[:-1]).astype(np.float32))

    def judge(self, logits: Callable[[list[int]], np.ndarray]) -> dict[str, float]:
        """Of what `logits` returns for each window."""
        return self._compare(lambda index: log_softmax(logits(self.windows[index])[:-1]))

    def reference(self) -> dict[str, float]:
        """Of float32 itself."""
        return self._compare(lambda index: np.load(self._path(index)).astype(np.float64))

    def _compare(self, of: Callable[[int], np.ndarray]) -> dict[str, float]:
        likelihoods, divergences, agreements = [], [], []
        for index, window in enumerate(self.windows):
            reference, found = np.load(self._path(index)).astype(np.float64), of(index)
            likelihoods.append(found[np.arange(len(window) - 1), window[1:]])
            divergences.append((np.exp(reference) * (reference - found)).sum(-1))
            agreements.append(reference.argmax(-1) == found.argmax(-1))
        return {
            "perplexity": float(np.exp(-np.concatenate(likelihoods).mean())),
            "kl_divergence": float(np.concatenate(divergences).mean()),
            "kl_divergence_99": float(np.quantile(np.concatenate(divergences), 0.99)),
            "same_top_token": float(np.concatenate(agreements).mean()),
        }

    def _path(self, index: int) -> Path:
        return self._directory / f"{index}.npy"
