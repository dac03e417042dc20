"""What requests for completions and for chats have in common. Nothing unknown is accepted, and nothing converted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from fusedllm.config import SamplingParams
from fusedllm.serve.responses import dumps

# OpenAI's is 4. Each costs a comparison at every character.
MAX_STOPS = 16

# A priority beyond is no different; and a step of one is worth seconds of waiting.
MAX_PRIORITY = 1_000

MAX_SALT = 256

# More than any object here has; each unknown one is an error of its own, and making 300,000 takes seconds.
MAX_FIELDS = 100


def refused(message: str, param: str | None = None, code: str | None = None) -> PydanticCustomError:
    """A validation error that says `message` as it is.

    `param` is the field that an object was refused for; `None` is what was validated itself. `code` is for programs.
    """
    # The message goes in as a value: as a template its braces would mean something.
    return PydanticCustomError("refused", "{message}", {"message": message, "param": param, "code": code})


class Strict(BaseModel):
    """A JSON object of known fields, with the types that they say: `"5"` and `5.0` are no integers."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, populate_by_name=False)

    # Parameters of OpenAI's that we know and don't support -> values that ask for nothing, `null` always included.
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if len(data) > MAX_FIELDS:
            raise refused(f"an object has {len(data)} parameters, there are no more than {MAX_FIELDS}.")
        kept = dict(data)
        for name in cls.unsupported.keys() & data.keys():
            value = kept.pop(name)
            if value is not None and not any(
                type(value) is type(neutral) and value == neutral for neutral in cls.unsupported[name]
            ):
                message = f"the parameter {name!r} is not supported by this server; take it out."
                raise refused(message, name, "unsupported_parameter")
        return kept


class StreamOptions(Strict):
    """How a stream ends."""

    unsupported: ClassVar = {"include_obfuscation": (False,)}

    include_usage: bool | None = None


def _check_finite(schema: Any) -> Any:
    """Python reads `NaN` and `1e999` where JSON has no such numbers; what follows writes JSON again."""
    try:
        if isinstance(schema, dict):
            dumps(schema)
    except ValueError:
        raise refused("a JSON schema holds a number that JSON can't write: it is infinite or not a number.") from None
    return schema


def _check_size(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MAX_FIELDS:
        raise refused(f"an object of {len(value)} entries was given, at most {MAX_FIELDS} are possible.")
    return value


class JSONSchema(Strict):
    """A JSON schema with its name."""

    name: Annotated[str, Field(max_length=64)]
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema"), AfterValidator(_check_finite)] = None
    strict: bool | None = None


class TextFormat(Strict):
    """Any text."""

    type: Literal["text"]


class JSONObjectFormat(Strict):
    """Any JSON object."""

    type: Literal["json_object"]


class JSONSchemaFormat(Strict):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    json_schema: JSONSchema


class StructuredOutputs(Strict):
    """What the answer must be; exactly one of these."""

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json"), AfterValidator(_check_finite)] = None
    regex: str | None = None
    choice: Annotated[list[str] | None, Field(min_length=1)] = None
    grammar: str | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> StructuredOutputs:
        if sum(value is not None for value in (self.json_, self.regex, self.choice, self.grammar)) != 1:
            raise refused("structured_outputs takes exactly one of json, regex, choice and grammar.")
        return self


GrammarKind = Literal["json_object", "json_schema", "regex", "grammar", "choice"]


def _check_stop(value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if value is None:
        return []
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise refused("stop must be a text or a list of texts, none of them empty.")
    if len(texts) > MAX_STOPS:
        raise refused(f"stop has {len(texts)} texts, at most {MAX_STOPS} are possible.")
    return texts


Text = Annotated[str, Field(min_length=1)]
Stop = Annotated[
    list[str],
    PlainValidator(
        _check_stop, json_schema_input_type=Text | Annotated[list[Text], Field(max_length=MAX_STOPS)] | None
    ),
]
TokenKey = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-SamplingParams.MAX_BIAS, le=SamplingParams.MAX_BIAS)]


class Generation(Strict):
    """Sampling and scheduling. `null` is as good as leaving a parameter out."""

    unsupported: ClassVar = {
        "audio": (),
        "best_of": (1,),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "modalities": (["text"],),
        "parallel_tool_calls": (True, False),
        "prediction": (),
        "reasoning_effort": ("none",),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "suffix": ("",),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "verbosity": ("medium",),
        "web_search_options": (),
    }

    model: str | None = None
    n: Annotated[int | None, Field(ge=1)] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float | None, Field(ge=0, le=100)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=-1, lt=2**31)] = None
    min_p: Annotated[float | None, Field(ge=0, le=1)] = None
    frequency_penalty: Annotated[float | None, Field(ge=-100, le=100)] = None
    presence_penalty: Annotated[float | None, Field(ge=-100, le=100)] = None
    repetition_penalty: Annotated[float | None, Field(gt=0, le=100)] = None
    logit_bias: Annotated[dict[TokenKey, Bias] | None, Field(max_length=SamplingParams.MAX_LOGIT_BIAS)] = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**64)] = None
    stop: Stop = []
    stop_token_ids: Annotated[list[int] | None, Field(max_length=SamplingParams.MAX_STOP_TOKEN_IDS)] = None
    ignore_eos: bool | None = None
    response_format: Annotated[TextFormat | JSONObjectFormat | JSONSchemaFormat, Field(discriminator="type")] | None = (
        None
    )
    structured_outputs: StructuredOutputs | None = None
    priority: Annotated[int | None, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] = None
    cache_salt: Annotated[str | None, Field(max_length=MAX_SALT)] = None
    # Of no consequence here: they are about the account of who asks.
    user: str | None = None
    metadata: Annotated[dict[str, str] | None, Field(max_length=MAX_FIELDS), BeforeValidator(_check_size)] = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, sample: int, max_tokens: int, logprobs: int | None) -> SamplingParams:
        """The parameters of the `sample`-th of `n` answers: each has a seed of its own.

        Raises:
          RequestError: a value outside its range.
        """
        return SamplingParams(
            temperature=1.0 if self.temperature is None else self.temperature,
            # vLLM's -1 and our 0 both keep every token.
            top_k=max(self.top_k or 0, 0),
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=self.min_p or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            seed=None if self.seed is None else (self.seed + sample) % 2**64,
            max_tokens=max_tokens,
            ignore_eos=bool(self.ignore_eos),
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            logprobs=logprobs,
        )

    def grammar(self) -> tuple[GrammarKind, str | list[str]] | None:
        """What the answer must follow, as kind and source; schemas are JSON text."""
        outputs, form = self.structured_outputs, self.response_format
        if isinstance(form, JSONObjectFormat):
            return "json_object", ""
        if isinstance(form, JSONSchemaFormat):
            schema = form.json_schema.schema_
            return ("json_object", "") if schema is None else ("json_schema", dumps(schema))
        if outputs is None:
            return None
        if outputs.json_ is not None:
            return "json_schema", outputs.json_ if isinstance(outputs.json_, str) else dumps(outputs.json_)
        if outputs.regex is not None:
            return "regex", outputs.regex
        if outputs.choice is not None:
            return "choice", outputs.choice
        return "grammar", outputs.grammar or ""

    @model_validator(mode="after")
    def _grammar_makes_sense(self) -> Generation:
        formatted = self.response_format is not None and not isinstance(self.response_format, TextFormat)
        if formatted and self.structured_outputs:
            raise refused("response_format and structured_outputs can't be combined; give one.", "structured_outputs")
        if (formatted or self.structured_outputs) and self.ignore_eos:
            raise refused("ignore_eos can't be combined with a grammar, which ends the answer.", "ignore_eos")
        return self
