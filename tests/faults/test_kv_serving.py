"""kvstores die, freeze and rot under a serving mesh: each request is answered, with the text of the undisturbed run."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from covey.cli.mesh import Mesh
from covey.codec.methods import KvStore
from covey.testing import assert_eventually
from covey.types.common import Empty
from covey.types.kv_state import StoreStats
from tests.support.meshes import PACKAGED, TINY, chat_body, client_of, mesh_of
from tests.support.probe import CALL_S, Probe, probing

pytestmark = [pytest.mark.faults, pytest.mark.timeout(180)]

KV_BLOCKS = {TINY: 48, PACKAGED: 9}


def _forgetful(model: str) -> tuple[str, ...]:
    """Engines with room for two or three prompts: what is asked again comes from the store."""
    count = KV_BLOCKS[model]
    return "gateway.routing.split=always", f"prefill.kv_blocks={count}", f"decode.kv_blocks={count}"


def _bodies(model: str, count: int) -> list[dict[str, Any]]:
    tokens = 12 if model == TINY else 6
    return [
        chat_body(model, f"Tell me about river number {i}. " * 12, max_tokens=tokens, ignore_eos=True)
        for i in range(count)
    ]


async def _ask_all(client: httpx.AsyncClient, bodies: list[dict[str, Any]]) -> tuple[list[str], int]:
    """Ask all at once; the texts, and how many tokens of prompts came from the store."""
    answers: dict[int, Any] = {}

    async def ask(i: int) -> None:
        response = await client.post("/v1/chat/completions", json=bodies[i])
        assert response.status_code == httpx.codes.OK, response.text
        answers[i] = response.json()

    async with anyio.create_task_group() as tg:
        for i in range(len(bodies)):
            tg.start_soon(ask, i)
    texts = [answers[i]["choices"][0]["message"]["content"] for i in range(len(bodies))]
    return texts, sum(answer["covey"]["loaded_tokens"] for answer in answers.values())


async def _stats(probe: Probe, name: str) -> StoreStats:
    return await probe.to(name).call(KvStore.STATS, Empty(), timeout_s=CALL_S)


async def _until_ring(probe: Probe, nodes: int) -> int:
    """Wait until all running stores agree on a ring of so many nodes; its version."""
    version = 0

    async def agreed() -> bool:
        nonlocal version
        stats = [await _stats(probe, name) for name in probe.names("kvstore")]
        version = stats[0].ring_version
        return {(s.ring_nodes, s.ring_version) for s in stats} == {(nodes, version)}

    await assert_eventually(agreed, timeout_s=20, every_s=0.1)
    return version


async def _fullest(probe: Probe) -> str:
    blocks = {name: (await _stats(probe, name)).blocks for name in probe.names("kvstore")}
    return max(blocks, key=lambda name: blocks[name])


async def test_a_store_killed_and_one_frozen_under_requests_with_two_replicas(tmp_path: Path) -> None:
    bodies = _bodies(TINY, 6)
    settings = (*_forgetful(TINY), "kvstore.replicas=2")
    async with (
        mesh_of(tmp_path, kvstore=3, settings=settings) as mesh,
        client_of(mesh) as client,
        probing(mesh) as probe,
    ):
        version = await _until_ring(probe, 3)
        golden, _ = await _ask_all(client, bodies)
        assert len(set(golden)) > 1
        again, loaded = await _ask_all(client, bodies)
        assert again == golden
        assert loaded > 0
        frozen = await _fullest(probe)
        mesh.children[frozen].process.send_signal(signal.SIGSTOP)
        try:
            texts, loaded = await _ask_all(client, bodies)
        finally:
            mesh.children[frozen].process.send_signal(signal.SIGCONT)
        assert texts == golden
        assert loaded > 0, "nothing came from the other stores"
        killed = await _fullest(probe)
        async with anyio.create_task_group() as tg:
            results: list[tuple[list[str], int]] = []

            async def ask() -> None:
                results.append(await _ask_all(client, bodies))

            tg.start_soon(ask)
            await assert_eventually(lambda: _is_busy(probe), timeout_s=10)
            mesh.children[killed].process.kill()
        assert results[0][0] == golden
        assert await _until_ring(probe, 2) > version
        texts, loaded = await _ask_all(client, bodies)
        assert texts == golden
        assert loaded > 0
        await assert_eventually(lambda: _knows_ring(probe, 2), timeout_s=10)
        await assert_eventually(probe.holds_nothing, timeout_s=15)


async def _is_busy(probe: Probe) -> bool:
    """Whether a request is at a worker; prompts that are stored already may skip prefill."""
    loads = [await probe.load(name) for name in ("prefill-0", "decode-0")]
    return any(load.running or load.waiting for load in loads)


async def _knows_ring(probe: Probe, nodes: int) -> bool:
    """Whether the engines go by a ring of so many nodes, as they tell in their metrics."""
    return {await probe.sample(name, "covey_kv_ring", "nodes") for name in ("prefill-0", "decode-0")} == {nodes}


@pytest.mark.parametrize("model", [TINY, PACKAGED])
async def test_without_replicas_a_lost_store_is_misses_and_rotten_blocks_are_computed_again(
    model: str, tmp_path: Path, packaged_cache: Path
) -> None:
    bodies = _bodies(model, 6 if model == TINY else 3)
    plan: dict[str, Any] = {"kvstore": 2, "settings": _forgetful(model), "cache_dir": packaged_cache}
    async with (
        mesh_of(tmp_path, model=model, **plan) as mesh,
        client_of(mesh) as client,
        probing(mesh) as probe,
    ):
        await _until_ring(probe, 2)
        golden, _ = await _ask_all(client, bodies)
        killed = await _fullest(probe)
        mesh.children[killed].process.kill()
        texts, _ = await _ask_all(client, bodies)
        assert texts == golden
        (left,) = probe.names("kvstore")
        texts, loaded = await _ask_all(client, bodies)  # written again, at the other node
        assert texts == golden
        assert loaded > 0
        rotten = await _rot(mesh, probe, left)
        before = (await _stats(probe, left)).quarantined
        texts, _ = await _ask_all(client, bodies)
        assert texts == golden
        assert rotten
        assert (await _stats(probe, left)).quarantined > before
        await assert_eventually(probe.holds_nothing, timeout_s=15)


async def test_a_prefill_worker_killed_between_reserve_and_commit_is_replaced_and_its_blocks_written(
    tmp_path: Path,
) -> None:
    bodies = _bodies(TINY, 6)
    crash = {"prefill-0": {"COVEY_FAILPOINTS": "kv.before_commit=crash@1"}}
    settings = (*_forgetful(TINY), "kvstore.cooling_s=0.5", "prefill.handover_ttl_s=4", "prefill.kv_timeout_s=2")
    async with (
        mesh_of(tmp_path, prefill=2, settings=settings, environments=crash) as mesh,
        client_of(mesh) as client,
        probing(mesh) as probe,
    ):
        disturbed, _ = await _ask_all(client, bodies)
        assert not mesh.children["prefill-0"].running, "the failpoint was never reached"
        texts, _ = await _ask_all(client, bodies)
        assert texts == disturbed
        await assert_eventually(probe.holds_nothing, timeout_s=20)
        texts, loaded = await _ask_all(client, bodies)
        assert texts == disturbed
        assert loaded > 0


async def _rot(mesh: Mesh, probe: Probe, name: str) -> int:
    """Flip a byte in every page of the store's arena that is in use."""
    info = await probe.to(name).call(KvStore.INFO, Empty(), timeout_s=CALL_S)
    return await anyio.to_thread.run_sync(_flip_pages, Path(info.arena_path))


def _flip_pages(path: Path, page: int = 4096) -> int:
    flipped = 0
    with path.open("r+b", buffering=0) as file:
        for at in range(0, path.stat().st_size, page):
            data = bytearray(file.read(page))
            if any(data):
                data[-1] ^= 0xFF
                file.seek(at)
                file.write(data)
                flipped += 1
            if at > 64 << 20:
                break
    return flipped
