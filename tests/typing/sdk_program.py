"""A user's program over the public API; a test runs mypy over it and sees every inferred type."""

from __future__ import annotations

from typing import assert_type

from covey import (
    CacheMode,
    Client,
    FlowEvent,
    Message,
    Program,
    Ref,
    Refs,
    Run,
    RunState,
    RunView,
    SemanticFunction,
    Tool,
    ToolCall,
    Variable,
    Workflow,
    latency,
    semantic,
    tool,
    ttft,
)
from covey.actor import Ask
from covey.actor import Ref as ActorRef
from covey.codec.methods import Decode, KvStore
from covey.net.rpc import Channel, Replies
from covey.types.common import Empty
from covey.types.generate import EngineLoad, Event, GenerateRequest
from covey.types.kv import LookupReply, LookupRequest
from covey.types.kv_state import StoreStats
from covey.types.program import ModelCard, VariableValue


@semantic(model="smollm2", max_tokens=32, temperature=0.0, cache=CacheMode.BYPASS)
def summarize(text: str) -> str:
    """Summarize: {{text}}"""
    raise AssertionError("the docstring is the prompt")


@tool
def read(path: str, call: ToolCall) -> str:
    """Read a document."""
    return f"{path} {call.key}"


@tool(name="count", concurrency=2)
def count_words(text: str) -> int:
    """Count the words of a text."""
    return len(text.split())


async def program(client: Client) -> str:
    """Semantic functions, futures, streams."""
    assert_type(summarize, SemanticFunction)
    assert_type(await client.models(), tuple[ModelCard, ...])
    async with client.program(model="smollm2", deadline_s=30.0) as opened:
        assert_type(opened, Program)
        first = summarize("a text")
        assert_type(first, Variable)
        second = summarize.using(max_tokens=8)(first)
        assert_type(await second.get(objective=ttft(0.5), timeout_s=10.0), str)
        assert_type(await second.result(objective=latency()), VariableValue)
        async with second.stream() as pieces:
            async for piece in pieces:
                assert_type(piece, str)
        return await second


async def workflow(client: Client) -> dict[str, str]:
    """Nodes, tools, runs, events."""
    assert_type(read, Tool)
    assert_type(count_words, Tool)
    flow = Workflow("report", version="2")
    topic = flow.input("topic")
    assert_type(topic, Ref)
    branches = flow.map("page", ["a", "b"], lambda name, item: flow.tool(name, "read", path=item))
    assert_type(branches, Refs)
    flow.output(flow.llm("report", [Message(role="user", content=f"{topic}: {branches}")], max_tokens=8))
    async with client.serve_tools([read, count_words]):
        run = await client.submit(flow, {"topic": "rivers"}, idempotency_key="once")
        assert_type(run, Run)
        async with run.events() as events:
            async for event in events:
                assert_type(event, FlowEvent)
        assert_type(await run.wait(timeout_s=5), RunView)
        assert_type((await run.view()).state, RunState)
        return await run.result()


async def inside(channel: Channel, lookup: LookupRequest, request: GenerateRequest) -> None:
    """The mesh's own calls: the method says what goes in and what comes back."""
    assert_type(await channel.call(KvStore.LOOKUP, lookup, timeout_s=1.0), LookupReply)
    assert_type(await channel.call(KvStore.STATS, Empty(), timeout_s=1.0), StoreStats)
    assert_type(await channel.call(Decode.LOAD, Empty(), timeout_s=1.0), EngineLoad)
    async with channel.stream(Decode.GENERATE, request, timeout_s=1.0) as events:
        assert_type(events, Replies[Event])


class Count(Ask[int]):
    """A question that is answered with a number."""


async def actors(ref: ActorRef[Count]) -> None:
    """An actor takes the messages of its type, and answers with theirs."""
    assert_type(await ref.ask(Count(), timeout_s=1.0), int)
    await ref.tell(Count())
    assert_type(ref.signal(Count()), bool)
