"""/v1/completions: the request, and the answer as OpenAPI describes it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PlainValidator, model_validator

from fusedllm.config import SamplingParams
from fusedllm.serve.schemas_common import Generation, refused

# OpenAI's default for this endpoint.
DEFAULT_MAX_TOKENS = 16


def _is_ids(value: Any) -> bool:
    # A type and not an instance: `true` is no token.
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


# To look at more takes time in which nobody else is served; a queue has no place for them anyway.
MAX_PROMPTS = 4096


def _check_prompt(value: Any) -> list[str | list[int]]:
    if isinstance(value, str):
        return [value]
    if _is_ids(value):
        return [value]
    if isinstance(value, list) and value:
        if len(value) > MAX_PROMPTS:
            raise refused(f"prompt has {len(value)} texts, or lists of token ids; at most {MAX_PROMPTS} go together.")
        if all(isinstance(text, str) for text in value):
            return value
        if all(_is_ids(ids) for ids in value):
            return value
    raise refused(
        "prompt must be a text, a list of texts, a list of token ids, or a list of lists of token ids; none empty."
    )


TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Texts = Annotated[list[str], Field(min_length=1)]
Prompts = Annotated[
    list[str | list[int]],
    PlainValidator(
        _check_prompt,
        json_schema_input_type=str | Texts | TokenIds | Annotated[list[TokenIds], Field(min_length=1)],
    ),
]


class CompletionRequest(Generation):
    """A prompt to go on with, or several."""

    prompt: Prompts
    max_tokens: Annotated[int | None, Field(ge=0, lt=2**31)] = None
    echo: bool | None = None
    logprobs: Annotated[int | None, Field(ge=0, le=SamplingParams.MAX_LOGPROBS)] = None

    @model_validator(mode="before")
    @classmethod
    def _best_of_all(cls, data: Any) -> Any:
        # The best n of n are all of them.
        if isinstance(data, dict) and type(data.get("best_of")) is int and data["best_of"] == data.get("n"):
            return {name: value for name, value in data.items() if name != "best_of"}
        return data

    @model_validator(mode="after")
    def _makes_something(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise refused("max_tokens must be at least 1, or echo be true.", "max_tokens")
        return self


class PromptTokensDetails(BaseModel):
    """Of the prompt's tokens."""

    cached_tokens: int


class UsageBody(BaseModel):
    """Tokens in and out."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class LegacyLogprobs(BaseModel):
    """Log-probabilities as /v1/completions gives them; those of a prompt's first token are `null`."""

    text_offset: list[int]
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None


class CompletionChoice(BaseModel):
    """One answer."""

    index: int
    text: str
    logprobs: LegacyLogprobs | None
    finish_reason: Literal["stop", "length"]


class CompletionBody(BaseModel):
    """The answers."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: UsageBody


class ErrorDetails(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every answer that is an error."""

    error: ErrorDetails
