"""`ChatTemplate`: a conversation rendered to a prompt, as Hugging Face's `apply_chat_template` renders it."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

from fusedllm.errors import RequestError, TokenizerError

if TYPE_CHECKING:
    import jinja2

# The longest templates in use are a few tens of kilobytes; a prompt of this size fits no model's context.
MAX_SOURCE = 1 << 20
MAX_OUTPUT = 1 << 26


class ChatTemplate:
    """A jinja2 template of a checkpoint, run in a sandbox: it is somebody else's program.

    Args:
      source: the template.
      special_tokens: texts that it may name, such as `bos_token`.

    Raises (on first use):
      TokenizerError: a source that is not a template, or is longer than a megabyte.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str | None] | None = None):
        self.source = source
        self.special_tokens = {name: token for name, token in (special_tokens or {}).items() if token is not None}

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt of a conversation; encode it with `add_special=False`, it brings its special tokens along.

        Args:
          messages: mappings with a `role` and a `content`, and whatever else the template knows.
          add_generation_prompt: ends the prompt where the assistant's answer begins.
          **variables: further variables of the template, such as `tools`.

        Raises:
          RequestError: messages of another shape, or that the template refuses.
          TokenizerError: see the class.
        """
        _check_messages(messages)
        # Templates test for a missing key and would print a `None`: what is `None` is left out, as upstream does.
        messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
        values = {"tools": None, "documents": None, **self.special_tokens, **variables}
        values |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
        parts: list[str] = []
        size = 0
        try:
            for part in self._template.generate(values):
                parts.append(part)
                size += len(part)
                if size > MAX_OUTPUT:
                    raise RequestError(f"the chat template writes more than {MAX_OUTPUT} characters")
        except (RequestError, TokenizerError):
            raise
        except Exception as error:  # A template is a program; whatever it stumbles over reaches us as it is.
            raise RequestError(f"the chat template fails on these messages: {error or type(error).__name__}") from error
        return "".join(parts)

    @cached_property
    def _template(self) -> jinja2.Template:
        from fusedllm.text.sandbox import compile_template

        if len(self.source) > MAX_SOURCE:
            raise TokenizerError(f"the chat template is longer than {MAX_SOURCE} characters")
        return compile_template(self.source, {"raise_exception": _raise_exception, "strftime_now": _now}, _to_json)


def _check_messages(messages: object) -> None:
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise RequestError("messages must be a list of at least one message")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise RequestError(f"message {number} must be a mapping with a 'role' and a 'content'")
        content = message["content"]
        if content is not None and not isinstance(content, str | list | tuple):
            raise RequestError(f"the content of message {number} is a {type(content).__name__} and not a text")


def _raise_exception(message: str) -> NoReturn:
    raise RequestError(f"the chat template refuses these messages: {message}")


def _now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja2's own filter escapes characters of HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
