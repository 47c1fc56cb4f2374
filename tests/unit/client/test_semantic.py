"""Semantic functions and programs against a fake gateway over real gRPC."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest

import covey
from covey.auth import MeshToken
from covey.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    Unauthenticated,
    Unavailable,
)
from covey.testing import assert_eventually
from covey.types.program import ObjectiveKind, SemanticCall
from tests.support.fake_gateway import FakeGateway, fake_gateway

KEY = "ck-tests-tests-tests"


@covey.semantic(model="small", max_tokens=8, system="You are brief.")
def summarise(text: str, words: int = 5) -> str:  # type: ignore[empty-body]
    """Summarise in {{words}} words: {{text}}"""


@covey.semantic()
def combine(first: str, second: str) -> str:  # type: ignore[empty-body]
    """{{first}} and {{second}}"""


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[FakeGateway, covey.Client]]:
    async with fake_gateway(token=MeshToken(KEY)) as (gateway, address):
        async with covey.Client.connect(gateway=address, api_key=KEY) as client:
            yield gateway, client


async def test_calls_return_at_once_and_form_a_graph() -> None:
    async with connected() as (gateway, client), client.program(model="big") as program:
        gate = anyio.Event()

        async def answer(prompt: str, call: SemanticCall) -> str:
            await gate.wait()
            return f"[{call.model}: {prompt}]"

        gateway.answer = answer
        a = summarise("bees {{second}}")
        b = summarise("ants", words=3)
        both = combine(a, b)
        assert gateway.submitted == []
        await assert_eventually(lambda: len(gateway.submitted) == 3)
        gate.set()
        left = "[small: You are brief.\nSummarise in 5 words: bees {{second}}]"
        right = "[small: You are brief.\nSummarise in 3 words: ants]"
        assert await both.get(objective=covey.deadline(9.0), timeout_s=10) == f"[big: {left} and {right}]"
        assert await a == left
        assert [call.params.max_tokens for call in gateway.submitted] == [8, 8, None]
        kinds = [(get.objective.kind, get.objective.target_s) for get in gateway.gets]
        assert kinds == [(ObjectiveKind.DEADLINE, 9.0), (ObjectiveKind.LATENCY, 0.0)]
        result = await both.result()
        assert (result.worker, result.usage is not None) == ("decode-0", True)
        assert program.program_id in gateway.programs
    await assert_eventually(lambda: not gateway.programs)


async def test_one_function_with_several_models() -> None:
    async with connected() as (gateway, client), client.program():
        values = [combine.using(model=model, temperature=0.5)("x", "y") for model in ("A", "B")]
        assert [await value for value in values] == ["<x and y>"] * 2
        assert [(call.model, call.params.temperature) for call in gateway.submitted] == [("A", 0.5), ("B", 0.5)]
        assert [card.id for card in await client.models()] == ["fake"]


async def test_streams_yield_pieces_and_close_early() -> None:
    async with connected() as (_, client), client.program() as program:
        value = combine("one two", "three")
        stream = value.stream()
        assert "".join([piece async for piece in stream]).strip() == "<one two and three>"
        assert stream.result is not None
        assert stream.result.value == "<one two and three>"
        async with value.stream() as early:
            async for piece in early:
                assert piece == "<one "
                break
        assert program.channel.calls == 0, "leaving the block ended the call"
        assert [piece async for piece in early] == []


async def test_a_shared_value_is_sent_once() -> None:
    async with connected() as (gateway, client), client.program() as program:
        document = program.value("a long text", name="document")
        values = [combine(document, str(i)) for i in range(3)]
        assert [await value for value in values] == [f"<a long text and {i}>" for i in range(3)]
        assert {call.messages[0].content.split(" and ")[0] for call in gateway.submitted} == {"{{document}}"}


async def test_a_tool_hint_goes_with_the_call() -> None:
    async with connected() as (gateway, client), client.program() as program:
        value = combine("x", "y")
        program.hint_tool(value, "search", expected_s=2.0)
        await value
        hint = gateway.submitted[0].then_tool
        assert hint is not None
        assert (hint.tool, hint.expected_s) == ("search", 2.0)
        with pytest.raises(FailedPrecondition):
            program.hint_tool(value, "search")


async def test_errors_come_from_get() -> None:
    async with connected() as (gateway, client), client.program() as program:

        async def answer(prompt: str, _call: SemanticCall) -> str:
            if "bad" in prompt:
                raise InvalidArgument("no such model 'small'", field="model")
            await anyio.sleep_forever()
            raise AssertionError

        gateway.answer = answer
        with pytest.raises(InvalidArgument) as refused:
            await combine("bad", "y")
        assert refused.value.field == "model"
        slow = combine("x", "y")
        with pytest.raises(DeadlineExceeded):
            await slow.get(timeout_s=0.05)
        with pytest.raises(InvalidArgument, match="timeout_s"):
            await slow.get(timeout_s=0)
        await program.cancel()
        assert [call_id for call_id in gateway.cancelled if str(call_id).startswith("combine")] != []


async def test_misuse_is_named() -> None:
    with pytest.raises(InvalidArgument, match="program"):
        combine("x", "y")
    async with connected() as (_, client):
        async with client.program():
            value = combine("x", "y")
            with pytest.raises(InvalidArgument, match="'second'"):
                combine("x")
            with pytest.raises(InvalidArgument, match="await"):
                f"{value}"
        with pytest.raises(InvalidArgument, match="program"):
            combine("x", "y")
        async with client.program():
            with pytest.raises(InvalidArgument, match="another program"):
                combine(value, "y")


def test_bad_declarations_are_named() -> None:
    with pytest.raises(InvalidArgument, match="docstring"):
        covey.semantic()(lambda text: text)

    def unknown(text: str) -> None:
        """{{txt}} {{text}}"""

    with pytest.raises(InvalidArgument, match=r"\{\{txt\}\}"):
        covey.semantic()(unknown)

    def unused(text: str, extra: str) -> None:
        """{{text}}"""

    with pytest.raises(InvalidArgument, match=r"\{\{extra\}\}"):
        covey.semantic()(unused)
    with pytest.raises(InvalidArgument, match="max_token"):
        covey.semantic(max_token=3)


async def test_connecting_says_what_is_missing(tmp_path: object) -> None:
    with pytest.raises(InvalidArgument) as no_key:
        async with covey.Client.connect(gateway="127.0.0.1:1"):
            pass
    assert no_key.value.field == "api_key"
    with pytest.raises(Unavailable, match="covey up"):
        async with covey.Client.connect(run_dir=str(tmp_path)):
            pass
    async with covey.Client.connect(gateway="127.0.0.1:1", api_key=KEY) as client:
        with pytest.raises(FailedPrecondition, match="flow"):
            await client.runs()
        with pytest.raises(Unavailable):
            await client.models()
    async with fake_gateway(token=MeshToken(KEY)) as (_, address):
        async with covey.Client.connect(gateway=address, api_key="ck-wrong-wrong-wrong") as client:
            with pytest.raises(Unauthenticated):
                await client.models()
