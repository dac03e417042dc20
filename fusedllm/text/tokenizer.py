"""`Tokenizer`: text to token ids and back. The `tokenizers` library does the work."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING

from fusedllm.errors import RequestError, TokenizerError
from fusedllm.text.chat import ChatTemplate
from fusedllm.text.data import TokenizerData
from fusedllm.text.hf_directory import from_hf_directory, write_hf_directory
from fusedllm.text.pieces import Pieces
from fusedllm.text.special import END_OF_GENERATION_TEXTS

if TYPE_CHECKING:
    import tokenizers

__all__ = ["Tokenizer", "from_hf_directory", "write_hf_directory"]


class Tokenizer:
    """A tokenizer, built on first use from what a checkpoint carries. Safe to share between threads.

    Args:
      data: the tokenizer as a checkpoint format read it.

    Every method raises `TokenizerError` if the data turns out to be unusable.
    """

    def __init__(self, data: TokenizerData):
        self.data = data

    def prepare(self) -> None:
        """Builds now what the first use would build: the vocabulary, and the environment of chat templates."""
        _ = self._library
        if self.data.chat_template is not None:
            import fusedllm.text.sandbox  # noqa: F401

    def encode(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
          text: any text; a prompt that a chat template rendered carries its special tokens as text.
          add_special: adds the tokens that belong around a plain prompt. The beginning-of-sequence token is there
            exactly once if the model wants it, also where the text brings it along.
          parse_special: reads special tokens in the text as tokens. Without it they are ordinary characters, which
            is what text from a stranger should be.

        Raises:
          RequestError: a text that UTF-8 can't hold (half of a surrogate pair).
        """
        library = self._library if parse_special else self._library_without_special
        try:
            # Of the library's ways this one lets other threads run meanwhile; a long text takes it seconds.
            ids: list[int] = library.encode_batch_fast([text], add_special_tokens=add_special)[0].ids
        except (TypeError, UnicodeEncodeError) as error:
            if not isinstance(text, str):
                raise RequestError(f"a prompt must be a text, and is a {type(text).__name__}") from error
            raise RequestError("the prompt can't be written in UTF-8: it holds half of a surrogate pair") from error
        if not add_special:
            return ids
        bos = self.bos_token_id
        if self.data.add_bos and bos is not None:
            start = 0
            while start < len(ids) and start < 2 and ids[start] == bos:
                start += 1
            return [bos, *ids[start:]]
        return ids[1:] if self._json_adds_bos else ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD, as the Unicode standard recommends.

        Ids beyond the vocabulary, which a model with a padded embedding can produce, have no text.
        """
        skipped = self.special_ids if skip_special_tokens else frozenset()
        text = b"".join(self._pieces[token_id] for token_id in ids if token_id not in skipped).decode(
            "utf-8", "replace"
        )
        return text[1:] if self.strips_leading_space and text.startswith(" ") else text

    def token_text(self, token_id: int) -> str:
        """The token as the vocabulary writes it, such as `Ġthe`.

        Raises:
          TokenizerError: an id beyond the vocabulary.
        """
        text: str | None = self._library.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
        if text is None:
            raise TokenizerError(f"there is no token {token_id} in a vocabulary of {self.vocab_size}")
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text; they need not be whole characters. Empty beyond the vocabulary."""
        return self._pieces[token_id]

    def id_of(self, token: str) -> int | None:
        """The id of a token written as in the vocabulary, or `None`."""
        found: int | None = self._library.token_to_id(token)
        return found

    def chat_template(self) -> ChatTemplate:
        """The checkpoint's chat template, with the texts of its special tokens.

        Raises:
          TokenizerError: a checkpoint without one.
        """
        if self.data.chat_template is None:
            raise TokenizerError("this checkpoint has no chat template; give a prompt instead of messages")
        named = {"bos_token": self.data.bos_token, "eos_token": self.data.eos_token, **self.data.special_tokens}
        return ChatTemplate(self.data.chat_template, named)

    @cached_property
    def vocab_size(self) -> int:
        """Number of tokens, the added ones included; a model's embedding may have more rows."""
        return int(self._library.get_vocab_size(with_added_tokens=True))

    @cached_property
    def bos_token_id(self) -> int | None:
        """Id of the beginning-of-sequence token."""
        return self._id_of_named("bos_token", self.data.bos_token)

    @cached_property
    def eos_token_id(self) -> int | None:
        """Id of the end-of-sequence token."""
        return self._id_of_named("eos_token", self.data.eos_token)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the tokens that carry structure and no text: what `decode` skips."""
        added = self._library.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Ids at which a generation ends: end of sequence, of turn and of message, and special tokens known as such."""
        named = (
            self.data.eos_token,
            self.data.special_tokens.get("eot_token"),
            self.data.special_tokens.get("eom_token"),
        )
        ids = {self.id_of(token) for token in named if token is not None}
        ids |= {token_id for text in END_OF_GENERATION_TEXTS if (token_id := self.id_of(text)) in self.special_ids}
        return frozenset(token_id for token_id in ids if token_id is not None)

    @property
    def strips_leading_space(self) -> bool:
        """Whether `decode` drops one leading space, because `encode` puts one in front (SentencePiece)."""
        return self._pieces.strip_space

    @cached_property
    def _library(self) -> tokenizers.Tokenizer:
        # Imported late: a command that only prints its help should not load the library.
        import tokenizers

        try:
            library = tokenizers.Tokenizer.from_str(self.data.tokenizer_json)
        except Exception as error:  # The library raises plain `Exception` for whatever its parser found.
            raise TokenizerError(f"the tokenizer can't be built: {error}") from error
        library.no_truncation()
        library.no_padding()
        return library

    @cached_property
    def _library_without_special(self) -> tokenizers.Tokenizer:
        # A second instance, because this switch is a state of the library's object that all threads would see.
        import tokenizers

        library = tokenizers.Tokenizer.from_str(self._library.to_str())
        library.encode_special_tokens = True
        return library

    @cached_property
    def _pieces(self) -> Pieces:
        return Pieces(self._library)

    @cached_property
    def _json_adds_bos(self) -> bool:
        bos = self.bos_token_id
        return bos is not None and self._library.encode("").ids[:1] == [bos]

    def _id_of_named(self, name: str, token: str | None) -> int | None:
        if token is None:
            return None
        found = self.id_of(token)
        if found is None:
            raise TokenizerError(f"the {name} is {token!r}, which is not in the vocabulary")
        return found
