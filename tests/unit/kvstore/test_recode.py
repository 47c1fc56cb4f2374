"""RECODE at a real node: readers keep what they hold, those who name the codec read the new version, others a miss."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import anyio
import numpy as np
import pytest

from covey.codec.methods import KvStore
from covey.compression import Codebook, Codec, Fp16, Int8, Pq4, decode, encode
from covey.net.kv import KvClient
from covey.net.rpc import Channel, Channels
from covey.types.block import BlockCodec, BlockShape
from covey.types.common import Empty
from covey.types.ids import BlockHash, NamespaceId, TenantId
from covey.types.kv import BlockKey
from covey.types.kv_state import KvEventKind, StartTask, TaskKind, TaskRequest, TaskState, TaskStatus, WatchKvRequest
from covey.types.store import StoreKey
from tests.contract.kv_stores import StoreProcess, client_of, flip_byte, store_process
from tests.unit.compression.blocks import codebook_for, payload_for, shape_of

SHAPE = shape_of(layers=3, heads=2, width=16, tokens=32)
BOOK = codebook_for(SHAPE)
WIDE = BlockShape(size_bytes=3 * 4096, layers=3)
CODECS: dict[BlockCodec, Codec] = {BlockCodec.FP16: Fp16(), BlockCodec.INT8: Int8(), BlockCodec.PQ4: Pq4(BOOK)}


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreProcess]:
    folder = tmp_path_factory.mktemp("recode")
    (folder / "book.pq").write_bytes(BOOK.to_bytes())
    sets = (f"codecs.codebook={folder / 'book.pq'}", "codecs.error_max=1.0")
    with store_process(folder, *sets) as process:
        yield process


@asynccontextmanager
async def clients(
    process: StoreProcess, *codecs: BlockCodec, transport: str = "auto", book: Codebook | None = BOOK
) -> AsyncIterator[tuple[KvClient, KvClient, Channel]]:
    """A client that takes exact blocks only, and one that takes `codecs`."""
    async with Channels.open() as channels:
        exact = client_of(process, channels, transport)
        lossy = client_of(process, channels, transport, codecs=codecs, codebook=book)
        yield exact, lossy, channels.to(process.address)


def place(shape: BlockShape = SHAPE) -> StoreKey:
    return StoreKey(tenant=TenantId("t"), namespace=NamespaceId(secrets.token_bytes(16)), shape=shape)


async def stored(client: KvClient, key: StoreKey, count: int) -> tuple[list[BlockHash], list[bytes]]:
    """Write a chain, and let go of it."""
    names = [BlockHash(secrets.token_bytes(16)) for _ in range(count)]
    blocks = [BlockKey(hash=name, parent=names[i - 1] if i else BlockHash(b"")) for i, name in enumerate(names)]
    data = [bytes(payload_for(SHAPE, seed) if key.shape is SHAPE else bytes(WIDE.size_bytes)) for seed in range(count)]
    held = await client.store(key, blocks, [memoryview(each) for each in data], owner="w", ttl_s=20)
    await held.release()
    return names, data


async def read(client: KvClient, key: StoreKey, names: list[BlockHash]) -> list[bytes]:
    """The good prefix of a chain."""
    held = await client.lookup(key, names, owner="r", ttl_s=20)
    into = [memoryview(bytearray(key.shape.size_bytes)) for _ in held.hashes]
    told: list[int] = []
    good = await client.load(held, into, ready=told.append)
    assert good < len(into) or not into or told[-1] == key.shape.layers
    await held.release()
    return [bytes(each) for each in into[:good]]


async def recoded(channel: Channel, key: StoreKey, codec: BlockCodec, *names: BlockHash) -> TaskStatus:
    """Run a task to its end."""
    return await finished(
        channel,
        StartTask(kind=TaskKind.RECODE, tenant=key.tenant, namespace=key.namespace, hashes=names, codec=codec),
    )


async def finished(channel: Channel, task: StartTask) -> TaskStatus:
    status = await channel.call(KvStore.START, task, timeout_s=5)
    with anyio.fail_after(20):
        while status.state is TaskState.RUNNING:
            await anyio.sleep(0.01)
            status = await channel.call(KvStore.GET_TASK, TaskRequest(task=status.task), timeout_s=5)
    return status


def through(codec: BlockCodec, payload: bytes) -> bytes:
    out = bytearray(len(payload))
    decode(CODECS[codec], encode(CODECS[codec], payload, SHAPE), SHAPE, memoryview(out))
    return bytes(out)


@pytest.mark.parametrize("transport", ["shm", "grpc", "tcp"])
@pytest.mark.parametrize("codec", list(CODECS))
async def test_who_names_the_codec_reads_it_and_others_miss(
    node: StoreProcess, codec: BlockCodec, transport: str
) -> None:
    async with clients(node, codec, transport=transport) as (exact, lossy, channel):
        key = place()
        names, data = await stored(exact, key, 4)
        before = await exact.lookup(key, names, owner="early", ttl_s=20)
        status = await recoded(channel, key, codec)
        assert (status.state, status.done, status.total) == (TaskState.DONE, 3, 3), status.why
        assert "3 recoded" in status.why

        into = [memoryview(bytearray(SHAPE.size_bytes)) for _ in names]
        assert await exact.load(before, into) == 4, "who held the old version reads it to the end"
        assert [bytes(each) for each in into] == data
        await before.release()

        assert await read(exact, key, names) == []
        assert await read(lossy, key, names) == [*(through(codec, each) for each in data[:3]), data[3]]


async def test_only_the_blocks_that_were_named_change(node: StoreProcess) -> None:
    async with clients(node, BlockCodec.INT8) as (exact, lossy, channel):
        key = place()
        names, data = await stored(exact, key, 4)
        assert (await recoded(channel, key, BlockCodec.INT8, *names[1:3])).why == "1 recoded"
        assert await read(exact, key, names) == data[:1]
        found = await read(lossy, key, names)
        assert found == [data[0], through(BlockCodec.INT8, data[1]), *data[2:]]


async def test_watchers_are_told_and_the_old_slots_are_free(node: StoreProcess) -> None:
    async with clients(node, BlockCodec.INT8) as (exact, _, channel):
        key = place()
        names, _ = await stored(exact, key, 3)
        async with channel.stream(KvStore.WATCH, WatchKvRequest(), timeout_s=20) as events:
            await recoded(channel, key, BlockCodec.INT8)
            seen: set[BlockHash] = set()
            async for event in events:
                if event.kind is KvEventKind.RECODED and event.namespace == key.namespace:
                    seen |= set(event.hashes)
                if len(seen) == 2:
                    break
        assert seen == set(names[:2])


async def test_a_second_codec_takes_what_the_first_left(node: StoreProcess) -> None:
    async with clients(node, BlockCodec.FP16, BlockCodec.PQ4) as (exact, lossy, channel):
        key = place()
        names, data = await stored(exact, key, 2)
        await recoded(channel, key, BlockCodec.FP16)
        assert (await recoded(channel, key, BlockCodec.PQ4)).why == "1 recoded"
        assert (await recoded(channel, key, BlockCodec.INT8)).why == "nothing to recode", "nothing comes back"
        assert await read(lossy, key, names) == [through(BlockCodec.PQ4, through(BlockCodec.FP16, data[0])), data[1]]


async def test_another_codebook_is_a_miss_and_no_fault_of_the_block(node: StoreProcess) -> None:
    async with clients(node, BlockCodec.PQ4, book=codebook_for(SHAPE, seed=9)) as (exact, other, channel):
        key = place()
        names, _ = await stored(exact, key, 3)
        await recoded(channel, key, BlockCodec.PQ4)
        assert await read(other, key, names) == []
        async with clients(node, BlockCodec.PQ4) as (_, right, _):
            assert len(await read(right, key, names)) == 3


async def test_a_damaged_block_is_quarantined_and_not_encoded(node: StoreProcess) -> None:
    async with clients(node, BlockCodec.INT8) as (exact, lossy, channel):
        key = place()
        names, data = await stored(exact, key, 3)
        held = await exact.lookup(key, names, owner="r", ttl_s=20)
        flip_byte(node.arena, held.locations[1].offset + 4000)  # type: ignore[attr-defined]
        await held.release()
        assert (await recoded(channel, key, BlockCodec.INT8)).why == "1 damaged, 1 recoded"
        assert await read(lossy, key, names) == [through(BlockCodec.INT8, data[0])]


async def test_an_encoded_block_that_is_damaged_is_quarantined(node: StoreProcess) -> None:
    async with clients(node, BlockCodec.INT8) as (exact, lossy, channel):
        key = place()
        names, _ = await stored(exact, key, 3)
        await recoded(channel, key, BlockCodec.INT8)
        held = await lossy.lookup(key, names, owner="r", ttl_s=20)
        flip_byte(node.arena, held.locations[1].offset + 1000)  # type: ignore[attr-defined]
        await held.release()
        assert len(await read(lossy, key, names)) == 1
        assert len((await lossy.lookup(key, names, owner="r", ttl_s=1)).hashes) == 1


async def test_a_write_of_the_exact_numbers_replaces_a_lossy_version(node: StoreProcess) -> None:
    async with clients(node, BlockCodec.INT8) as (exact, lossy, channel):
        key = place()
        names, data = await stored(exact, key, 3)
        await recoded(channel, key, BlockCodec.INT8)
        blocks = [BlockKey(hash=name, parent=names[i - 1] if i else BlockHash(b"")) for i, name in enumerate(names)]
        held = await exact.store(key, blocks, [memoryview(each) for each in data], owner="w", ttl_s=20)
        assert list(held.hashes) == names
        await held.release()
        assert await read(exact, key, names) == data
        assert await read(lossy, key, names) == data


async def test_blocks_without_known_numbers_stay(node: StoreProcess) -> None:
    async with clients(node) as (exact, _, channel):
        key = place(WIDE)
        names, data = await stored(exact, key, 2)
        assert (await recoded(channel, key, BlockCodec.INT8)).why == "nothing to recode"
        assert await read(exact, key, names) == data


async def test_xquant_is_refused(node: StoreProcess) -> None:
    async with clients(node) as (_, _, channel):
        status = await recoded(channel, place(), BlockCodec.XQUANT)
        assert (status.state, "layer inputs" in status.why) == (TaskState.FAILED, True)


async def test_a_budget_of_quality_keeps_blocks_exact(tmp_path: Path) -> None:
    with store_process(tmp_path, "codecs.error_max=0.001") as process:
        async with clients(process, BlockCodec.FP16, BlockCodec.INT8) as (exact, lossy, channel):
            key = place()
            names, data = await stored(exact, key, 2)
            assert (await recoded(channel, key, BlockCodec.INT8)).why == "1 over the error budget"
            assert (await recoded(channel, key, BlockCodec.PQ4)).state is TaskState.FAILED, "no codebook here"
            assert await read(exact, key, names) == data
            assert (await recoded(channel, key, BlockCodec.FP16)).why == "1 recoded"
            assert np.allclose(
                np.frombuffer((await read(lossy, key, names))[0], "<f4"), np.frombuffer(data[0], "<f4"), rtol=2e-3
            )


async def test_a_cancelled_task_leaves_every_block_in_one_version_and_nothing_held(tmp_path: Path) -> None:
    process = StoreProcess(tmp_path, "codecs.recent_blocks=0")
    process.start(env={"COVEY_FAILPOINTS": "kvstore.recode=sleep(30)@2"})
    try:
        async with clients(process, BlockCodec.INT8) as (exact, lossy, channel):
            key = place()
            names, data = await stored(exact, key, 3)
            before = await channel.call(KvStore.STATS, Empty(), timeout_s=5)
            task = StartTask(kind=TaskKind.RECODE, tenant=key.tenant, namespace=key.namespace, codec=BlockCodec.INT8)
            status = await channel.call(KvStore.START, task, timeout_s=5)
            with anyio.fail_after(10):
                while (await channel.call(KvStore.GET_TASK, TaskRequest(task=status.task), timeout_s=5)).done < 1:
                    await anyio.sleep(0.01)
            expected = [through(BlockCodec.INT8, data[0]), *data[1:]]
            assert await read(lossy, key, names) == expected, "amid the second block"
            await channel.call(KvStore.CANCEL_TASK, TaskRequest(task=status.task), timeout_s=5)
            with anyio.fail_after(10):
                while status.state is TaskState.RUNNING:
                    await anyio.sleep(0.01)
                    status = await channel.call(KvStore.GET_TASK, TaskRequest(task=status.task), timeout_s=5)
            assert (status.state, status.done) == (TaskState.CANCELLED, 1)
            assert await read(lossy, key, names) == expected
            after = await channel.call(KvStore.STATS, Empty(), timeout_s=5)
            assert (after.leases, after.leased_blocks, after.blocks) == (0, 0, 3)
            assert after.used_bytes < before.used_bytes
    finally:
        process.stop()


async def test_a_full_arena_is_recoded_as_the_policy_of_its_tier_says(tmp_path: Path) -> None:
    sets = ("codecs.memory=INT8", "codecs.memory_above=0", "codecs.memory_every_s=0.05", "codecs.tenants.u=RAW")
    with store_process(tmp_path, *sets) as process:
        async with clients(process, BlockCodec.INT8) as (exact, lossy, _):
            kept = replace(place(), tenant=TenantId("u"))
            kept_names, kept_data = await stored(exact, kept, 3)
            key = place()
            names, data = await stored(exact, key, 3)
            with anyio.fail_after(10):
                while len(await read(exact, key, names)) > 0:
                    await anyio.sleep(0.02)
            expected = [*(through(BlockCodec.INT8, each) for each in data[:2]), data[2]]
            with anyio.fail_after(10):
                while await read(lossy, key, names) != expected:
                    await anyio.sleep(0.02)
            assert await read(exact, kept, kept_names) == kept_data, "a tenant that is exempt"


async def test_blocks_are_encoded_on_their_way_to_disk_and_come_up_in_that_codec(tmp_path: Path) -> None:
    with store_process(tmp_path, f"disk.path={tmp_path / 'disk'}", "codecs.disk=INT8") as process:
        async with clients(process, BlockCodec.INT8) as (exact, lossy, channel):
            key = place()
            names, data = await stored(exact, key, 3)
            for kind in (TaskKind.DEMOTE, TaskKind.PREFETCH):
                task = StartTask(kind=kind, tenant=key.tenant, namespace=key.namespace, hashes=tuple(names))
                status = await finished(channel, task)
                assert status.state is TaskState.DONE, status.why
            assert await read(exact, key, names) == []
            assert await read(lossy, key, names) == [through(BlockCodec.INT8, each) for each in data]
