"""Tools: Python functions that workflows call, with arguments checked against their type hints."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, overload

import msgspec
from anyio import to_thread

from covey.errors import InvalidArgument
from covey.types.flow import ToolCall, ToolSpec
from covey.types.program import TEXT_CHARS_MAX

Function = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Tool:
    """A function and how it is declared; calling it calls the function. Made by `covey.tool`."""

    spec: ToolSpec
    function: Function
    kinds: Mapping[str, Any]
    """Parameter → type; a parameter annotated `covey.ToolCall` gets the call itself, with its idempotency key."""
    required: frozenset[str]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    async def invoke(self, call: ToolCall) -> str:
        """Run the function with a call's arguments; plain functions run in a thread.

        Raises:
            InvalidArgument: an argument is missing, unknown or of the wrong type, or the result is too large.
        """
        arguments = self._arguments(call)
        if inspect.iscoroutinefunction(self.function):
            awaited: Awaitable[Any] = self.function(**arguments)
            result = await awaited
        else:
            # A thread cannot be stopped: once cancelled, its result is thrown away.
            result = await to_thread.run_sync(partial(self.function, **arguments), abandon_on_cancel=True)
        text = result if isinstance(result, str) else msgspec.json.encode(result).decode()
        if len(text) > TEXT_CHARS_MAX:
            raise InvalidArgument(f"tool {self.spec.name!r} returned {len(text)} characters, at most {TEXT_CHARS_MAX}")
        return text

    def _arguments(self, call: ToolCall) -> dict[str, Any]:
        name = self.spec.name
        unknown = set(call.arguments) - self.kinds.keys()
        missing = self.required - call.arguments.keys()
        if unknown or missing:
            what = f"no parameter {min(unknown)!r}" if unknown else f"no argument for {min(missing)!r}"
            raise InvalidArgument(f"tool {name!r}: {what}", field=f"arguments.{min(unknown or missing)}")
        arguments = {key: _converted(text, self.kinds[key], name, key) for key, text in call.arguments.items()}
        return arguments | {key: call for key, kind in self.kinds.items() if kind is ToolCall}


@overload
def tool(function: Function, /) -> Tool: ...


@overload
def tool(
    *, name: str = ..., description: str = ..., concurrency: int = ..., idempotent: bool = ...
) -> Callable[[Function], Tool]: ...


def tool(
    function: Function | None = None,
    /,
    *,
    name: str = "",
    description: str = "",
    concurrency: int = 4,
    idempotent: bool = True,
) -> Tool | Callable[[Function], Tool]:
    """Declare a function as a tool; its type hints are its schema, its docstring describes it.

    At most `concurrency` calls run at once in one worker. A tool that is not `idempotent` is never run again when it
    is not known whether it ran; others may be, always with the same `ToolCall.key`. Use it as `@tool` or
    `@tool(name=…)`.

    Raises:
        InvalidArgument: a parameter has no type hint, cannot be named, or has no schema.
    """

    def declare(declared: Function) -> Tool:
        title = name or getattr(declared, "__name__", "")
        kinds, required = _parameters(declared, title)
        schema = _schema({key: kind for key, kind in kinds.items() if kind is not ToolCall}, required, title)
        spec = ToolSpec(
            name=title,
            description=description or inspect.getdoc(declared) or "",
            parameters=msgspec.json.encode(schema).decode(),
            concurrency=concurrency,
            idempotent=idempotent,
        )
        return Tool(spec, declared, kinds, required)

    return declare if function is None else declare(function)


def _parameters(function: Function, title: str) -> tuple[dict[str, Any], frozenset[str]]:
    hints = typing.get_type_hints(function)
    kinds: dict[str, Any] = {}
    required: set[str] = set()
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise InvalidArgument(f"tool {title!r}: {parameter} cannot be passed by name", field=parameter.name)
        if parameter.name not in hints:
            raise InvalidArgument(f"tool {title!r}: {parameter.name!r} needs a type hint", field=parameter.name)
        kinds[parameter.name] = hints[parameter.name]
        if parameter.default is parameter.empty and kinds[parameter.name] is not ToolCall:
            required.add(parameter.name)
    return kinds, frozenset(required)


def _schema(kinds: Mapping[str, Any], required: frozenset[str], title: str) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    definitions: dict[str, Any] = {}
    for key, kind in kinds.items():
        try:
            (properties[key],), found = msgspec.json.schema_components([kind], ref_template="#/$defs/{name}")
        except TypeError as error:
            raise InvalidArgument(f"tool {title!r}: {key!r} is {kind}, which has no JSON schema", field=key) from error
        definitions |= found
    schema: dict[str, Any] = {
        "type": "object",
        "properties": properties,
        "required": sorted(required),
        "additionalProperties": False,
    }
    return schema | ({"$defs": definitions} if definitions else {})


def _converted(text: str, kind: Any, title: str, key: str) -> Any:
    """Text stays text where text is wanted; anything else is JSON."""
    if kind is str:
        return text
    try:
        return msgspec.json.decode(text, type=kind)
    except msgspec.MsgspecError as error:
        try:
            return msgspec.convert(text, kind, strict=False)
        except msgspec.ValidationError:
            raise InvalidArgument(f"tool {title!r}: {key}: {error}", field=f"arguments.{key}") from error
