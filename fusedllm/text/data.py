"""`TokenizerData`: what every checkpoint format carries of a tokenizer, in one JSON-ready shape."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fusedllm.errors import TokenizerError


@dataclass(frozen=True, slots=True)
class TokenizerData:
    """A tokenizer in the form of the `tokenizers` library, with what is written beside it.

    Attributes:
      tokenizer_json: the text of a `tokenizer.json`.
      chat_template: a jinja2 template, or `None`.
      bos_token: the text of the beginning-of-sequence token, or `None`.
      eos_token: the text of the end-of-sequence token, or `None`.
      add_bos: whether a plain prompt is encoded with the beginning-of-sequence token in front.
      special_tokens: further named tokens that a chat template may use, such as `pad_token`.
    """

    tokenizer_json: str
    chat_template: str | None = None
    bos_token: str | None = None
    eos_token: str | None = None
    add_bos: bool = False
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """One JSON text; `from_json` is its inverse."""
        return json.dumps({**dataclasses.asdict(self), "special_tokens": dict(self.special_tokens)}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> TokenizerData:
        """What `to_json` wrote.

        Raises:
          TokenizerError: text that is not JSON, or misses a field.
        """
        try:
            values: dict[str, Any] = json.loads(text)
            return cls(**values)
        except (ValueError, TypeError) as error:
            raise TokenizerError(f"the stored tokenizer can't be read: {error}") from error
