"""The bytes behind each token id: what makes decoding exact, and streaming cost the same at every length.

The `tokenizers` library decodes a whole sequence at once. All decoders of the LLaMA family are, however, a
concatenation of bytes per token, read as UTF-8, and this module says which bytes.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from fusedllm.errors import TokenizerError
from fusedllm.text.special import SPACE_MARK

if TYPE_CHECKING:
    import tokenizers

_DECODERS = frozenset({"ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace", "Strip"})


def _byte_level_alphabet() -> dict[str, int]:
    """The characters that stand for the 256 bytes in GPT-2's byte-level BPE: itself where printable, else U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(others)}


BYTE_LEVEL_ALPHABET = _byte_level_alphabet()


class Pieces:
    """Token id to bytes, for one tokenizer of the `tokenizers` library.

    Attributes:
      strip_space: whether a decoded text loses one leading space, which encoding put there.

    Raises:
      TokenizerError: a decoder that is not a concatenation of bytes (the message names it).
    """

    def __init__(self, library: tokenizers.Tokenizer):
        decoders = _flat_decoders(library)
        kinds = {decoder["type"] for decoder in decoders}
        if not kinds or kinds - _DECODERS:
            found = ", ".join(sorted(kinds - _DECODERS)) or "none"
            raise TokenizerError(f"the tokenizer has the decoder {found}; known are {', '.join(sorted(_DECODERS))}")
        self._library = library
        self._byte_level = "ByteLevel" in kinds
        self._byte_fallback = "ByteFallback" in kinds
        self._replacements = [
            _replacement(decoder) for decoder in decoders if decoder["type"] in ("Replace", "Metaspace")
        ]
        self.strip_space = any(_strips_space(decoder) for decoder in decoders)
        added = library.get_added_tokens_decoder()
        self._added = {token_id: token.content.encode() for token_id, token in added.items()}
        self._cache: dict[int, bytes] = {}

    def __getitem__(self, token_id: int) -> bytes:
        """The bytes of a token; none at all for an id beyond the vocabulary, which a padded embedding can produce."""
        found = self._cache.get(token_id)
        if found is None:
            found = self._cache[token_id] = self._make(token_id)
        return found

    def _make(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id]
        text = self._library.id_to_token(token_id) if 0 <= token_id < 1 << 32 else None
        if text is None:
            return b""
        if self._byte_level:
            if all(character in BYTE_LEVEL_ALPHABET for character in text):
                return bytes(BYTE_LEVEL_ALPHABET[character] for character in text)
            return text.encode()
        if self._byte_fallback and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            try:
                return bytes([int(text[3:5], 16)])
            except ValueError:
                return text.encode()
        for old, new in self._replacements:
            text = text.replace(old, new)
        return text.encode()


def _flat_decoders(library: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    if library.decoder is None:
        return []
    state: dict[str, Any] = json.loads(library.decoder.__getstate__())
    return list(state["decoders"]) if state["type"] == "Sequence" else [state]


def _replacement(decoder: dict[str, Any]) -> tuple[str, str]:
    if decoder["type"] == "Metaspace":
        return decoder.get("replacement", SPACE_MARK), " "
    pattern = decoder["pattern"].get("String")
    if pattern is None:
        raise TokenizerError("the tokenizer's decoder replaces by a regular expression, which is not supported")
    return pattern, decoder["content"]


def _strips_space(decoder: dict[str, Any]) -> bool:
    if decoder["type"] == "Metaspace":
        return bool(decoder.get("prepend_scheme", "always") != "never")
    if decoder["type"] != "Strip":
        return False
    if (decoder["content"], decoder["start"], decoder["stop"]) != (" ", 1, 0):
        raise TokenizerError("the tokenizer's decoder strips something other than one leading space")
    return True
