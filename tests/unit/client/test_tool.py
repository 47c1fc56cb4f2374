"""Tools: schemas from type hints, arguments from text, results to text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import pytest

import covey
from covey.errors import InvalidArgument
from covey.types.flow import ToolCall
from covey.types.ids import RunId


class Unit(StrEnum):
    KELVIN = "K"
    CELSIUS = "C"


@dataclass
class Place:
    name: str
    height_m: float = 0.0


@covey.tool(concurrency=2, idempotent=False)
def weather(place: Place, days: int, call: ToolCall, unit: Unit = Unit.CELSIUS, tags: list[str] | None = None) -> Any:
    """Forecast the weather."""
    return {"place": place.name, "days": days, "unit": unit, "tags": tags, "key": call.key}


@covey.tool
async def plain(text: str) -> str:
    return text


def _call(name: str, **arguments: str) -> ToolCall:
    return ToolCall(key="k", run_id=RunId("r"), node="n", tool=name, arguments=arguments)


def test_the_schema_comes_from_type_hints() -> None:
    schema = json.loads(weather.spec.parameters)
    assert set(schema["properties"]) == {"place", "days", "unit", "tags"}
    assert schema["required"] == ["days", "place"]
    assert schema["properties"]["days"] == {"type": "integer"}
    assert schema["$defs"]["Place"]["required"] == ["name"]
    spec = weather.spec
    assert (spec.name, spec.description) == ("weather", "Forecast the weather.")
    assert (spec.concurrency, spec.idempotent) == (2, False)


async def test_arguments_and_results_are_converted() -> None:
    call = _call("weather", place='{"name": "Oslo"}', days="3", unit="K", tags='["a"]')
    assert json.loads(await weather.invoke(call)) == {
        "place": "Oslo", "days": 3, "unit": "K", "tags": ["a"], "key": "k"
    }  # fmt: skip
    assert await plain.invoke(_call("plain", text='{"stays": "text"}')) == '{"stays": "text"}'
    assert plain.function is not None


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"days": "3"}, "arguments.place"),
        ({"place": "{}", "days": "3"}, "arguments.place"),
        ({"place": '{"name": "x"}', "days": "soon"}, "arguments.days"),
        ({"place": '{"name": "x"}', "days": "3", "wind": "1"}, "arguments.wind"),
        ({"place": '{"name": "x"}', "days": "3", "unit": "F"}, "arguments.unit"),
    ],
)
async def test_wrong_arguments_are_named(arguments: dict[str, str], field: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        await weather.invoke(_call("weather", **arguments))
    assert refused.value.field == field


async def test_a_huge_result_is_refused() -> None:
    @covey.tool
    def huge() -> str:
        return "x" * 50_000_000

    with pytest.raises(InvalidArgument, match="at most"):
        await huge.invoke(_call("huge"))


def test_what_cannot_be_a_tool_is_named() -> None:
    with pytest.raises(InvalidArgument, match="type hint"):
        covey.tool(lambda x: x)

    def many(*texts: str) -> str:
        return ""

    with pytest.raises(InvalidArgument, match="by name"):
        covey.tool(many)

    def strange(value: complex) -> str:
        return ""

    with pytest.raises(InvalidArgument, match="schema"):
        covey.tool(strange)
