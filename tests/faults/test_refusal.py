"""Decode refuses after prefill is done: the client hears it, and what prefill had stored for it is free at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from covey.testing import assert_eventually
from tests.support.meshes import TINY, chat_body, client_of, mesh_of
from tests.support.probe import Held, Probe, probing

pytestmark = [pytest.mark.faults, pytest.mark.timeout(120)]

SETTINGS = (
    "gateway.routing.split=always",
    "gateway.dispatch.queue_wait_s=1.0",
    "prefill.handover_ttl_s=60",
    "decode.max_running=1",
    "decode.queue_max=1",
)
SLOW = {"decode-0": {"COVEY_FAILPOINTS": "engine.after_step=sleep(0.05)"}}


def body(name: str, **options: Any) -> dict[str, Any]:
    return chat_body(TINY, f"Tell me about {name}. " * 8, max_tokens=800, ignore_eos=True, **options)


async def test_a_refused_hand_over_frees_prefill_and_store_at_once(tmp_path: Path) -> None:
    async with (
        mesh_of(tmp_path, settings=SETTINGS, environments=SLOW) as mesh,
        client_of(mesh) as client,
        probing(mesh) as probe,
    ):
        async with anyio.create_task_group() as tg:
            tg.start_soon(_keep_reading, client, body("lakes", stream=True))
            await assert_eventually(lambda: _decode_has(probe, 1), timeout_s=20)
            tg.start_soon(_keep_reading, client, body("seas", stream=True))
            await assert_eventually(lambda: _decode_has(probe, 2), timeout_s=20)  # one runs, one waits: it is full
            before, computed = await probe.held(), await _prefilled(probe)
            response = await client.post("/v1/chat/completions", json=body("rivers"))
            assert response.status_code == httpx.codes.SERVICE_UNAVAILABLE, response.text
            assert int(response.headers["retry-after"]) >= 1
            assert await _prefilled(probe) > computed, "it was refused after its prefill"
            await assert_eventually(lambda: _is_as(probe, before), timeout_s=2)
            tg.cancel_scope.cancel()
        await assert_eventually(probe.holds_nothing, timeout_s=10)


async def _keep_reading(client: httpx.AsyncClient, request: dict[str, Any]) -> None:
    async with client.stream("POST", "/v1/chat/completions", json=request) as response:
        async for _ in response.aiter_lines():
            pass


async def _prefilled(probe: Probe) -> int:
    return (await probe.engine_counts("prefill-0"))["computed_tokens"]


async def _decode_has(probe: Probe, requests: int) -> bool:
    load = await probe.load("decode-0")
    return load.running + load.waiting == requests


async def _is_as(probe: Probe, before: Held) -> bool:
    held = await probe.held()
    return (
        held.leases <= before.leases
        and held.store_blocks <= before.store_blocks
        and ((await probe.load("prefill-0")).running == 0)
    )
