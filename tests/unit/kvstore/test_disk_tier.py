"""The disk tier over real files: restarts, torn writes, damage, bounds, a full disk."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from covey.clock import MonotonicClock
from covey.config import ConfigError
from covey.policy.disk_index import Spot
from covey.policy.disk_record import Record
from covey.types.block import BlockShape
from services.kvstore.tiers.disk import DiskLimits, DiskTier
from tests.support.records import SHAPE, names, new_chain, new_namespace

LIMITS = DiskLimits(capacity_bytes=4 << 20, segment_bytes=256 << 10)


@asynccontextmanager
async def opened(path: Path, limits: DiskLimits = LIMITS) -> AsyncIterator[DiskTier]:
    async with DiskTier.open(path, limits, clock=MonotonicClock(), seed=7) as tier:
        yield tier
        tier.index.check()


def spot_of(tier: DiskTier, record: Record) -> Spot:
    spot = tier.index.spot(record.namespace, record.hash)
    assert spot is not None
    return spot


def segment_file(directory: Path, number: int) -> Path:
    return directory / f"{number:08d}.kv"


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
    overwrite(path, offset, bytes([byte[0] ^ 1]))


async def test_files_are_ours_alone_and_so_is_the_directory(tmp_path: Path) -> None:
    async with opened(tmp_path / "tier") as tier:
        await tier.put(new_chain(3, new_namespace()), durable=True)
        for path in (tmp_path / "tier").iterdir():
            assert path.stat().st_mode & 0o777 == 0o600
        assert (tmp_path / "tier").stat().st_mode & 0o777 == 0o700
        with pytest.raises(ConfigError, match="another kvstore"):
            async with opened(tmp_path / "tier"):
                pass


async def test_a_block_whose_parent_is_not_here_is_not_taken(tmp_path: Path) -> None:
    async with opened(tmp_path) as tier:
        chain = new_chain(3, new_namespace())
        assert await tier.put(chain[1:], durable=False) == 0
        assert tier.counts.refused == 2
        assert await tier.put(chain, durable=False) == 3


async def test_one_tenant_may_not_take_it_all(tmp_path: Path) -> None:
    async with opened(tmp_path, replace(LIMITS, tenant_bytes=64 << 10)) as tier:
        greedy = new_chain(10, new_namespace(), tenant="greedy")
        assert 0 < await tier.put(greedy, durable=False) < 10
        modest = new_chain(3, new_namespace(), tenant="modest")
        assert await tier.put(modest, durable=False) == 3


@pytest.mark.parametrize("damage", ["head", "payload", "last byte", "truncated", "swapped records", "zeroed"])
async def test_damage_under_a_running_tier_is_a_quarantined_miss(tmp_path: Path, damage: str) -> None:
    async with opened(tmp_path) as tier:
        namespace = new_namespace()
        chain = new_chain(4, namespace)
        await tier.put(chain, durable=True)
        one, two = spot_of(tier, chain[1]), spot_of(tier, chain[2])
        path = segment_file(tmp_path, two.segment)
        data = path.read_bytes()
        match damage:
            case "head":
                flip(path, two.offset + 30)
            case "payload":
                flip(path, two.offset + 4096)
            case "last byte":
                head_bytes = data[two.offset :].find(bytes(chain[2].payload))
                flip(path, two.offset + head_bytes + SHAPE.size_bytes - 1)
            case "truncated":
                os.truncate(path, two.offset + 5000)
            case "zeroed":
                overwrite(path, two.offset, bytes(two.size_bytes))
            case _:
                overwrite(path, one.offset, data[two.offset : two.offset + two.size_bytes])
                overwrite(path, two.offset, data[one.offset : one.offset + one.size_bytes])
        assert await tier.get(namespace, chain[2].hash) is None
        assert tier.counts.quarantined == 1
        assert await tier.prefix(namespace, names(chain)) == 2, "nor is what grows from it served"
        assert await tier.get(namespace, chain[3].hash) is None
        good = await tier.get(namespace, chain[0].hash)
        assert good is not None
        assert good.payload == chain[0].payload
    async with opened(tmp_path) as tier:
        assert await tier.prefix(namespace, names(chain)) == (1 if damage == "swapped records" else 2)


async def test_two_files_that_were_swapped_serve_nothing(tmp_path: Path) -> None:
    namespace = new_namespace()
    chain = new_chain(40, namespace)
    async with opened(tmp_path) as tier:
        assert await tier.put(chain, durable=True) == 40
        assert tier.index.segments == (1, 2)
    first, second = segment_file(tmp_path, 1), segment_file(tmp_path, 2)
    first.rename(tmp_path / "aside")
    second.rename(first)
    (tmp_path / "aside").rename(second)
    async with opened(tmp_path) as tier:
        assert await tier.prefix(namespace, names(chain)) == 0
        assert tier.counts.quarantined >= 2
        assert await tier.put(chain, durable=False) == 40
        assert await tier.prefix(namespace, names(chain)) == 40


async def test_damage_while_nobody_ran_costs_what_was_hit_and_grows_from_it(tmp_path: Path) -> None:
    namespace = new_namespace()
    chain, other = new_chain(6, namespace), new_chain(6, namespace)
    async with opened(tmp_path) as tier:
        await tier.put(chain, durable=True)
        await tier.put(other, durable=True)
        hit = spot_of(tier, chain[3])
    flip(segment_file(tmp_path, hit.segment), hit.offset + 3)
    async with opened(tmp_path) as tier:
        assert tier.counts.quarantined == 1
        assert await tier.prefix(namespace, names(chain)) == 3
        assert await tier.prefix(namespace, names(other)) == 6, "a scan finds its way past a bad head"


@pytest.mark.parametrize("cut", [1, 4096, 9000])
async def test_a_write_cut_short_is_cut_off_and_the_rest_is_there(tmp_path: Path, cut: int) -> None:
    namespace = new_namespace()
    chain = new_chain(5, namespace)
    async with opened(tmp_path) as tier:
        await tier.put(chain, durable=True)
        last = spot_of(tier, chain[4])
    os.truncate(segment_file(tmp_path, last.segment), last.offset + cut)
    async with opened(tmp_path) as tier:
        assert await tier.prefix(namespace, names(chain)) == 4
        assert segment_file(tmp_path, last.segment).stat().st_size == last.offset
        assert await tier.put(chain, durable=True) == 5
    async with opened(tmp_path) as tier:
        assert await tier.prefix(namespace, names(chain)) == 5


async def test_what_was_removed_stays_removed_after_a_restart(tmp_path: Path) -> None:
    namespace = new_namespace()
    chain = new_chain(4, namespace)
    async with opened(tmp_path) as tier:
        await tier.put(chain, durable=True)
        assert await tier.remove(namespace, [chain[2].hash]) == 1
    async with opened(tmp_path) as tier:
        assert await tier.prefix(namespace, names(chain)) == 2
        assert tier.counts.quarantined == 0


async def test_the_tier_stays_within_its_bytes_and_keeps_what_is_used(tmp_path: Path) -> None:
    limits = DiskLimits(capacity_bytes=2 << 20, segment_bytes=256 << 10)
    namespace = new_namespace()
    async with opened(tmp_path, limits) as tier:
        hot = new_chain(4, namespace)
        assert await tier.put(hot, durable=False) == 4
        cold = [new_chain(4, namespace) for _ in range(80)]
        for chain in cold:
            assert await tier.put(chain, durable=False) == 4
            assert await tier.prefix(namespace, names(hot)) == 4, "used all the time"
            assert tier.index.total_bytes <= limits.capacity_bytes
            on_disk = sum(path.stat().st_size for path in tmp_path.glob("*.kv"))
            assert on_disk == tier.index.total_bytes
        assert tier.counts.dropped > 100
        assert await tier.prefix(namespace, names(cold[-1])) == 4
        assert await tier.prefix(namespace, names(cold[0])) == 0
        read = await tier.get(namespace, hot[3].hash)
        assert read is not None
        assert read.payload == hot[3].payload
    async with opened(tmp_path, limits) as tier:
        assert await tier.prefix(namespace, names(hot)) == 4, "the copy forward is found"


async def test_a_block_larger_than_a_segment_has_one_to_itself_and_one_larger_than_all_is_refused(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path) as tier:
        namespace = new_namespace()
        large = new_chain(3, namespace, shape=BlockShape(size_bytes=1 << 20, layers=2))
        assert await tier.put(large, durable=True) == 3
        huge = new_chain(1, namespace, shape=BlockShape(size_bytes=8 << 20, layers=2))
        assert await tier.put(huge, durable=True) == 0
        assert tier.stats().writable


async def test_a_scrub_finds_what_nobody_has_read(tmp_path: Path) -> None:
    async with opened(tmp_path) as tier:
        namespace = new_namespace()
        chain = new_chain(30, namespace)
        await tier.put(chain, durable=True)
        spot = spot_of(tier, chain[20])
        flip(segment_file(tmp_path, spot.segment), spot.offset + 5000)
        seen: list[None] = []
        assert await tier.scrub(lambda: seen.append(None)) == 1
        assert len(seen) >= 20
        assert tier.counts.quarantined == 1
        assert await tier.prefix(namespace, names(chain)) == 20


async def test_reads_go_on_while_segments_are_given_up(tmp_path: Path) -> None:
    limits = DiskLimits(capacity_bytes=1 << 20, segment_bytes=128 << 10)
    async with opened(tmp_path, limits) as tier:
        namespace = new_namespace()
        chains = [new_chain(3, namespace) for _ in range(60)]

        async def read() -> None:
            for chain in chains:
                for each in chain:
                    found = await tier.get(namespace, each.hash)
                    assert found is None or found.payload == each.payload

        async with anyio.create_task_group() as tg:
            for _ in range(3):
                tg.start_soon(read)
            for chain in chains:
                await tier.put(chain, durable=False)
        assert tier.counts.quarantined == 0


async def test_a_cancelled_put_leaves_file_and_index_agreeing(tmp_path: Path) -> None:
    async with opened(tmp_path) as tier:
        namespace = new_namespace()
        for delay_s in (0.0, 0.001, 0.003):
            with anyio.move_on_after(delay_s):
                await tier.put(new_chain(40, namespace), durable=True)
        tier.index.check()
        sizes = sum(path.stat().st_size for path in tmp_path.glob("*.kv"))
        assert sizes == tier.index.total_bytes


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount, umount = shutil.which("mount"), shutil.which("umount")
    command = [str(mount), "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(path)]
    if not (mount and umount) or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a tmpfs")
    yield path
    subprocess.run([str(umount), "--lazy", str(path)], check=True)


@pytest.mark.faults
async def test_a_full_disk_stops_writes_not_reads_and_room_brings_them_back(small_disk: Path) -> None:
    async with opened(small_disk / "tier") as tier:
        namespace = new_namespace()
        others = small_disk / "others"
        others.write_bytes(bytes(1 << 20))
        chain = new_chain(100, namespace)
        taken = await tier.put(chain, durable=True)
        assert 10 < taken < 100
        assert not tier.stats().writable
        assert "full" in tier.why_read_only
        assert await tier.put(new_chain(1, namespace), durable=False) == 0
        await tier.heal()
        assert not tier.stats().writable, "nothing has changed"
        for each in chain[:taken]:
            read = await tier.get(namespace, each.hash)
            assert read is not None
            assert read.payload == each.payload
        others.unlink()
        await tier.heal()
        assert tier.stats().writable
        assert await tier.put(chain, durable=True) > taken
    async with opened(small_disk / "tier") as tier:
        assert await tier.prefix(namespace, names(chain)) > taken
        assert tier.counts.quarantined == 0, "no half record was left behind"
