"""SIGTERM drains: a stream under way ends whole, nothing new is lost, the process exits with 0."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from covey.cli.chat import delta_text, stream_chat
from covey.cli.child import Child
from covey.cli.mesh import Mesh
from covey.errors import CoveyError
from covey.testing import assert_eventually
from tests.support.meshes import TINY, chat_body, client_of
from tests.support.probe import Probe, mesh_in_thread, probing

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

TOKENS = 160
AFTER = 7
"""Pieces of text after which the signal comes."""
EXIT_S = 20.0
SLOW = {name: {"COVEY_FAILPOINTS": "engine.after_step=sleep(0.005)"} for name in ("decode-0", "decode-1")}


@pytest.fixture(autouse=True)
def _no_blocking() -> None:
    """Off: a test's process only watches here, and grpc's channels lock when they are collected."""


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Mesh]:
    with mesh_in_thread(tmp_path, decode=2, environments=SLOW) as mesh:
        yield mesh


def body(**options: Any) -> dict[str, Any]:
    return chat_body(TINY, "Tell me about rivers.", max_tokens=TOKENS, ignore_eos=True, **options)


async def running_on(mesh: Mesh, probe: Probe) -> str:
    """The decode worker of the one stream under way."""
    found: list[str] = []

    async def is_found() -> bool:
        found[:] = [name for name in probe.names("decode") if (await probe.load(name)).running]
        return bool(found)

    await assert_eventually(is_found, timeout_s=10)
    return found[0]


async def exit_code(child: Child) -> int:
    """The exit code that the launcher's own task sees."""
    await assert_eventually(lambda: not child.running, timeout_s=EXIT_S)
    code = child.process.returncode
    assert code is not None
    return code


async def test_a_decode_worker_then_the_gateway_drain_under_load(mesh: Mesh) -> None:
    async with client_of(mesh) as client, probing(mesh) as probe:
        undisturbed = (await client.post("/v1/chat/completions", json=body())).json()
        text = undisturbed["choices"][0]["message"]["content"]
        drained = await _decode_drains(mesh, client, probe, text)
        # Its place is taken: what comes now is served by the other one.
        again = await client.post("/v1/chat/completions", json=body())
        assert again.status_code == httpx.codes.OK, again.text
        assert again.json()["choices"][0]["message"]["content"] == text
        assert probe.names("decode") == [name for name in ("decode-0", "decode-1") if name != drained]
        await _gateway_drains(mesh, client, text)


async def _decode_drains(mesh: Mesh, client: httpx.AsyncClient, probe: Probe, text: str) -> str:
    """SIGTERM to the worker of a running stream; requests that come meanwhile are served too."""
    name, streamed, last, meanwhile = "", "", {}, []

    async def ask() -> None:
        response = await client.post("/v1/chat/completions", json=body())
        assert response.status_code == httpx.codes.OK, response.text
        meanwhile.append(response.json()["choices"][0]["message"]["content"])

    async with anyio.create_task_group() as tasks:
        seen = 0
        async for chunk in stream_chat(client, body()):
            streamed, last, seen = streamed + delta_text(chunk), chunk, seen + 1
            if seen == AFTER:
                name = await running_on(mesh, probe)
                mesh.children[name].process.send_signal(signal.SIGTERM)
                for _ in range(3):
                    tasks.start_soon(ask)
    assert streamed == text
    assert last["covey"]["migrations"] == 0, "the worker did not end its own stream"
    assert last["usage"]["completion_tokens"] == TOKENS
    assert meanwhile == [text] * 3
    assert await exit_code(mesh.children[name]) == 0
    return name


async def _gateway_drains(mesh: Mesh, client: httpx.AsyncClient, text: str) -> None:
    """SIGTERM to the gateway under two streams: both end whole, then nobody listens there."""
    gateway = mesh.children["gateway-0"]
    texts: list[str] = []
    began = [anyio.Event(), anyio.Event()]

    async def stream(index: int) -> None:
        async with client_of(mesh) as own:
            pieces = []
            async for chunk in stream_chat(own, body()):
                pieces.append(delta_text(chunk))
                if len(pieces) == AFTER:
                    began[index].set()
            assert chunk["usage"]["completion_tokens"] == TOKENS
            texts.append("".join(pieces))

    async with anyio.create_task_group() as tasks:
        for index in range(2):
            tasks.start_soon(stream, index)
        for event in began:
            await event.wait()
        gateway.process.send_signal(signal.SIGTERM)
    assert texts == [text, text]
    assert await exit_code(gateway) == 0
    with pytest.raises((httpx.ConnectError, CoveyError)):
        await client.get("/readyz")
