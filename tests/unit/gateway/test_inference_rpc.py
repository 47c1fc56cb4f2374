"""Inference over real gRPC: the same answers as over HTTP, credentials, and clients that leave."""

from __future__ import annotations

from typing import Any

import pytest

from covey.auth import MeshToken
from covey.codec.methods import Inference
from covey.errors import Unauthenticated
from covey.net.rpc import Channel
from covey.testing import assert_eventually
from covey.types.common import Empty
from covey.types.generate import Role
from covey.types.program import CacheMode, CallParams, ChatRequest, Completed, Delta, Message
from tests.support.fake_mesh import MODEL, FakeWorker
from tests.support.grpc_edge import MESH_TOKEN, answer, edge


async def test_inference_over_grpc_and_its_credentials() -> None:
    async with edge() as (mesh, channel):
        worker = await mesh.add(FakeWorker(name="d", role=Role.DECODE))
        request = ChatRequest(
            model=MODEL,
            messages=(Message(role="user", content="hi"),),
            params=CallParams(temperature=0.0),
            cache=CacheMode.BYPASS,
        )

        async def ask(through: Channel, **headers: str) -> list[Any]:
            async with through.stream(Inference.CHAT, request, timeout_s=5, headers=headers) as events:
                return [event async for event in events]

        events = await ask(channel)
        assert "".join(e.text for e in events if isinstance(e, Delta)) == answer("hi")
        assert isinstance(events[-1], Completed)
        models = await channel.call(Inference.MODELS, Empty(), timeout_s=5)
        assert [m.id for m in models.models] == [MODEL]
        async with Channel.open(channel.address, token=MESH_TOKEN) as internal:
            await ask(internal, **{"x-covey-tenant": "someone"})
            with pytest.raises(Unauthenticated):
                await ask(internal)
        await ask(channel, **{"x-covey-tenant": "someone"})  # a tenant's own claim counts for nothing
        async with Channel.open(channel.address, token=MeshToken("not-a-key-of-this-mesh")) as nobody:
            with pytest.raises(Unauthenticated):
                await ask(nobody)
    assert [seen.tenant for seen in worker.seen] == ["acme", "someone", "acme"]


async def test_a_grpc_client_that_leaves_frees_the_worker() -> None:
    async with edge() as (mesh, channel):
        worker = await mesh.add(FakeWorker(name="d", role=Role.DECODE, pace_s=0.02, answer_tokens=400))
        request = ChatRequest(
            model=MODEL,
            messages=(Message(role="user", content="hi"),),
            params=CallParams(temperature=0.0, max_tokens=400),
            cache=CacheMode.BYPASS,
        )
        async with channel.stream(Inference.CHAT, request, timeout_s=10) as events:
            async for event in events:
                if isinstance(event, Delta):
                    break
        await assert_eventually(lambda: worker.running == 0, timeout_s=0.5)
        await assert_eventually(lambda: mesh.metric("covey_num_requests_running") == 0)
