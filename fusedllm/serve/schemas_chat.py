"""/v1/chat/completions: the request, and the answer as OpenAPI describes it."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, PlainValidator, model_validator

from fusedllm.config import SamplingParams
from fusedllm.serve.schemas_common import Generation, Strict, refused
from fusedllm.serve.schemas_completions import UsageBody


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


def _check_content(value: Any) -> str:
    """Parts are joined by line breaks, as other servers of open models do."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise refused("content must be a text or a list of text parts.")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise refused(f"content parts of type {kind[:50]!r} are not supported, only 'text'.")
        if kind is None or set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise refused('a content part must be {"type": "text", "text": "..."}.')
        texts.append(part["text"])
    return "\n".join(texts)


Content = Annotated[
    str,
    PlainValidator(_check_content, json_schema_input_type=str | Annotated[list[TextPart], Field(min_length=1)]),
]


class ChatMessage(Strict):
    """What somebody said; an answer's message may be sent back as it came."""

    unsupported: ClassVar = {
        "annotations": ([],),
        "audio": (),
        "function_call": (),
        "reasoning": (),
        "reasoning_content": (),
        "refusal": (),
        "tool_call_id": (),
        "tool_calls": ([],),
    }

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: Annotated[str | None, Field(max_length=64)] = None

    @property
    def for_template(self) -> dict[str, str | None]:
        """As chat templates know it: none of them has heard of developers, OpenAI's newer word for the system."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self.content, "name": self.name}


class ChatRequest(Generation):
    """A conversation to go on with."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int | None, Field(ge=1, lt=2**31)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1, lt=2**31)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=SamplingParams.MAX_LOGPROBS)] = None

    @model_validator(mode="after")
    def _makes_sense(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise refused("top_logprobs needs logprobs to be true.", "top_logprobs")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise refused("max_tokens and max_completion_tokens differ; give one of them.", "max_completion_tokens")
        return self


class TopLogprob(BaseModel):
    """A token that might have been drawn."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(TopLogprob):
    """A token that was drawn."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of an answer's tokens."""

    content: list[ChatLogprob]
    refusal: None


class ChatAnswerMessage(BaseModel):
    """What the model said."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: ChatAnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatBody(BaseModel):
    """The answers."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: UsageBody
