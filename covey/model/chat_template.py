"""Renders a conversation with the model's own template, in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from covey.errors import InvalidArgument


class ChatTemplate:
    """One compiled template; it is data from a model file, so it runs sandboxed and cannot change what it is given."""

    def __init__(self, source: str, *, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _refuse
        self._special = dict(special_tokens)
        self.source = source
        self.supports_tools = "tools" in source
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise InvalidArgument(f"the model's chat template is broken: {error}", field="model") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt text. Raises InvalidArgument naming `messages` or `tools` when the template refuses them."""
        if tools and not self.supports_tools:
            raise InvalidArgument("this model's chat template has no place for tools", field="tools")
        try:
            return self._template.render(
                messages=messages,
                tools=list(tools) if tools else None,
                add_generation_prompt=add_generation_prompt,
                **self._special,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise InvalidArgument(f"the chat template refuses these messages: {error}", field="messages") from error


def _tojson(value: Any, indent: int | None = None) -> str:
    # Jinja's own filter escapes <, > and & for HTML, which would change what the model was trained on.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
