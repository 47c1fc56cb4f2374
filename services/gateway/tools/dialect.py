"""How models write function calls: the texts around a call's name and arguments, by the family of the template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from covey.types.program import FunctionCall, FunctionTool, Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """One way to write a call: `opening`, `{"name": …, "<key>": …}`, `closing`."""

    opening: str
    closing: str
    key: str
    separator: str
    """Between two calls."""
    allows_several: bool = True

    def begin(self, name: str) -> str:
        """What stands before the arguments."""
        return f'{self.opening}{{"name": {json.dumps(name)}, "{self.key}": '

    def write(self, call: FunctionCall) -> str:
        """A call as the model would write it."""
        return f"{self.begin(call.name)}{call.arguments or '{}'}}}{self.closing}"


HERMES = Dialect(opening="<tool_call>\n", closing="\n</tool_call>", key="arguments", separator="\n")
"""Of Hermes and Qwen; also what a model without a tool template is told to write."""
LLAMA3 = Dialect(opening="", closing="", key="parameters", separator="; ", allows_several=False)

_PREAMBLE = """You may call functions to answer. Their signatures, one JSON object a line, are within <tools></tools>:
<tools>
{tools}
</tools>
For each call write a JSON object with the function's name and arguments within <tool_call></tool_call>:
<tool_call>
{{"name": "<name>", "arguments": <arguments as JSON>}}
</tool_call>"""


def dialect_of(template: str) -> Dialect:
    """The dialect of a chat template's text."""
    is_llama3 = "<|python_tag|>" in template or ('"parameters": ' in template and "<tool_call>" not in template)
    return LLAMA3 if is_llama3 else HERMES


def schema_of(tool: FunctionTool) -> dict[str, Any]:
    """The JSON schema of a tool's arguments; without one, an object without properties."""
    return json.loads(tool.parameters) if tool.parameters else {"type": "object", "properties": {}}


def tool_json(tool: FunctionTool) -> dict[str, Any]:
    """A tool in OpenAI's form, which templates know."""
    function: dict[str, Any] = {"name": tool.name}
    if tool.description:
        function["description"] = tool.description
    return {"type": "function", "function": function | {"parameters": schema_of(tool)}}


def native_turns(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Turns for a template that knows tools: it writes calls and answers its own way."""
    names = _names(messages)
    turns: list[dict[str, Any]] = []
    for message in messages:
        turn: dict[str, Any] = {"role": _role(message.role), "content": message.content}
        if message.tool_calls:
            turn["tool_calls"] = [_call_json(call) for call in message.tool_calls]
        if message.role == "tool":
            turn |= {"tool_call_id": message.tool_call_id, "name": names.get(message.tool_call_id, "")}
        turns.append(turn)
    return turns


def plain_turns(messages: Sequence[Message], tools: Sequence[FunctionTool]) -> list[dict[str, Any]]:
    """Turns for a template without tools: a preamble in the system turn, calls and answers as texts."""
    turns = [_plain(message) for message in messages]
    if tools:
        preamble = _PREAMBLE.format(tools="\n".join(json.dumps(tool_json(tool), ensure_ascii=False) for tool in tools))
        if turns[0]["role"] == "system":
            turns[0] = {"role": "system", "content": f"{turns[0]['content']}\n\n{preamble}"}
        else:
            turns.insert(0, {"role": "system", "content": preamble})
    return turns


def _plain(message: Message) -> dict[str, Any]:
    if message.role == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message.content}\n</tool_response>"}
    calls = [HERMES.write(call) for call in message.tool_calls]
    content = HERMES.separator.join([message.content, *calls] if message.content else calls or [message.content])
    return {"role": _role(message.role), "content": content}


def _call_json(call: FunctionCall) -> dict[str, Any]:
    """Templates print arguments as JSON themselves: a text would come out quoted."""
    try:
        arguments: Any = json.loads(call.arguments or "{}")
    except ValueError:
        arguments = call.arguments
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _names(messages: Sequence[Message]) -> Mapping[str, str]:
    return {call.id: call.name for message in messages for call in message.tool_calls}


def _role(role: str) -> str:
    return "system" if role == "developer" else role
