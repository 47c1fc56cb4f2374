"""The workflow builder and run handles against a real agentflow with a fake gateway."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import anyio
import pytest

import covey
from covey.errors import AlreadyExists, DeadlineExceeded, InvalidArgument, NotFound, Unauthenticated
from covey.net.embedded import EmbeddedNats
from covey.types.flow import LlmNode, NodeState, RunState, ToolNode
from tests.support.fake_gateway import FakeGateway, fake_gateway
from tests.support.flows import KEY, agentflow


@covey.tool
async def count(text: str, letters: list[str]) -> dict[str, int]:
    """How often each letter occurs."""
    return {letter: text.count(letter) for letter in letters}


@asynccontextmanager
async def connected(tmp_path: Path) -> AsyncIterator[tuple[FakeGateway, covey.Client]]:
    async with AsyncExitStack() as stack:
        nats = await stack.enter_async_context(EmbeddedNats.start(tmp_path))
        gateway, address = await stack.enter_async_context(fake_gateway())
        flow = await stack.enter_async_context(agentflow(nats.url, nats.token, address, tmp_path / "blobs"))
        client = await stack.enter_async_context(covey.Client.connect(flow=flow.address, api_key=KEY))
        yield gateway, client


def _review() -> covey.Workflow:
    wf = covey.Workflow("review")
    topic = wf.input("topic")

    def branch(node_id: str, side: str) -> covey.Ref:
        draft = wf.llm(f"{node_id}_draft", f"{side} side of {topic}", max_tokens=20)
        return wf.tool(node_id, "count", text=draft, letters=["e", "s"])

    sides = wf.map("side", ["left", "right"], branch)
    wf.llm("verdict", f"Compare:\n{sides}", system=f"You judge {topic}.")
    return wf


def test_a_workflow_is_built_from_references() -> None:
    built, inputs = _review().build({"topic": "bees"})
    nodes = {node.id: node.work for node in built.nodes}
    assert list(nodes) == ["side_0_draft", "side_0", "side_1_draft", "side_1", "verdict"]
    tool, verdict = nodes["side_0"], nodes["verdict"]
    assert isinstance(tool, ToolNode)
    assert tool.arguments == {"text": "{{side_0_draft}}", "letters": '["e","s"]'}
    assert isinstance(verdict, LlmNode)
    assert [m.content for m in verdict.messages] == ["You judge {{topic}}.", "Compare:\n{{side_0}}\n{{side_1}}"]
    assert inputs == {"topic": "bees"}


def test_fixed_text_keeps_its_braces() -> None:
    wf = covey.Workflow("w")
    wf.llm("a", f"keep {wf.text('{{topic}}')}")
    _, inputs = wf.build()
    assert inputs == {"text_1": "{{topic}}"}


def test_mistakes_are_named_before_anything_is_sent() -> None:
    with pytest.raises(InvalidArgument, match=r"'verdict'.*\{\{topic\}\}|\{\{topic\}\}"):
        _review().build()
    wf = covey.Workflow("w")
    wf.llm("a", "x")
    with pytest.raises(InvalidArgument, match="two nodes"):
        wf.llm("a", "y")
    with pytest.raises(InvalidArgument, match="max_token"):
        wf.llm("b", "y", max_token=3)
    with pytest.raises(InvalidArgument, match="role"):
        wf.llm("c", [{"content": "y"}])
    wf.output("nothing")
    with pytest.raises(InvalidArgument, match="'nothing'"):
        wf.build()


async def test_a_workflow_runs_with_a_tool_and_is_watched(tmp_path: Path) -> None:
    async with connected(tmp_path) as (_, client), client.serve_tools([count]):
        run = await client.submit(_review(), {"topic": "bees"}, idempotency_key="k")
        seen = []
        async with run.events() as events:
            async for event in events:
                seen.append(event)
        assert [event.seq for event in seen] == list(range(1, len(seen) + 1))
        assert seen[-1].run_state is RunState.SUCCEEDED
        outputs = await run.result(timeout_s=10)
        expected = '<You judge bees.\nCompare:\n{"e":4,"s":2}\n{"e":3,"s":2}>'
        assert outputs == {"verdict": expected}
        again = await client.submit(_review(), {"topic": "bees"}, idempotency_key="k")
        assert (again.id, again.existing) == (run.id, True)
        with pytest.raises(AlreadyExists):
            await client.submit(_review(), {"topic": "ants"}, idempotency_key="k")
        assert [view.run_id for view in await client.runs(state=RunState.SUCCEEDED)] == [run.id]
        assert (await client.run(run.id).view()).outputs == outputs


async def test_a_failed_run_says_where_and_why(tmp_path: Path) -> None:
    @covey.tool
    def fail(text: str) -> str:
        raise ValueError(f"cannot use {text}")

    async with connected(tmp_path) as (_, client), client.serve_tools([fail]):
        wf = covey.Workflow("w")
        wf.tool("broken", "fail", text="this", retry=covey.RetryPolicy(attempts=1))
        run = await client.submit(wf)
        with pytest.raises(covey.RunFailed, match=r"'broken'.*cannot use this") as failed:
            await run.result(timeout_s=10)
        assert failed.value.view.error_code == "TOOL_FAILED"
        assert failed.value.view.nodes[0].state is NodeState.FAILED
        with pytest.raises(NotFound):
            await client.run("run-none").view()


async def test_waiting_and_cancelling(tmp_path: Path) -> None:
    async with connected(tmp_path) as (_, client):
        wf = covey.Workflow("w")
        wf.tool("never", "nobody-has-it")
        run = await client.submit(wf)
        with pytest.raises(DeadlineExceeded):
            await run.result(timeout_s=0.05)
        assert (await run.cancel()).state is RunState.CANCELLED
        with pytest.raises(covey.RunFailed, match="cancelled"):
            await run.result(timeout_s=5)


async def test_tools_of_a_wrong_key_are_refused(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        nats = await stack.enter_async_context(EmbeddedNats.start(tmp_path))
        flow = await stack.enter_async_context(agentflow(nats.url, nats.token, "127.0.0.1:1", tmp_path / "blobs"))
        client = await stack.enter_async_context(
            covey.Client.connect(flow=flow.address, api_key="ck-wrong-wrong-wrong")
        )
        with pytest.raises(Unauthenticated), anyio.fail_after(10):
            async with client.serve_tools([count]):
                pass
