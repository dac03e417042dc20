"""Calibration text: what activations are measured on, as windows of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fusedllm.errors import QuantizationError
from fusedllm.text.data import TokenizerData
from fusedllm.text.tokenizer import Tokenizer

WINDOW = 512
WINDOWS = 32
# `pydoc_data.topics`, English that comes with Python; these few are left to measure perplexity on.
HELD_BACK = ("assignment", "class", "exceptions", "try", "function", "lambda", "numbers")

Calibration = str | Path | Sequence[str] | np.ndarray | None


def calibration_tokens(
    calibration: Calibration, tokenizer: TokenizerData | None, *, window: int = WINDOW, windows: int = WINDOWS
) -> np.ndarray:
    """Token ids int32 `[windows, window]`: at most so many, spread evenly over the text.

    `calibration` is the path of a text file, a list of texts, an array of token ids (cut into windows where it has one
    axis), or `None` for a text that every Python carries: the topics of `pydoc`, but for those of `HELD_BACK`.

    Raises:
      QuantizationError: no text can be read, the checkpoint has no tokenizer, or there is less than one window.
    """
    if isinstance(calibration, np.ndarray):
        if not np.issubdtype(calibration.dtype, np.integer) or calibration.ndim not in (1, 2):
            raise QuantizationError(
                f"calibration tokens must be integers [windows, window], got {calibration.dtype} "
                f"{list(calibration.shape)}."
            )
        most = np.iinfo(np.int32).max
        if calibration.size and (calibration.min() < 0 or calibration.max() > most):
            raise QuantizationError(
                f"calibration tokens must be from 0 to {most}, got {calibration.min()} to {calibration.max()}."
            )
        if calibration.ndim == 2:
            return calibration[:windows].astype(np.int32)
        return _cut(calibration, window, windows)
    if tokenizer is None:
        raise QuantizationError("calibration with text needs a tokenizer, and the checkpoint has none; give token ids.")
    encode = Tokenizer(tokenizer).encode
    ids: list[int] = []
    for text in _texts(calibration):
        ids += encode(text)
    return _cut(np.array(ids, np.int32), window, windows)


def _texts(calibration: Any) -> Sequence[str]:
    if calibration is None:
        from pydoc_data.topics import topics

        return [topics[name] for name in sorted(topics) if name not in HELD_BACK]
    if isinstance(calibration, (str, Path)):
        try:
            return [Path(calibration).expanduser().read_text(encoding="utf-8")]
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
            raise QuantizationError(f"the calibration text {calibration} can't be read: {reason}.") from error
    texts = list(calibration) if isinstance(calibration, Iterable) else [calibration]
    if not all(isinstance(text, str) for text in texts):
        raise QuantizationError("calibration must be a path, a list of texts, or token ids.")
    return texts


def _cut(ids: np.ndarray, window: int, windows: int) -> np.ndarray:
    count = len(ids) // window
    if count < 1:
        raise QuantizationError(
            f"the calibration text has {len(ids)} tokens; at least one window of {window} is needed."
        )
    chosen = np.unique(np.linspace(0, count - 1, min(count, windows)).astype(np.int64))
    return ids[: count * window].reshape(count, window)[chosen].astype(np.int32)
