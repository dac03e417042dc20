"""/tokenize, /detokenize and what is said of models: requests, and answers as OpenAPI describes them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field, model_validator

from fusedllm.serve.schemas_chat import ChatMessage
from fusedllm.serve.schemas_common import Strict, refused


class TokenizeRequest(Strict):
    """A text, or a conversation to be rendered by the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage] | None, Field(min_length=1)] = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise refused("give either prompt or messages.", "prompt")
        if self.messages is not None and self.add_special_tokens:
            raise refused("a chat template brings its special tokens along.", "add_special_tokens")
        if self.messages is None and self.add_generation_prompt is not None:
            raise refused("add_generation_prompt is for messages.", "add_generation_prompt")
        return self


class TokenizeBody(BaseModel):
    """The tokens."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(Strict):
    """Token ids to be read."""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]]


class DetokenizeBody(BaseModel):
    """Their text."""

    prompt: str


class ModelBody(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelsBody(BaseModel):
    """All models that are served."""

    object: Literal["list"]
    data: list[ModelBody]


class TokenizerInfoBody(BaseModel):
    """What a client needs to know to prepare prompts itself."""

    vocab_size: int
    model_max_length: int
    add_bos_token: bool
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None


class VersionBody(BaseModel):
    """The server's version."""

    version: str
