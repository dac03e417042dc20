"""`Manifest`: what a server says it runs, as one canonical JSON text whose SHA-256 is part of every quote."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fusedllm.errors import AttestationError

FORMAT = "fusedllm-manifest-1"

# A manifest has a few hundred bytes; whoever sends a longer one wants to be a nuisance.
MAX_CHARACTERS = 65_536

_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Manifest:
    """What runs, in digests and names.

    Attributes:
      weights: SHA-256 of all tensors, as `measure.weights_sha256` takes it, in hexadecimal.
      config: SHA-256 of the model's configuration.
      tokenizer: SHA-256 of the tokenizer with its chat template; `None` where the checkpoint has none.
      quantization: how many tensors are stored in which scheme or dtype.
      policy: where the parts of the model run.
      version: of this package.
      code: SHA-256 of this package's own files.

    Raises:
      AttestationError: a field of another kind.
    """

    weights: str
    config: str
    tokenizer: str | None
    quantization: Mapping[str, int]
    policy: str
    version: str
    code: str

    def __post_init__(self) -> None:
        for name in ("weights", "config", "code", "tokenizer"):
            value = getattr(self, name)
            optional = name == "tokenizer" and value is None
            _ask(optional or (isinstance(value, str) and bool(_DIGEST.fullmatch(value))), name, "a SHA-256 in hex")
        for name in ("policy", "version"):
            _ask(isinstance(getattr(self, name), str), name, "a text")
        _ask(isinstance(self.quantization, Mapping), "quantization", "an object")
        for scheme, count in self.quantization.items():
            fits = isinstance(scheme, str) and type(count) is int and count > 0
            _ask(fits, "quantization", "numbers of tensors by scheme")

    @property
    def text(self) -> str:
        """The canonical JSON: ASCII, names in order, no blanks. Equal manifests, and only those, have equal texts."""
        values: dict[str, Any] = {**dataclasses.asdict(self), "format": FORMAT}
        return json.dumps(values, sort_keys=True, separators=(",", ":"))

    @property
    def sha256(self) -> bytes:
        """SHA-256 of the text."""
        return hashlib.sha256(self.text.encode("ascii")).digest()

    @classmethod
    def from_text(cls, text: str) -> Manifest:
        """The manifest that has this very text; blanks at the ends, as of a file's last line, are taken off.

        Raises:
          AttestationError: another format, or not written as `text` writes it.
        """
        text = text.strip()
        if len(text) > MAX_CHARACTERS:
            raise AttestationError(f"the manifest has {len(text)} characters, which no manifest has.")
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise AttestationError(f"the manifest is not JSON: {error}.") from error
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise AttestationError(f"the manifest is not of the format {FORMAT}; the server is of another version.")
        if set(values) != {field.name for field in dataclasses.fields(cls)}:
            raise AttestationError(
                f"the manifest has the fields {', '.join(sorted(values))}, which are not those of ours."
            )
        manifest = cls(**values)
        if manifest.text != text:
            raise AttestationError("the manifest is not written canonically; `fusedllm manifest` writes one that is.")
        return manifest


def _ask(holds: bool, name: str, wanted: str) -> None:
    if not holds:
        raise AttestationError(f"{name} of a manifest must be {wanted}.")
