"""Function calls that must come: the grammar of an answer that consists of them."""

from __future__ import annotations

from covey.errors import InvalidArgument
from covey.types.grammar import Grammar, GrammarKind, check_schema
from covey.types.program import FunctionTool, ToolChoice, Tooling

from .dialect import Dialect, schema_of


def check_tooling(tooling: Tooling) -> None:
    """Raise InvalidArgument (`tools`, `tool_choice`) for what cannot be asked for."""
    if not tooling.tools:
        raise InvalidArgument("names no tool", field="tools")
    names = [tool.name for tool in tooling.tools]
    for i, name in enumerate(names):
        if not name or not all(c.isascii() and (c.isalnum() or c in "_-") for c in name):
            raise InvalidArgument("a name has letters, digits, _ and - only", field=f"tools[{i}].function.name")
    if len(set(names)) < len(names):
        raise InvalidArgument("two tools have the same name", field="tools")
    if tooling.choice is ToolChoice.NAMED and tooling.name not in names:
        raise InvalidArgument(f"no tool is named {tooling.name!r}", field="tool_choice")
    is_forced = tooling.choice in (ToolChoice.REQUIRED, ToolChoice.NAMED)
    for i, tool in enumerate(tooling.tools):
        _check_parameters(tool, f"tools[{i}].function.parameters", is_forced=is_forced)


def forced_grammar(tooling: Tooling, dialect: Dialect) -> str:
    """What an answer must look like, or nothing when the model may answer as it likes.

    Raises InvalidArgument when the schemas are too long.
    """
    if tooling.choice not in (ToolChoice.REQUIRED, ToolChoice.NAMED):
        return ""
    is_one = tooling.choice is ToolChoice.NAMED or not tooling.parallel or not dialect.allows_several
    tools = [t for t in tooling.tools if tooling.choice is ToolChoice.REQUIRED or t.name == tooling.name]
    tag = {
        "type": "structural_tag",
        "format": {
            "type": "tags_with_separator",
            "separator": dialect.separator,
            "at_least_one": True,
            "stop_after_first": is_one,
            "tags": [
                {
                    "type": "tag",
                    "begin": dialect.begin(tool.name),
                    "content": {"type": "json_schema", "json_schema": schema_of(tool)},
                    "end": "}" + dialect.closing,
                }
                for tool in tools
            ],
        },
    }
    return Grammar(kind=GrammarKind.STRUCTURAL_TAG, body=tag).write("tools")


def _check_parameters(tool: FunctionTool, field: str, *, is_forced: bool) -> None:
    try:
        schema = schema_of(tool)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"is not JSON: {error}", field=field) from error
    if not isinstance(schema, dict):
        raise InvalidArgument("a JSON schema is an object", field=field)
    if is_forced:  # only then must it hold word for word
        check_schema(schema, field)
