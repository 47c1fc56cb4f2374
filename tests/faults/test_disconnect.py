"""A client goes away: what its request held is free everywhere within a quarter of a second of the gateway's notice."""

from __future__ import annotations

import json
import socket
from collections.abc import Awaitable, Callable, Iterator

import anyio
import pytest

from covey.cli.mesh import Mesh
from covey.clock import MonotonicClock
from covey.testing import assert_eventually
from tests.support.meshes import TINY, chat_body
from tests.support.probe import Held, Probe, api_key, mesh_in_thread, probing

pytestmark = [pytest.mark.faults, pytest.mark.timeout(120)]

NOTICE_S = 1.0
"""On loopback a closed socket is seen at once; this is what a busy machine may add."""
RELEASE_S = 0.25
SLOW = {name: {"COVEY_FAILPOINTS": "engine.after_step=sleep(0.03)"} for name in ("prefill-0", "decode-0")}
SETTINGS = ("gateway.admission.permits=1", "gateway.admission.tenant_share=1", "gateway.routing.split=always",
            "prefill.max_batch_tokens=64")  # fmt: skip


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """One request at a time, in slow steps."""
    folder = tmp_path_factory.mktemp("disconnect")
    with mesh_in_thread(folder, settings=SETTINGS, environments=SLOW) as mesh:
        yield mesh


@pytest.fixture(autouse=True)
def _no_blocking() -> None:
    """Off: the client here is a plain socket, and grpc's channels lock when they are collected."""


class Client:
    """A raw connection with one streamed chat under way, to be cut off without a word."""

    def __init__(self, mesh: Mesh, prompt: str) -> None:
        host, _, port = mesh.http.removeprefix("http://").partition(":")
        body = json.dumps(chat_body(TINY, prompt, max_tokens=400, ignore_eos=True, stream=True)).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {api_key(mesh)}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self._socket = socket.create_connection((host, int(port)), timeout=20)
        self._socket.sendall(head.encode() + body)
        self._seen = b""

    async def until_tokens(self, count: int) -> None:
        """Read until `count` pieces of text came."""
        await anyio.to_thread.run_sync(self._until_tokens, count)

    def _until_tokens(self, count: int) -> None:
        while self._seen.count(b'"content":"') < count + 1:  # the role comes with an empty one
            piece = self._socket.recv(4096)
            assert piece, f"the stream ended: {self._seen.decode()}"
            self._seen += piece

    @property
    def seen(self) -> bytes:
        return self._seen

    def close(self) -> None:
        self._socket.close()


async def until(probe: Probe, holds: Callable[[Held], bool], timeout_s: float) -> tuple[float, Held]:
    """Poll what is held until it is as wanted; returns when that was seen."""
    clock = MonotonicClock()
    with anyio.fail_after(timeout_s):
        while not holds(held := await probe.held()):
            pass
    return clock.now(), held


async def is_released(mesh: Mesh, prompt: str, ready: Callable[[Probe, Client], Awaitable[object]]) -> None:
    """Start a request, wait until it is `ready`, cut it off, and see everything come back in time."""
    clock = MonotonicClock()
    async with probing(mesh) as probe:
        await assert_eventually(probe.holds_nothing, timeout_s=10)
        client = Client(mesh, prompt)
        try:
            await ready(probe, client)
            before = await probe.held()
            assert not before.is_nothing
        finally:
            client.close()
        closed_at = clock.now()
        noticed_at, _ = await until(probe, lambda held: held.gateway_requests < before.gateway_requests, 10)
        assert noticed_at - closed_at < NOTICE_S
        free_at, _ = await until(probe, lambda held: held.is_nothing, 30)
        assert free_at - noticed_at < RELEASE_S
        work = await probe.work()
        assert (await probe.work()).generated_tokens == work.generated_tokens, "it is still being decoded"


async def test_after_the_third_token(mesh: Mesh) -> None:
    async def decoding(probe: Probe, client: Client) -> None:
        await client.until_tokens(3)
        held = await probe.held()
        assert held.engine_requests == 1
        assert held.engine_blocks > 0

    await is_released(mesh, "Tell me about rivers. " * 8, decoding)


async def test_before_the_first_token(mesh: Mesh) -> None:
    async def prefilling(probe: Probe, client: Client) -> None:
        await assert_eventually(lambda: _runs(probe, "prefill-0"), timeout_s=10)
        assert not client.seen

    await is_released(mesh, "Tell me about mountains. " * 60, prefilling)


async def test_while_queued(mesh: Mesh) -> None:
    """The first request keeps the only permit; the second leaves the queue when its client goes."""
    async with probing(mesh) as probe:
        first = Client(mesh, "Tell me about lakes. " * 4)
        try:
            await first.until_tokens(1)
            second = Client(mesh, "Tell me about seas. " * 4)
            await until(probe, lambda held: held.gateway_requests == 2, 10)
            clock = MonotonicClock()
            second.close()
            closed_at = clock.now()
            left_at, held = await until(probe, lambda held: held.gateway_requests == 1, 10)
            assert left_at - closed_at < NOTICE_S
            assert held.engine_requests == 1, "the first request was touched"
            await first.until_tokens(10)
        finally:
            first.close()
        await assert_eventually(probe.holds_nothing, timeout_s=5)
    await is_released(mesh, "Tell me about rain. " * 4, lambda _, client: client.until_tokens(1))


async def _runs(probe: Probe, name: str) -> bool:
    return (await probe.load(name)).running == 1
