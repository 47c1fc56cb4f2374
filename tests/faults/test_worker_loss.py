"""A worker dies, freezes or is cut off under a running stream: the text is that of the undisturbed run."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from covey.auth import MeshToken
from covey.cli.chat import delta_text, stream_chat
from covey.cli.child import Child
from covey.cli.mesh import Mesh
from covey.clock import MonotonicClock
from covey.codec.methods import Decode
from covey.net.rpc import Channel
from covey.testing import assert_eventually
from covey.types.common import Empty
from tests.support.meshes import PACKAGED, TINY, chat_body, client_of, mesh_of
from tests.support.probe import probing

pytestmark = [pytest.mark.faults, pytest.mark.timeout(240)]

TOKENS = {TINY: 250, PACKAGED: 48}
KILL_AFTER = 7
SLOW = {f"decode-{i}": {"COVEY_FAILPOINTS": "engine.after_step=sleep(0.01)"} for i in range(2)}
"""A tiny model is through before anybody can disturb it."""
STALL_S = {TINY: 2.0, PACKAGED: 6.0}
"""The packaged model computes the whole sequence again, in parallel with a suite that fills the cores."""


async def _running_on(mesh: Mesh) -> Child:
    """The decode worker that serves the one stream under way."""
    token = MeshToken((mesh.plan.files.run_dir / "mesh.token").read_text())
    with anyio.fail_after(30):
        while True:
            for name, child in mesh.children.items():
                if not name.startswith("decode"):
                    continue
                async with Channel.open(child.addresses["grpc"], token=token) as channel:
                    if (await channel.call(Decode.LOAD, Empty(), timeout_s=2.0)).running:
                        return child


async def _stream(client: httpx.AsyncClient, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    async for chunk in stream_chat(client, body):
        yield chunk


async def _disturbed(
    mesh: Mesh, body: dict[str, Any], disturb: Any, stalls_s: list[float] | None = None
) -> tuple[str, dict[str, Any]]:
    """Stream an answer and disturb it after a few chunks; the text and the last chunk. `stalls_s` gets the gaps."""
    text, seen, last = "", 0, {}
    clock = MonotonicClock()
    at = clock.now()
    async with client_of(mesh) as client:
        async for chunk in _stream(client, body):
            text += delta_text(chunk)
            seen += 1
            if stalls_s is not None and seen > KILL_AFTER:
                stalls_s.append(clock.now() - at)
            at = clock.now()
            if seen == KILL_AFTER:
                await disturb()
            last = chunk
    return text, last


@pytest.mark.parametrize("model", [TINY, PACKAGED])
async def test_a_killed_decode_worker_is_replaced_in_mid_stream(
    model: str, tmp_path: Path, packaged_cache: Path
) -> None:
    body = chat_body(model, "Tell me about rivers.", max_tokens=TOKENS[model], ignore_eos=True)
    plan: dict[str, Any] = {"decode": 2, "environments": SLOW if model == TINY else {}}
    async with mesh_of(tmp_path, model=model, cache_dir=packaged_cache, **plan) as mesh:

        async def nothing() -> None:
            return

        async def kill() -> None:
            (await _running_on(mesh)).process.kill()

        undisturbed, _ = await _disturbed(mesh, body, nothing)
        stalls_s: list[float] = []
        text, last = await _disturbed(mesh, body, kill, stalls_s)
        assert text == undisturbed
        assert max(stalls_s) < STALL_S[model]
        assert last["covey"]["migrations"] == 1
        assert last["usage"]["completion_tokens"] == TOKENS[model]


async def test_a_frozen_decode_worker_is_replaced_and_its_late_tokens_are_dropped(tmp_path: Path) -> None:
    body = chat_body(TINY, "Tell me about rivers.", max_tokens=TOKENS[TINY], ignore_eos=True)
    async with mesh_of(tmp_path, decode=2, environments=SLOW) as mesh:
        frozen: list[Child] = []

        async def freeze() -> None:
            frozen.append(await _running_on(mesh))
            frozen[0].process.send_signal(signal.SIGSTOP)

        async def nothing() -> None:
            return

        undisturbed, _ = await _disturbed(mesh, body, nothing)
        try:
            text, last = await _disturbed(mesh, body, freeze)
        finally:
            frozen[0].process.send_signal(signal.SIGCONT)
        assert text == undisturbed
        assert last["covey"]["migrations"] == 1
        async with probing(mesh) as probe:  # the zombie notices that nobody reads, and lets go
            await assert_eventually(probe.holds_nothing, timeout_s=20)


@pytest.mark.parametrize("model", [TINY, PACKAGED])
async def test_a_prefill_worker_killed_before_hand_over_is_retried(
    model: str, tmp_path: Path, packaged_cache: Path
) -> None:
    body = chat_body(model, "Tell me about rivers. " * 6, max_tokens=12, ignore_eos=True)
    crash = {"prefill-0": {"COVEY_FAILPOINTS": "prefill.before_handover=crash@1"}}
    settings = ("gateway.routing.split=always",)
    plan: dict[str, Any] = {"prefill": 2, "settings": settings, "environments": crash}
    async with mesh_of(tmp_path, model=model, cache_dir=packaged_cache, **plan) as mesh:
        texts = set()
        async with client_of(mesh) as client:
            for _ in range(4):  # until routing has tried both workers
                response = await client.post("/v1/chat/completions", json=body)
                assert response.status_code == httpx.codes.OK, response.text
                texts.add(response.json()["choices"][0]["message"]["content"])
                if not mesh.children["prefill-0"].running:
                    break
        assert not mesh.children["prefill-0"].running, "the failpoint was never reached"
        assert len(texts) == 1


async def test_a_restart_of_nats_does_not_touch_a_running_stream(tmp_path: Path) -> None:
    body = chat_body(TINY, "Tell me about rivers.", max_tokens=TOKENS[TINY], ignore_eos=True)
    async with mesh_of(tmp_path, environments=SLOW) as mesh:

        async def nothing() -> None:
            return

        async def restart() -> None:
            killed = mesh.nats.pid
            os.kill(killed, signal.SIGKILL)
            await assert_eventually(lambda: mesh.nats.pid != killed, timeout_s=20)

        undisturbed, _ = await _disturbed(mesh, body, nothing)
        text, last = await _disturbed(mesh, body, restart)
        assert text == undisturbed
        assert last["covey"]["migrations"] == 0
        again, _ = await _disturbed(mesh, body, nothing)
        assert again == undisturbed


async def test_prefill_killed_under_three_requests_costs_time_only_and_no_worker_at_all_is_a_503(
    tmp_path: Path,
) -> None:
    settings = ("gateway.routing.split=always", "prefill.max_batch_tokens=80", "prefill.max_running=16")
    slow = {f"prefill-{i}": {"COVEY_FAILPOINTS": "engine.after_step=sleep(0.05)"} for i in range(2)}
    bodies = [chat_body(TINY, f"Tell me about river {i}. " * 20, max_tokens=12, ignore_eos=True) for i in range(3)]
    async with mesh_of(tmp_path, prefill=2, settings=settings, environments=slow) as mesh, client_of(mesh) as client:
        answers: dict[int, httpx.Response] = {}

        async def ask(index: int) -> None:
            answers[index] = await client.post("/v1/chat/completions", json=bodies[index])

        async with anyio.create_task_group() as tg:
            for index in range(3):
                tg.start_soon(ask, index)
            busy = await _prefilling(mesh)
            busy.process.kill()
        disturbed = {index: answers[index].json() for index in range(3)}
        assert [answer.status_code for answer in answers.values()] == [httpx.codes.OK] * 3
        assert sum(answer["covey"]["migrations"] for answer in disturbed.values()) >= 1
        for index in range(3):
            await ask(index)
            assert answers[index].json()["choices"] == disturbed[index]["choices"]
        for name, child in mesh.children.items():
            if name.startswith(("prefill", "decode")) and child.running:
                child.process.kill()
        await ask(0)
        assert answers[0].status_code == httpx.codes.SERVICE_UNAVAILABLE
        assert int(answers[0].headers["retry-after"]) >= 1


async def _prefilling(mesh: Mesh) -> Child:
    """A prefill worker that has a request."""
    async with probing(mesh) as probe:
        with anyio.fail_after(30):
            while True:
                for name in probe.names("prefill"):
                    if (await probe.load(name)).running:
                        return mesh.children[name]
