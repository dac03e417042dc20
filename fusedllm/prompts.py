"""What callers hand over as prompts, brought into one form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from fusedllm.errors import RequestError

# A text, or token ids.
Prompt = str | Sequence[int]

# Of a conversation, with `role` and `content`.
Message = Mapping[str, Any]


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several as a list of them; a list of integers is one.

    Raises:
      RequestError: what is neither.
    """
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, (Sequence, np.ndarray)) or isinstance(prompts, bytes):
        raise RequestError(f"a prompt must be a text, a list of token ids, or a list of those, got {prompts!r}.")
    if len(prompts) and isinstance(prompts[0], (int, np.integer)):
        return [cast("Sequence[int]", prompts)]
    return list(cast("Sequence[Prompt]", prompts))


def as_ids(ids: Sequence[int]) -> list[int]:
    """Token ids as Python's integers.

    Raises:
      RequestError: no list.
    """
    if not isinstance(ids, (Sequence, np.ndarray)) or isinstance(ids, (str, bytes)):
        raise RequestError(f"token ids must be a list of integers, got {ids!r}.")
    # NumPy's integers and arrays are welcome; anything else is refused where its range is checked.
    return [int(token) if isinstance(token, np.integer) else token for token in ids]
