"""The contract of `BlockStore`, held by the double and by a real kvstore through shared memory and gRPC."""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest

from covey.clock import MonotonicClock
from covey.errors import InvalidArgument, LayoutMismatch, LeaseExpired, NoSpace, Unavailable
from covey.testing import assert_eventually
from covey.types.block import BlockShape
from covey.types.ids import BlockHash, NamespaceId, TenantId
from covey.types.kv import BlockKey, ReserveRequest
from covey.types.store import BlockStore, Held, StoreKey

from .kv_stores import CAPACITY_BYTES, KINDS, StoreProcess, Subject, memory_subject, process_subject, store_process

SHAPE = BlockShape(size_bytes=3 * 40_000, layers=3)
LARGE = BlockShape(size_bytes=3 << 20, layers=4)


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreProcess]:
    with store_process(tmp_path_factory.mktemp("kvstore"), "capacity_bytes=134217728") as process:
        yield process


@pytest.fixture
def own(tmp_path: Path) -> Iterator[StoreProcess]:
    with store_process(tmp_path) as process:
        yield process


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@asynccontextmanager
async def subject(kind: str, process: StoreProcess) -> AsyncIterator[Subject]:
    if kind == "memory":
        yield memory_subject()
    else:
        async with process_subject(process, kind) as it:
            yield it


def key(shape: BlockShape = SHAPE) -> StoreKey:
    return StoreKey(tenant=TenantId("t"), namespace=NamespaceId(secrets.token_bytes(16)), shape=shape)


def chain(count: int, parent: bytes = b"") -> list[BlockKey]:
    names = [BlockHash(secrets.token_bytes(16)) for _ in range(count)]
    return [BlockKey(hash=n, parent=BlockHash(names[i - 1] if i else parent)) for i, n in enumerate(names)]


def content(count: int, shape: BlockShape = SHAPE) -> list[memoryview]:
    return [memoryview(os.urandom(shape.size_bytes)) for _ in range(count)]


def buffers(count: int, shape: BlockShape = SHAPE) -> list[memoryview]:
    return [memoryview(bytearray(shape.size_bytes)) for _ in range(count)]


def names(blocks: list[BlockKey]) -> list[BlockHash]:
    return [block.hash for block in blocks]


async def put(
    store: BlockStore, where: StoreKey, blocks: list[BlockKey], data: list[memoryview], *, ttl_s: float = 20.0,
    private: bool = False,
) -> Held:  # fmt: skip
    return await store.store(where, blocks, data, owner="writer", ttl_s=ttl_s, private=private)


async def find(store: BlockStore, where: StoreKey, blocks: list[BlockKey], *, ttl_s: float = 20.0) -> Held:
    return await store.lookup(where, names(blocks), owner="reader", ttl_s=ttl_s)


async def test_what_was_stored_comes_back(kind: str, own: StoreProcess) -> None:
    async with subject(kind, own) as it:
        where, blocks = key(LARGE), chain(4)
        data = content(4, LARGE)
        written = await put(it.store, where, blocks, data)
        assert list(written.hashes) == names(blocks)
        held = await find(it.other, where, blocks)
        into = buffers(4, LARGE)
        assert await it.other.load(held, into) == 4
        assert into == data
        await held.release()
        await held.release()
        await written.release()
        assert (await it.stats()).leased_blocks == 0


async def test_what_a_writer_or_a_pin_holds_can_be_loaded(kind: str, process: StoreProcess) -> None:
    async with subject(kind, process) as it:
        where, blocks = key(), chain(3)
        data = content(3)
        written = await put(it.store, where, blocks, data)
        into = buffers(3)
        assert await it.store.load(written, into) == 3
        assert into == data
        pinned = await it.store.pin(where, names(blocks[:2]), owner="tool", ttl_s=5.0)
        into = buffers(2)
        assert await it.store.load(pinned, into) == 2
        assert into == data[:2]
        await pinned.release()


async def test_a_shape_of_many_dimensions_is_taken_as_it_lies(kind: str, process: StoreProcess) -> None:
    async with subject(kind, process) as it:
        where, blocks = key(), chain(1)
        data = content(1)
        await put(it.store, where, blocks, [data[0].cast("B", (3, 40_000))])
        into = memoryview(bytearray(SHAPE.size_bytes))
        floats: memoryview[Any] = into.cast("f")
        assert await it.store.load(await find(it.store, where, blocks), [floats]) == 1
        assert into == data[0]


async def test_layers_come_one_by_one_over_all_blocks(kind: str, process: StoreProcess) -> None:
    async with subject(kind, process) as it:
        where, blocks = key(LARGE), chain(3)
        data = content(3, LARGE)
        await put(it.store, where, blocks, data)
        into, layer_bytes = buffers(3, LARGE), LARGE.size_bytes // LARGE.layers
        told: list[int] = []

        def ready(layers: int) -> None:
            told.append(layers)
            end = layers * layer_bytes
            assert [view[:end] for view in into] == [view[:end] for view in data], "these layers are there"
            assert not any(any(view[end:]) for view in into), "and no later one"

        held = await find(it.store, where, blocks)
        assert await it.store.load(held, into, ready=ready) == 3
        assert told == [1, 2, 3, 4]
        pinned = await it.store.pin(where, names(blocks), owner="tool", ttl_s=5.0)
        told.clear()
        assert await it.store.load(pinned, buffers(3, LARGE), ready=told.append) == 3
        assert told == [1, 2, 3, 4], "also for what a pin holds"


async def test_a_damaged_layer_ends_the_good_prefix_at_its_block(kind: str, process: StoreProcess) -> None:
    async with subject(kind, process) as it:
        where, blocks = key(), chain(4)
        data = content(4)
        await put(it.store, where, blocks, data)
        await it.flip(await it.locate(where, blocks[2].hash), at=SHAPE.size_bytes // SHAPE.layers)
        told: list[int] = []
        into = buffers(4)
        assert await it.store.load(await find(it.store, where, blocks), into, ready=told.append) == 2
        assert told == [1], "the first layer of every block was good, the second was not"
        assert into[:2] == data[:2], "what is good is whole"
        assert list((await find(it.store, where, blocks)).hashes) == names(blocks[:2])


async def test_a_lookup_is_prefix_closed_and_a_miss_is_nothing(kind: str, process: StoreProcess) -> None:
    async with subject(kind, process) as it:
        where, blocks = key(), chain(6)
        assert (await find(it.store, where, blocks)).hashes == ()
        await put(it.store, where, blocks[:3], content(3))
        assert list((await find(it.store, where, blocks)).hashes) == names(blocks[:3])
        strange = [*blocks[:2], *chain(1), *blocks[2:]]
        assert list((await find(it.store, where, strange)).hashes) == names(blocks[:2])
        assert (await find(it.store, key(), blocks)).hashes == (), "another namespace sees nothing"
        assert await it.store.load(await find(it.store, where, chain(2)), []) == 0


async def test_a_chain_can_be_continued(kind: str, process: StoreProcess) -> None:
    async with subject(kind, process) as it:
        where, blocks = key(), chain(5)
        await put(it.store, where, blocks[:2], content(2))
        await put(it.store, where, blocks[2:], content(3))
        assert len((await find(it.other, where, blocks)).hashes) == 5
        with pytest.raises(Unavailable):
            await put(it.store, where, chain(1, parent=secrets.token_bytes(16)), content(1))
        assert (await it.stats()).reserved_blocks == 0


async def test_blocks_that_are_there_are_not_written_again(kind: str, process: StoreProcess) -> None:
    async with subject(kind, process) as it:
        where, blocks = key(), chain(2)
        data = content(2)
        await put(it.store, where, blocks, data)
        await put(it.other, where, blocks, content(2))
        into = buffers(2)
        assert await it.store.load(await find(it.store, where, blocks), into) == 2
        assert into == data


async def test_a_flipped_byte_is_a_miss_and_never_served(kind: str, process: StoreProcess) -> None:
    async with subject(kind, process) as it:
        where, blocks = key(), chain(4)
        await put(it.store, where, blocks, content(4))
        before = (await it.stats()).quarantined
        await it.flip(await it.locate(where, blocks[2].hash))
        held = await find(it.store, where, blocks)
        assert len(held.hashes) == 4
        assert await it.store.load(held, buffers(4)) == 2
        assert list((await find(it.store, where, blocks)).hashes) == names(blocks[:2])
        assert (await it.stats()).quarantined == before + 1
        data = content(2)
        await put(it.store, where, blocks[2:], data)
        into = buffers(4)
        assert await it.store.load(await find(it.store, where, blocks), into) == 4, "it can be stored anew"
        assert into[2:] == data


async def test_a_lease_ends_by_itself_and_what_is_read_under_it_is_refused(kind: str, own: StoreProcess) -> None:
    async with subject(kind, own) as it:
        where, blocks = key(), chain(2)
        await (await put(it.store, where, blocks, content(2))).release()
        held = await find(it.store, where, blocks, ttl_s=0.2)
        assert (await it.stats()).leased_blocks >= 2

        async def ended() -> bool:
            return bool((await it.stats()).leased_blocks == 0)

        await assert_eventually(ended, 5.0)
        with pytest.raises(LeaseExpired):
            await it.store.load(held, buffers(2))
        await held.release()


async def test_a_released_lease_reads_nothing(kind: str, process: StoreProcess) -> None:
    async with subject(kind, process) as it:
        where, blocks = key(), chain(1)
        await put(it.store, where, blocks, content(1))
        held = await find(it.store, where, blocks)
        await held.release()
        with pytest.raises(LeaseExpired):
            await it.store.load(held, buffers(1))


async def test_another_layout_is_refused(kind: str, process: StoreProcess) -> None:
    async with subject(kind, process) as it:
        where, blocks = key(), chain(1)
        await put(it.store, where, blocks, content(1))
        wrong = replace(where, shape=BlockShape(size_bytes=SHAPE.size_bytes, layers=2))
        with pytest.raises(LayoutMismatch):
            await find(it.store, wrong, blocks)
        with pytest.raises(LayoutMismatch):
            await put(it.store, wrong, chain(1), content(1))
        with pytest.raises(InvalidArgument):
            await put(it.store, where, chain(1), [memoryview(b"too short")])
        with pytest.raises(InvalidArgument):
            await it.store.load(await find(it.store, where, blocks), [memoryview(bytearray(7))])


async def test_private_blocks_vanish_with_their_last_lease(kind: str, process: StoreProcess) -> None:
    async with subject(kind, process) as it:
        where, blocks = key(), chain(2)
        await put(it.store, where, blocks, content(2))
        tail = chain(1, parent=blocks[1].hash)
        data = content(1)
        writer = await put(it.store, where, tail, data, private=True)
        reader = await find(it.other, where, [*blocks, *tail])
        assert len(reader.hashes) == 3
        await writer.release()
        into = buffers(3)
        assert await it.other.load(reader, into) == 3
        assert into[2] == data[0]
        await reader.release()
        assert len((await find(it.store, where, [*blocks, *tail])).hashes) == 2
        assert (await it.stats()).private_blocks == 0


async def test_a_writer_that_dies_leaves_its_blocks_to_the_next(kind: str, process: StoreProcess) -> None:
    async with subject(kind, process) as it:
        where, blocks = key(), chain(3)
        dead = ReserveRequest(
            tenant=where.tenant,
            namespace=where.namespace,
            blocks=tuple(blocks[:2]),
            shape=SHAPE,
            owner="dead",
            ttl_s=0.4,
        )
        await it.reserve(dead)
        clock = MonotonicClock()
        started = clock.now()
        data = content(3)
        held = await put(it.store, where, blocks, data, ttl_s=5.0)
        assert 0.3 < clock.now() - started < 3.0, "it waited for the lease to end, not longer"
        into = buffers(3)
        assert list(held.hashes) == names(blocks)
        assert await it.store.load(await find(it.store, where, blocks), into) == 3
        assert into == data


async def test_a_wait_for_another_writer_ends(kind: str, process: StoreProcess) -> None:
    async with subject(kind, process) as it:
        where, blocks = key(), chain(1)
        slow = ReserveRequest(
            tenant=where.tenant, namespace=where.namespace, blocks=tuple(blocks), shape=SHAPE, owner="slow", ttl_s=3.0
        )
        await it.reserve(slow)
        with anyio.fail_after(2.0), pytest.raises(Unavailable):
            await put(it.store, where, blocks, content(1), ttl_s=0.3)


async def test_two_clients_write_each_block_once(kind: str, process: StoreProcess) -> None:
    async with subject(kind, process) as it:
        where, blocks = key(), chain(8)
        data = content(8)
        before = (await it.stats()).blocks
        held: list[Held] = []

        async def write(store: BlockStore, count: int) -> None:
            held.append(await put(store, where, blocks[:count], data[:count]))

        async with anyio.create_task_group() as tg:
            for store, count in ((it.store, 6), (it.other, 8), (it.store, 8), (it.other, 3)):
                tg.start_soon(write, store, count)
        assert sorted(len(each.hashes) for each in held) == [3, 6, 8, 8]
        assert (await it.stats()).blocks == before + 8
        into = buffers(8)
        assert await it.store.load(await find(it.store, where, blocks), into) == 8
        assert into == data


async def test_pins_keep_blocks_and_end_by_themselves(kind: str, own: StoreProcess) -> None:
    async with subject(kind, own) as it:
        where, blocks = key(), chain(2)
        await (await put(it.store, where, blocks, content(2))).release()
        pinned = await it.store.pin(where, names([*blocks, *chain(1)]), owner="tool", ttl_s=0.5)
        assert list(pinned.hashes) == names(blocks)
        assert (await it.stats()).pinned_blocks == 2
        assert (await it.store.pin(where, names(chain(1)), owner="tool", ttl_s=1.0)).hashes == ()

        async def unpinned() -> bool:
            return bool((await it.stats()).pinned_blocks == 0)

        await assert_eventually(unpinned, 1.5)
        early = await it.store.pin(where, names(blocks), owner="tool", ttl_s=60.0)
        await early.release()
        assert (await it.stats()).pinned_blocks == 0


async def test_no_space_is_typed_and_leaves_nothing_reserved(kind: str, own: StoreProcess) -> None:
    async with subject(kind, own) as it:
        where = key(LARGE)
        fit = CAPACITY_BYTES // (4 << 20)
        kept = chain(fit)
        await put(it.store, where, kept, content(fit, LARGE))
        before = await it.stats()
        for count in (1, fit, 10_000 if kind == "memory" else 64):
            with pytest.raises(NoSpace):
                await put(it.store, where, chain(count), content(1, LARGE) * count)
        after = await it.stats()
        assert (after.reserved_blocks, after.leases, after.used_bytes) == (0, before.leases, before.used_bytes)
        assert len((await find(it.store, where, kept)).hashes) == fit


async def test_unleased_blocks_make_room(kind: str, own: StoreProcess) -> None:
    async with subject(kind, own) as it:
        where = key(LARGE)
        for _ in range(8):
            blocks = chain(3)
            await (await put(it.store, where, blocks, content(3, LARGE))).release()
            assert len((await find(it.store, where, blocks, ttl_s=0.01)).hashes) == 3
        stats = await it.stats()
        assert stats.evictions >= 15
        assert stats.used_bytes <= CAPACITY_BYTES
