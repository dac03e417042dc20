"""PLACEHOLDER of the grammar author's constraints."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

import numpy as np

from fusedllm.errors import RequestError
from fusedllm.text.tokenizer import Tokenizer

Kind = Literal["json_object", "json_schema", "regex", "grammar", "choice"]


class Constraint:
    """Not there yet."""

    @classmethod
    def compile(
        cls,
        kind: Kind,
        source: Any,
        tokenizer: Tokenizer,
        eos_token_ids: Collection[int],
        vocab_size: int | None = None,
    ) -> Constraint:
        """Refuses."""
        raise RequestError("grammars are not there yet.")

    def mask(self) -> np.ndarray:
        """Nothing."""
        raise NotImplementedError

    def accept(self, token: int) -> None:
        """Nothing."""
