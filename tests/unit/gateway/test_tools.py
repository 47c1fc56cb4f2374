"""Functions: told to the model, found in its text however it is cut, forced by a grammar."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey.errors import InvalidArgument
from covey.types.program import CallDelta, FunctionCall, FunctionTool, Message, ToolChoice, Tooling
from services.gateway.tools.dialect import HERMES, LLAMA3, Dialect, dialect_of, native_turns, plain_turns
from services.gateway.tools.forced import check_tooling, forced_grammar
from services.gateway.tools.parser import CallParser

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = FunctionTool(name="weather", description="Look outside", parameters=json.dumps(SCHEMA))
CLOCK = FunctionTool(name="clock")
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern \\"}{"}}\n</tool_call>'


def read(text: str, cuts: list[int], dialect: Dialect = HERMES, *, several: bool = True) -> tuple[str, list[Any]]:
    """Content and calls of a text that comes in pieces."""
    parser = CallParser(dialect, {"weather", "clock"}, lambda: "id", several=several)
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    parsed = [parser.push(text[a:b]) for a, b in itertools.pairwise(places)] + [parser.finish()]
    calls: dict[int, list[str]] = {}
    for delta in (call for part in parsed for call in part.calls):
        if delta.name:
            assert delta.index not in calls
            assert delta.id
            calls[delta.index] = [delta.name, ""]
        calls[delta.index][1] += delta.arguments
    assert parser.calls == len(calls)
    return "".join(part.text for part in parsed), list(calls.values())


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("no call < here", "no call < here", []),
        (CALL, "", [["weather", '{"city": "Bern \\"}{"}']]),
        (f"Let me look. {CALL}", "Let me look. ", [["weather", '{"city": "Bern \\"}{"}']]),
        (f"{CALL}\n{CALL}\n", "", [["weather", '{"city": "Bern \\"}{"}']] * 2),
        ('<tool_call>{"arguments": {}, "name": "clock"}</tool_call>', "", [["clock", "{}"]]),
        ('<tool_call>{"name": "nobody", "arguments": {}}</tool_call>', None, []),
        ("<tool_call>not json</tool_call> so", "<tool_call>not json</tool_call> so", []),
        ('<tool_call>\n{"name": "clock", "arguments": {"a": [1, ', "", [["clock", '{"a": [1, ']]),
        ('<tool_call>{"name": "clo', '<tool_call>{"name": "clo', []),
        ("<tool_c", "<tool_c", []),
    ],
)
@given(cuts=st.lists(st.integers(0, 200), max_size=12))
def test_calls_are_found_however_the_text_is_cut(
    text: str, content: str | None, calls: list[Any], cuts: list[int]
) -> None:
    assert read(text, cuts) == (text if content is None else content, calls)


@given(cuts=st.lists(st.integers(0, 80), max_size=8))
def test_llama_writes_a_call_as_bare_json(cuts: list[int]) -> None:
    text = ' {"name": "weather", "parameters": {"city": "Rom"}}'
    assert read(text, cuts, LLAMA3) == ("", [["weather", '{"city": "Rom"}']])
    assert read("It is {sunny}.", cuts, LLAMA3) == ("It is {sunny}.", [])
    assert read('{"sun": 1}', cuts, LLAMA3) == ('{"sun": 1}', [])


def test_only_one_call_where_several_are_not_wanted() -> None:
    assert len(read(f"{CALL}\n{CALL}", [], several=False)[1]) == 1


@pytest.mark.parametrize("dialect", [HERMES, LLAMA3])
def test_what_a_dialect_writes_it_reads(dialect: Dialect) -> None:
    call = FunctionCall(id="x", name="weather", arguments='{"city": "Ulm"}')
    assert read(dialect.write(call), [], dialect) == ("", [["weather", '{"city": "Ulm"}']])


def test_a_template_without_tools_gets_them_as_text() -> None:
    history = (
        Message(role="developer", content="Be brief."),
        Message(role="user", content="Weather?"),
        Message(
            role="assistant", content="", tool_calls=(FunctionCall(id="a", name="weather", arguments='{"city": "X"}'),)
        ),
        Message(role="tool", content="rain", tool_call_id="a"),
    )
    turns = plain_turns(history, (WEATHER, CLOCK))
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user"]
    assert turns[0]["content"].startswith("Be brief.\n\n")
    assert '"name": "weather", "description": "Look outside"' in turns[0]["content"]
    assert turns[2]["content"] == '<tool_call>\n{"name": "weather", "arguments": {"city": "X"}}\n</tool_call>'
    assert "rain" in turns[3]["content"]
    alone = plain_turns(history[1:2], (CLOCK,))
    assert [turn["role"] for turn in alone] == ["system", "user"]
    native = native_turns(history)
    assert native[2]["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "X"}}
    assert (native[3]["role"], native[3]["name"]) == ("tool", "weather")


def test_the_dialect_is_that_of_the_template() -> None:
    assert dialect_of("{% if tools %}<tool_call>{% endif %}") is HERMES
    assert dialect_of('<|python_tag|> {"name": ..., "parameters": ...} tools') is LLAMA3
    assert dialect_of("tools, in words of its own") is HERMES


def test_a_choice_becomes_a_grammar_only_where_it_forces() -> None:
    tooling = Tooling(tools=(WEATHER, CLOCK))
    assert forced_grammar(tooling, HERMES) == ""
    required = json.loads(forced_grammar(Tooling(tools=(WEATHER, CLOCK), choice=ToolChoice.REQUIRED), HERMES))
    tags = required["structural_tag"]["format"]
    assert [tag["begin"] for tag in tags["tags"]] == [HERMES.begin("weather"), HERMES.begin("clock")]
    assert not tags["stop_after_first"]
    named = json.loads(forced_grammar(Tooling(tools=(WEATHER, CLOCK), choice=ToolChoice.NAMED, name="clock"), LLAMA3))
    (tag,) = named["structural_tag"]["format"]["tags"]
    assert tag["begin"] == '{"name": "clock", "parameters": '
    assert named["structural_tag"]["format"]["stop_after_first"]


@pytest.mark.parametrize(
    ("tooling", "field"),
    [
        (Tooling(tools=()), "tools"),
        (Tooling(tools=(CLOCK, CLOCK)), "tools"),
        (Tooling(tools=(FunctionTool(name="a b"),)), "tools[0].function.name"),
        (Tooling(tools=(CLOCK,), choice=ToolChoice.NAMED, name="x"), "tool_choice"),
        (Tooling(tools=(FunctionTool(name="a", parameters="{"),)), "tools[0].function.parameters"),
        (
            Tooling(tools=(FunctionTool(name="a", parameters='{"not": {}}'),), choice=ToolChoice.REQUIRED),
            "tools[0].function.parameters.not",
        ),
    ],
)
def test_what_cannot_be_asked_for_is_named(tooling: Tooling, field: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        check_tooling(tooling)
    assert refused.value.field == field


def test_a_schema_that_forces_nothing_may_say_anything() -> None:
    check_tooling(Tooling(tools=(FunctionTool(name="a", parameters='{"not": {}}'),)))


def test_deltas_of_a_call_begin_with_its_name() -> None:
    parser = CallParser(HERMES, {"clock"}, lambda: "call_1", several=True)
    first = parser.push('<tool_call>{"name": "clock", "arguments": {')
    assert first.calls == (CallDelta(index=0, id="call_1", name="clock"), CallDelta(index=0, arguments="{"))
    assert parser.push('"a": 1').calls == (CallDelta(index=0, arguments='"a": 1'),)
    assert parser.push("}}\n</tool_call>").calls == (CallDelta(index=0, arguments="}"),)
