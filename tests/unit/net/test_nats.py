"""What only a real NATS connection can show: a frozen server, an orderly restart, a client that gave up."""

from __future__ import annotations

import signal
from pathlib import Path

import anyio
import pytest

from covey.errors import Unavailable
from covey.net.nats import NatsBus
from covey.testing import assert_eventually
from tests.support.nats import NatsServer


async def heard(messages: object, payload: bytes) -> bool:
    with anyio.move_on_after(5):
        async for message in messages:  # type: ignore[attr-defined]
            if message.payload == payload:
                return True
    return False


async def test_a_frozen_server_is_noticed_and_nothing_piles_up(tmp_path: Path) -> None:
    async with NatsServer(tmp_path) as server, NatsBus.open(server.url, token=server.token) as bus:
        server.freeze()
        refused = None
        with anyio.fail_after(6):
            while refused is None:
                try:
                    await bus.publish("a", b"x" * 100_000)
                except Unavailable as error:
                    refused = error
                await anyio.sleep(0.01)
        await assert_eventually(lambda: not bus.connected, timeout_s=8)
        server.thaw()
        with anyio.fail_after(10):
            await bus.until_connected()
        async with bus.subscribe("b") as messages:
            await bus.publish("b", b"back")
            assert await heard(messages, b"back")


async def test_an_orderly_stop_and_start_is_like_a_kill(tmp_path: Path) -> None:
    async with NatsServer(tmp_path) as server, NatsBus.open(server.url, token=server.token) as bus:
        async with bus.subscribe("a") as messages:
            await server.kill(signal.SIGTERM)
            await assert_eventually(lambda: not bus.connected, timeout_s=10)
            await server.start()
            with anyio.fail_after(10):
                await bus.until_connected()
            await bus.publish("a", b"back")
            assert await heard(messages, b"back")


async def test_a_client_that_gave_up_is_replaced_with_its_subscriptions(tmp_path: Path) -> None:
    async with NatsServer(tmp_path) as server, NatsBus.open(server.url, token=server.token) as bus:
        async with bus.subscribe("a") as messages:
            before = bus.connections
            await bus._client._process_err("'maximum connections exceeded'")  # what closes nats-py for good
            await assert_eventually(lambda: bus.connections > before)
            await bus.publish("a", b"back")
            assert await heard(messages, b"back")


async def test_publishing_after_the_block_is_unavailable(tmp_path: Path) -> None:
    async with NatsServer(tmp_path) as server:
        async with NatsBus.open(server.url, token=server.token) as bus:
            pass
        with pytest.raises(Unavailable):
            await bus.publish("a", b"")
