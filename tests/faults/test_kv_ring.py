"""kvstore nodes die, freeze, join and leave: readers go on elsewhere or miss, and blocks go where they belong."""

from __future__ import annotations

import signal
from pathlib import Path

import anyio
import pytest

from covey.clock import MonotonicClock
from covey.errors import Unavailable
from covey.types.ids import WorkerId
from covey.types.kv import AckLevel
from covey.types.kv_state import TaskKind, TaskState
from tests.support.kv_mesh import Chain, KvMesh, chain_of, kv_mesh
from tests.unit.kvstore.test_tiers_process import write

pytestmark = [pytest.mark.faults, pytest.mark.timeout(120)]

CLOCK = MonotonicClock()


async def _owned_by(mesh: KvMesh, name: str, count: int = 1, blocks: int = 4) -> list[Chain]:
    """Chains whose owner is this node."""
    found: list[Chain] = []
    while len(found) < count:
        chain = chain_of(blocks)
        if mesh.holders(chain)[0] == name:
            found.append(chain)
    return found


async def test_a_killed_node_of_three_with_two_replicas_costs_no_block_and_the_copies_are_made_again(
    tmp_path: Path,
) -> None:
    async with kv_mesh(tmp_path, "replicas=2") as mesh:
        client, version = mesh.client(), mesh.version
        chains = [chain_of(4) for _ in range(12)]
        for chain in chains:
            await chain.put(client)
        await mesh.until_copied(chains)
        assert await mesh.client("grpc").lookup(chains[0].key, chains[0].names, owner="r", ttl_s=5)
        victim = mesh.holders(chains[0])[0]
        mesh.nodes[victim].kill()
        began = CLOCK.now()
        assert [await chain.read(client) for chain in chains] == [4] * 12
        assert CLOCK.now() - began < 3.0
        survivors = sorted(mesh.nodes.keys() - {victim})
        await mesh.until_members(*survivors)
        assert mesh.version == version + 1
        await mesh.until_copied(chains)
        assert [await chain.read(mesh.client("grpc")) for chain in chains] == [4] * 12
        again = survivors[0]
        mesh.nodes[again].kill()
        await mesh.start(again)  # before anybody missed it: another life, with an empty memory
        await mesh.until_copied(chains)
        assert mesh.version > version + 1
        await mesh.until_members(*survivors)
        assert [await chain.read(client) for chain in chains] == [4] * 12


async def test_a_killed_node_without_replicas_is_misses_only_and_hits_recover_as_blocks_are_written_again(
    tmp_path: Path,
) -> None:
    async with kv_mesh(tmp_path) as mesh:
        client = mesh.client()
        chains = [chain_of(4) for _ in range(12)]
        for chain in chains:
            await chain.put(client)
        victim = mesh.holders(chains[0])[0]
        lost = [mesh.holders(chain)[0] == victim for chain in chains]
        mesh.nodes[victim].kill()
        assert [await chain.read(client) for chain in chains] == [0 if gone else 4 for gone in lost]
        for chain in chains:
            await chain.put(client)
        assert [await chain.read(client) for chain in chains] == [4] * 12
        await mesh.until_members(*(mesh.nodes.keys() - {victim}))
        assert [await chain.read(client) for chain in chains] == [4] * 12


@pytest.mark.parametrize("transport", ["auto", "grpc"])
async def test_a_frozen_node_is_noticed_within_the_call_timeout_and_may_come_back(
    transport: str, tmp_path: Path
) -> None:
    async with kv_mesh(tmp_path, "replicas=2") as mesh:
        client = mesh.client(transport, call_timeout_s=0.5, stall_timeout_s=0.5)
        chain = (await _owned_by(mesh, "kv-1"))[0]
        await chain.put(client)
        await mesh.until_copied([chain])
        held = await chain.find(client)
        mesh.nodes["kv-1"].signal(signal.SIGSTOP)
        try:
            began = CLOCK.now()
            assert await client.load(held, into := chain.buffers()) == 4  # in mid-read: from memory, or another node
            assert into == chain.data
            assert CLOCK.now() - began < 2.5
            began = CLOCK.now()
            assert await chain.read(client) == 4
            assert CLOCK.now() - began < 1.0
            other = (await _owned_by(mesh, "kv-1"))[0]
            began = CLOCK.now()
            await other.put(client)
            assert CLOCK.now() - began < 2.0
            assert await other.read(client) == 4
            await mesh.until_members("kv-0", "kv-2")
        finally:
            mesh.nodes["kv-1"].signal(signal.SIGCONT)
        await mesh.until_members("kv-0", "kv-1", "kv-2")
        assert await chain.read(client) == await other.read(client) == 4


async def test_a_fourth_node_gets_its_share_and_nothing_moves_between_the_others(tmp_path: Path) -> None:
    async with kv_mesh(tmp_path) as mesh:
        client = mesh.client()
        chains = [chain_of(2) for _ in range(60)]
        async with anyio.create_task_group() as tg:
            for chain in chains:
                tg.start_soon(chain.put, client)
        before = await mesh.blocks()
        owners = {chain.root: mesh.holders(chain)[0] for chain in chains}
        await mesh.start("kv-3")
        await mesh.until_members("kv-0", "kv-1", "kv-2", "kv-3")
        moving = [chain for chain in chains if mesh.holders(chain)[0] != owners[chain.root]]
        assert {mesh.holders(chain)[0] for chain in moving} == {"kv-3"}

        await mesh.until_copied(chains)
        after = await mesh.blocks()
        assert after["kv-3"] == 2 * len(moving)
        assert all(after[name] <= before[name] for name in before), "only the new node gained blocks"
        assert [await chain.read(client) for chain in chains] == [2] * 60


async def test_a_node_that_is_told_to_stop_hands_its_blocks_over_and_exits_with_0(tmp_path: Path) -> None:
    async with kv_mesh(tmp_path, "drain_s=8") as mesh:
        client = mesh.client()
        chains = [chain_of(4) for _ in range(12)]
        for chain in chains:
            await chain.put(client)
        leaver = mesh.holders(chains[0])[0]
        own = sum(mesh.holders(chain)[0] == leaver for chain in chains)
        assert own
        assert await anyio.to_thread.run_sync(mesh.nodes[leaver].stop) == 0
        assert [await chain.read(client) for chain in chains] == [4] * 12
        await mesh.until_members(*(mesh.nodes.keys() - {leaver}))


async def test_tasks_replicate_move_and_drain(tmp_path: Path) -> None:
    async with kv_mesh(tmp_path) as mesh:
        client = mesh.client()
        first, second = await _owned_by(mesh, "kv-0", 2)
        for chain in (first, second):
            await chain.put(client)
        where = {"namespace": first.key.namespace, "hashes": tuple(first.names)}
        status = await mesh.run_task("kv-0", TaskKind.REPLICATE, replicas=2, **where)
        assert status.state is TaskState.DONE, status
        assert sorted((await mesh.blocks()).values()) == [0, 4, 8]
        nobody = await mesh.run_task("kv-0", TaskKind.MOVE, to="kv-9", **where)
        assert (await mesh.stats("kv-0")).blocks == 8, nobody
        moved = await mesh.run_task("kv-0", TaskKind.MOVE, to="kv-2", **where)
        assert (moved.state, moved.done) == (TaskState.DONE, 4)
        assert (await mesh.blocks())["kv-0"] == 4
        drained = await mesh.run_task("kv-0", TaskKind.DRAIN)
        assert drained.state is TaskState.DONE, drained
        assert "4 of 4" in drained.why
        direct = mesh.client()
        with pytest.raises(Unavailable):
            await direct.store_on(WorkerId("kv-0"), second.key, chain_of(1).blocks, first.data[:1], owner="w", ttl_s=5)
        assert await second.read(direct) == 4
        await mesh.until_members("kv-1", "kv-2")
        assert await second.read(client) == 4


async def test_a_replicated_commit_is_answered_once_the_copies_are_there(tmp_path: Path) -> None:
    async with kv_mesh(tmp_path, "replicas=2", "copy_timeout_s=1.5") as mesh:
        chain = (await _owned_by(mesh, "kv-0"))[0]
        await write(mesh.channel("kv-0"), chain.key, chain.blocks, chain.data, AckLevel.REPLICATED)
        (second,) = set(mesh.holders(chain)) - {"kv-0"}
        copy = await mesh.client().lookup_on(WorkerId(second), chain.key, chain.names, owner="r", ttl_s=5)
        assert len(copy.hashes) == 4
        other = (await _owned_by(mesh, "kv-0"))[0]
        while mesh.holders(other) != ["kv-0", second]:
            other = (await _owned_by(mesh, "kv-0"))[0]
        mesh.nodes[second].signal(signal.SIGSTOP)
        try:
            with pytest.raises(Unavailable, match="stored here"):
                await write(mesh.channel("kv-0"), other.key, other.blocks, other.data, AckLevel.REPLICATED)
            assert await other.read(mesh.client()) == 4
        finally:
            mesh.nodes[second].signal(signal.SIGCONT)


async def test_a_ring_outlives_nats_and_is_changed_when_it_is_back(tmp_path: Path) -> None:
    async with kv_mesh(tmp_path) as mesh:
        client, version = mesh.client(), mesh.version
        chain = (await _owned_by(mesh, "kv-0"))[0]
        await chain.put(client)
        await mesh.nats.kill()
        assert await chain.read(client) == 4
        other = chain_of(3)
        await other.put(client)
        assert await other.read(client) == 3
        mesh.nodes["kv-2"].kill()
        await mesh.nats.start()
        await mesh.until_members("kv-0", "kv-1", timeout_s=30)
        assert mesh.version == version + 1
        assert await chain.read(client) == 4
