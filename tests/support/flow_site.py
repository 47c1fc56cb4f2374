"""A whole site for tests of agentflow: NATS, a fake gateway, agentflow, and a channel of the tenant `local`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from covey.client.tool import Tool, tool
from covey.client.tool_worker import serving
from covey.codec.methods import Flow
from covey.net.embedded import EmbeddedNats
from covey.net.rpc import Channel
from covey.types.flow import (
    LlmNode,
    Node,
    RetryPolicy,
    RunRequest,
    RunView,
    SubmitRun,
    ToolNode,
    WaitRun,
    Workflow,
)
from covey.types.ids import RunId
from covey.types.program import CallParams, Message
from tests.support.fake_gateway import FakeGateway, fake_gateway
from tests.support.flows import Agentflow, agentflow, key_channel


def llm(node_id: str, text: str, **fields: object) -> Node:
    work = LlmNode(messages=(Message(role="user", content=text),), params=CallParams(max_tokens=8))
    return Node(id=node_id, work=work, **fields)  # type: ignore[arg-type]


def use(node_id: str, name: str, timeout_s: float = 0.0, retry: RetryPolicy | None = None, **arguments: str) -> Node:
    work = ToolNode(tool=name, arguments=arguments, expected_s=1.5)
    return Node(id=node_id, work=work, timeout_s=timeout_s, retry=retry)


def workflow(*nodes: Node, outputs: tuple[str, ...] = ()) -> Workflow:
    return Workflow(name="test", nodes=nodes, outputs=outputs)


@tool
async def shout(text: str) -> str:
    """Say it loudly."""
    return text.upper()


@dataclass
class Site:
    """A mesh of the test: agentflow can be stopped and started again."""

    stack: AsyncExitStack
    nats: EmbeddedNats
    gateway: FakeGateway
    gateway_address: str
    blobs: Path
    flow: Agentflow
    channel: Channel

    async def submit(self, nodes: Workflow, *, key: str = "", deadline_s: float = 0.0, **inputs: str) -> RunId:
        request = SubmitRun(workflow=nodes, inputs=inputs, idempotency_key=key, deadline_s=deadline_s)
        return (await self.channel.call(Flow.SUBMIT, request, timeout_s=10)).run_id

    async def wait(self, run_id: RunId, timeout_s: float = 20) -> RunView:
        return await self.channel.call(Flow.WAIT, WaitRun(run_id=run_id, timeout_s=timeout_s), timeout_s=timeout_s + 5)

    async def get(self, run_id: RunId) -> RunView:
        return await self.channel.call(Flow.GET, RunRequest(run_id=run_id), timeout_s=5)


@asynccontextmanager
async def site(tmp_path: Path, tools: Sequence[Tool] = (), **settings: object) -> AsyncIterator[Site]:
    async with AsyncExitStack() as stack:
        nats = await stack.enter_async_context(EmbeddedNats.start(tmp_path))
        gateway, address = await stack.enter_async_context(fake_gateway())
        inner = await stack.enter_async_context(AsyncExitStack())
        flow = await inner.enter_async_context(agentflow(nats.url, nats.token, address, tmp_path / "b", **settings))
        channel = await inner.enter_async_context(key_channel(flow.address))
        if tools:
            await inner.enter_async_context(serving(channel, tools, worker="w"))
        yield Site(inner, nats, gateway, address, tmp_path / "b", flow, channel)
