"""The jinja2 environment in which chat templates run. Apart, so that only who renders one imports jinja2."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fusedllm.errors import TokenizerError

# Larger than anything a prompt needs, small enough to be made in no time.
_MAX_REPETITION = 1 << 20
_MAX_POWER_BITS = 1 << 12


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, which bounds `range`, with `*` and `**` bounded as well."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*" and max(_repetition(left, right), _repetition(right, left)) > _MAX_REPETITION:
            raise SecurityError(f"a repetition makes more than {_MAX_REPETITION} items")
        if operator == "**" and _power_bits(left, right) > _MAX_POWER_BITS:
            raise SecurityError(f"a power has more than {_MAX_POWER_BITS} bits")
        return super().call_binop(context, operator, left, right)


def _repetition(value: Any, times: Any) -> int:
    return len(value) * times if isinstance(times, int) and hasattr(value, "__len__") else 0


def _power_bits(base: Any, exponent: Any) -> int:
    return base.bit_length() * exponent if isinstance(base, int) and isinstance(exponent, int) else 0


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}` marks the assistant's words for training; here it only scopes."""

    tags: ClassVar[set[str]] = {"generation"}  # type: ignore[misc]

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def compile_template(
    source: str, functions: Mapping[str, Callable[..., Any]], tojson: Callable[..., str]
) -> jinja2.Template:
    """Compiles a chat template.

    Args:
      source: the template.
      functions: functions that it may call, by name.
      tojson: the filter of that name.

    Raises:
      TokenizerError: a source that is not a template.
    """
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals.update(functions)
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise TokenizerError(f"line {error.lineno} of the chat template is not jinja2: {error.message}") from error
    except (RecursionError, MemoryError, SyntaxError, jinja2.TemplateError) as error:
        raise TokenizerError(f"the chat template can't be compiled: {error}") from error
