"""A fake mesh behind a real gRPC edge, with clients of its programs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from covey.auth import ApiKeys, MeshToken
from covey.codec.methods import Programs
from covey.net.rpc import Channel, serve
from covey.types.ids import CallId, ProgramId
from covey.types.program import (
    CacheMode,
    CallParams,
    GetVariable,
    Message,
    Objective,
    ObjectiveKind,
    OpenProgram,
    SemanticCall,
    SubmitCalls,
    SubmitReply,
    ToolHint,
    VariableValue,
)
from services.gateway.config import Config
from services.gateway.rpc.credentials import EdgeCredentials
from tests.support.fake_mesh import (
    API_KEY,
    OTHER,
    OTHER_KEY,
    TENANT,
    FakeMesh,
    FakeTokenizer,
    expected_ids,
    fake_mesh,
)

MESH_TOKEN = MeshToken("the-token-of-the-test-mesh")
LATENCY = Objective(kind=ObjectiveKind.LATENCY)


def call(
    name: str, template: str, *, timeout_s: float = 0.0, tool: ToolHint | None = None, **params: Any
) -> SemanticCall:
    return SemanticCall(
        call_id=CallId(name),
        messages=(Message(role="user", content=template),),
        output=f"out_{name}",
        params=CallParams(temperature=0.0, **params),
        cache=CacheMode.BYPASS,
        then_tool=tool,
        timeout_s=timeout_s,
    )


def answer(prompt: str, count: int = 12) -> str:
    """What the fake model says to a prompt."""
    ids = FakeTokenizer().encode_chat([{"role": "user", "content": prompt}])
    return "".join(map(chr, expected_ids(tuple(ids), count)))


class Client:
    """A program of one tenant."""

    def __init__(self, channel: Channel, program_id: ProgramId) -> None:
        self.channel = channel
        self.program_id = program_id

    async def submit(self, *calls: SemanticCall, **variables: str) -> SubmitReply:
        request = SubmitCalls(program_id=self.program_id, calls=calls, variables=variables)
        return await self.channel.call(Programs.SUBMIT, request, timeout_s=5)

    async def get(self, name: str, *, timeout_s: float = 5.0, objective: Objective = LATENCY) -> VariableValue:
        request = GetVariable(program_id=self.program_id, name=name, objective=objective, timeout_s=timeout_s)
        return await self.channel.call(Programs.GET, request, timeout_s=timeout_s + 5)


@asynccontextmanager
async def edge(config: Config | None = None) -> AsyncIterator[tuple[FakeMesh, Channel]]:
    """A fake mesh and a channel of its tenant to the gateway's gRPC edge."""
    async with fake_mesh() as mesh:
        gateway = await mesh.gateway(config)
        keys = ApiKeys({TENANT: API_KEY, OTHER: OTHER_KEY})
        async with (
            serve("127.0.0.1:0", gateway.handlers, token=EdgeCredentials(keys, MESH_TOKEN), grace_s=0.2) as server,
            Channel.open(server.address, token=MeshToken(API_KEY)) as channel,
        ):
            yield mesh, channel


async def opened(channel: Channel, **fields: Any) -> Client:
    handle = await channel.call(Programs.OPEN, OpenProgram(**fields), timeout_s=5)
    return Client(channel, handle.program_id)
