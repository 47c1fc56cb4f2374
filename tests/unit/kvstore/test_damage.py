"""Damage in a real kvstore's arena: whatever is flipped, zeroed or swapped is a quarantined miss."""

from __future__ import annotations

import pytest

from covey.net.kv.held import StoreHeld
from covey.policy.slot import payload_offset
from tests.contract.kv_stores import StoreProcess, flip_byte
from tests.contract.test_block_store import SHAPE, buffers, chain, content, find, key, names, put
from tests.support.kv_state import stats

from .connection import connected


@pytest.mark.parametrize("where_flipped", ["magic", "generation", "checksum", "payload", "last layer"])
async def test_any_damage_is_a_quarantined_miss(process: StoreProcess, transport: str, where_flipped: str) -> None:
    async with connected(process, transport) as (client, channel):
        where, blocks = key(), chain(3)
        await put(client, where, blocks, content(3))
        held = await find(client, where, blocks)
        assert isinstance(held, StoreHeld)
        at = {
            "magic": 0,
            "generation": 16,
            "checksum": 104 + 8,
            "payload": payload_offset(SHAPE),
            "last layer": payload_offset(SHAPE) + SHAPE.size_bytes - 1,
        }
        before = (await stats(channel)).quarantined
        flip_byte(process.arena, held.locations[1].offset + at[where_flipped])
        assert await client.load(held, buffers(3)) == 1
        assert (await stats(channel)).quarantined == before + 1
        assert list((await find(client, where, blocks)).hashes) == names(blocks[:1])


async def test_a_zeroed_header_is_a_quarantined_miss(process: StoreProcess, transport: str) -> None:
    async with connected(process, transport) as (client, channel):
        where, blocks = key(), chain(1)
        await put(client, where, blocks, content(1))
        held = await find(client, where, blocks)
        assert isinstance(held, StoreHeld)
        before = (await stats(channel)).quarantined
        with process.arena.open("r+b") as file:
            file.seek(held.locations[0].offset + 50)
            file.write(bytes(200))
        assert await client.load(held, buffers(1)) == 0
        assert (await stats(channel)).quarantined == before + 1


async def test_swapped_slots_are_noticed(process: StoreProcess, transport: str) -> None:
    async with connected(process, transport) as (client, _):
        where, blocks = key(), chain(2)
        await put(client, where, blocks, content(2))
        held = await find(client, where, blocks)
        assert isinstance(held, StoreHeld)
        one, two = (location.offset for location in held.locations)
        size = payload_offset(SHAPE) + SHAPE.size_bytes
        with process.arena.open("r+b") as file:
            file.seek(one)
            first = file.read(size)
            file.seek(two)
            second = file.read(size)
            file.seek(one)
            file.write(second)
            file.seek(two)
            file.write(first)
        assert await client.load(held, buffers(2)) == 0
