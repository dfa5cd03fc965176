"""Chat templates: messages to the text of a prompt, by the conventions of Hugging Face transformers.

Templates come from workers and messages from anybody, so rendering runs in jinja2's immutable sandbox.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ConfigError


class TemplateRefused(ValueError):
    """The template does not take these messages; the text says why and is meant for the caller."""


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # jinja2's own filter escapes for HTML
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> Any:
    try:
        from jinja2 import TemplateError, nodes
        from jinja2.ext import Extension
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        text = "chat templates need jinja2: pip install 'dynwire[frontend]'"
        raise ConfigError(text, name="jinja2") from error

    class Generation(Extension):
        """``{% generation %}``, which marks the assistant's part for training and means nothing here."""

        tags = {"generation"}  # noqa: RUF012  # jinja2's interface

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.datetime.now().strftime(form)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


class ChatTemplate:
    """One model's template. Immutable; any thread may render."""

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        """``special_tokens``: names (``bos_token``, …) to texts. Raises `ConfigError`: no jinja2, or a wrong source."""
        environment = _environment()
        from jinja2 import TemplateError

        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ConfigError(f"the chat template cannot be read: {error}", name="chat_template") from error
        # jinja2 makes a ChainMap, and a dict of that at every rendering: half of its time
        self._template.globals = dict(self._template.globals)
        self._refused = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
        self._names = dict(special_tokens or {})

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text; ``extra`` are further variables (``enable_thinking``, …).

        Raises `TemplateRefused`, also for what the template did with messages that it was not made for.
        """
        variables = {
            **self._names,
            **(extra or {}),
            "messages": messages,
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text: str = self._template.render(variables)
        except self._refused as error:
            raise TemplateRefused(str(error) or type(error).__name__) from error
        return text
