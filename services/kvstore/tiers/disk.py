"""The disk tier: blocks in append-only segments of one directory, found again after a restart."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import anyio
from anyio import to_thread

from covey.clock import Clock
from covey.config import ConfigError
from covey.errors import DataCorrupt
from covey.policy.disk_index import DiskIndex, Spot
from covey.policy.disk_record import HEAD_BYTES_MAX, Record
from covey.types import block, kv_state
from covey.types.ids import BlockHash, NamespaceId

from .segment import Found, Segment, sync_directory
from .tier import ALL_CODECS, TierCounts

READERS_MAX = 4
COPY_SHARE = 0.3
"""At most this share of a segment is copied forward when the segment is given up."""
FREE_BYTES_MIN = 64 * 1024
"""Writing goes on when the file system has this, and the last record that did not fit, once again."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskLimits:
    """Bounds of a disk tier. `tenant_bytes` is what one tenant's blocks may take; 0: no limit of its own."""

    capacity_bytes: int
    segment_bytes: int
    blocks_max: int = 4_194_304
    tenant_bytes: int = 0


class DiskTier:
    """Owned by one event loop: the index changes there, files are touched in threads, one writer at a time.

    Fsync: a `durable` put answers after fdatasync; any other is on its way to the disk when the kernel likes.
    """

    kind = kv_state.Tier.DISK

    def __init__(self, directory: Path, limits: DiskLimits, *, clock: Clock, seed: int) -> None:
        self.counts = TierCounts()
        self.why_read_only = ""
        self.index = DiskIndex(blocks_max=limits.blocks_max, seed=seed)
        self._directory = directory
        self._limits = limits
        self._clock = clock
        self._segments: dict[int, Segment] = {}
        self._active: Segment | None = None
        self._last = 0
        self._unsynced: set[Segment] = set()
        self._wanted_bytes = 0
        self._writing = anyio.Lock()
        self._readers = anyio.CapacityLimiter(READERS_MAX)
        self._writers = anyio.CapacityLimiter(1)

    @classmethod
    @asynccontextmanager
    async def open(cls, directory: Path, limits: DiskLimits, *, clock: Clock, seed: int) -> AsyncIterator[Self]:
        """Own a directory for a block and find what is in it. Raises `ConfigError` when it cannot be had alone."""
        tier = cls(directory, limits, clock=clock, seed=seed)
        lock = await to_thread.run_sync(_own, directory)
        try:
            await tier._find()
            yield tier
        finally:
            for segment in tier._segments.values():
                segment.give_up(remove=False)
            os.close(lock)

    # -- the contract ------------------------------------------------------------

    async def put(self, records: Sequence[Record], *, durable: bool) -> int:
        async with self._writing:
            taken = 0
            for record in records:
                if self.index.spot(record.namespace, record.hash) is None and not await self._append(record):
                    break
                taken += 1
            self.counts.refused += len(records) - taken
            return taken if not durable or await self._sync() else 0

    async def get(self, namespace: NamespaceId, name: BlockHash) -> Record | None:
        self.counts.gets += 1
        spot = self.index.spot(namespace, name)
        if spot is None:
            return None
        with self._segments[spot.segment] as segment:
            try:
                record = await to_thread.run_sync(segment.read, spot, namespace, name, limiter=self._readers)
            except DataCorrupt as error:
                if self.index.spot(namespace, name) == spot:
                    await self._quarantine(self.index.remove(namespace, name), error)
                return None
        self.counts.hits += 1
        self.counts.got_bytes += len(record.payload)
        return record

    async def prefix(
        self, namespace: NamespaceId, hashes: Sequence[BlockHash], codecs: Sequence[block.BlockCodec] = ALL_CODECS
    ) -> int:
        count = self.index.prefix(namespace, hashes, codecs)
        if count:
            self.index.touch(namespace, hashes[count - 1], self._clock.now())
        return count

    def knows(self, namespace: NamespaceId, name: BlockHash) -> bool:
        return self.index.spot(namespace, name) is not None

    async def remove(self, namespace: NamespaceId, hashes: Sequence[BlockHash]) -> int:
        found, spots = 0, list[Spot]()
        for name in hashes:
            found += self.index.spot(namespace, name) is not None
            spots += self.index.remove(namespace, name)
        await self._kill(spots)
        return found

    async def scrub(self, step: Callable[[], None]) -> int:
        bad = 0
        for number in self.index.segments:
            for spot in self.index.live(number) if number in self._segments else ():
                segment = self._segments.get(number)
                if segment is None:
                    break
                with segment:
                    try:
                        await to_thread.run_sync(segment.verify, spot, limiter=self._readers)
                    except DataCorrupt as error:
                        spots = self.index.remove_at(spot)
                        bad += bool(spots)
                        await self._quarantine(spots, error)
                step()
        return bad

    async def heal(self) -> None:
        if not self.why_read_only:
            return
        free_bytes = await to_thread.run_sync(_free_bytes, self._directory)
        if free_bytes >= self._wanted_bytes + FREE_BYTES_MIN:
            log.warning("the disk tier takes writes again")
            self.why_read_only = ""

    def stats(self) -> kv_state.TierStats:
        return kv_state.TierStats(
            tier=self.kind, blocks=self.index.blocks, used_bytes=self.index.total_bytes,
            capacity_bytes=self._limits.capacity_bytes, writable=not self.why_read_only,
            why=self.why_read_only,
        )  # fmt: skip

    @property
    def index_bytes(self) -> int:
        return self.index.index_bytes

    # -- writing -----------------------------------------------------------------

    async def _append(self, record: Record) -> bool:
        limit = self._limits.tenant_bytes
        size_bytes = len(record.payload)
        if (
            self.why_read_only
            or not self.index.can_add(record.namespace, record.parent, record.tenant)
            or (limit and self.index.tenant_bytes(record.tenant) + size_bytes > limit)
        ):
            return False
        with anyio.CancelScope(shield=True):  # a file and its entry in the index belong together
            try:
                segment = await self._room(size_bytes)
                if segment is None or not self.index.can_add(record.namespace, record.parent, record.tenant):
                    return False
                spot = await to_thread.run_sync(segment.append, record, limiter=self._writers)
            except OSError as error:
                self._stop_writing(error, size_bytes)
                return False
            self._enter(record, spot)
        self.counts.puts += 1
        self.counts.put_bytes += size_bytes
        return True

    def _enter(self, record: Record, spot: Spot) -> None:
        self._unsynced.add(self._segments[spot.segment])
        self.index.grow(spot.segment, spot.size_bytes)
        self.index.add(
            record.namespace, record.hash, record.parent, spot, tenant=record.tenant, codec=record.header.codec,
            now=self._clock.now(),
        )  # fmt: skip

    async def _room(self, size_bytes: int) -> Segment | None:
        """Return the segment to append to; older ones are given up for it. None: larger than all that there may be."""
        if size_bytes + HEAD_BYTES_MAX + int(COPY_SHARE * self._limits.segment_bytes) > self._limits.capacity_bytes:
            return None
        if self._active is None or (self._active.end and self._active.end + size_bytes > self._limits.segment_bytes):
            await self._roll()
        spare_bytes = HEAD_BYTES_MAX + int(COPY_SHARE * self._limits.segment_bytes)
        while self.index.total_bytes + size_bytes + spare_bytes > self._limits.capacity_bytes:
            assert self._active is not None
            number = self.index.victim(self._active.number, self._clock.now())
            if number is None:  # all there is lies in the active one
                await self._roll()
                continue
            await self._give_up(self._segments[number])
        return self._active

    async def _roll(self) -> None:
        self._last += 1
        segment = await to_thread.run_sync(_new_segment, self._directory, self._last, limiter=self._writers)
        self._segments[segment.number] = self._active = segment
        self.index.open_segment(segment.number)

    async def _give_up(self, victim: Segment) -> None:
        """Drop a segment; what is worth it is copied into the active one first."""
        active = self._active
        assert active is not None
        copied = 0
        for spot in self.index.survivors(victim.number, int(COPY_SHARE * victim.end)):
            try:
                copied += await self._copy(victim, spot, active)
            except OSError as error:  # no room for a copy: what is given up makes some
                log.info("nothing more is copied out of %s: %s", victim.path.name, error.strerror)
                break
        if copied:
            self._unsynced.add(active)
            await self._sync()
        self._unsynced.discard(victim)
        self.counts.dropped += self.index.drop_segment(victim.number)
        del self._segments[victim.number]
        await to_thread.run_sync(lambda: victim.give_up(remove=True), limiter=self._writers)

    async def _copy(self, source: Segment, spot: Spot, target: Segment) -> bool:
        try:
            head = await to_thread.run_sync(source.verify, spot, limiter=self._writers)
            namespace, name = head.header.namespace, head.header.hash
            record = await to_thread.run_sync(source.read, spot, namespace, name, limiter=self._writers)
        except DataCorrupt:
            return False  # it goes with its segment
        new = await to_thread.run_sync(target.append, record, limiter=self._writers)
        self.index.grow(target.number, new.size_bytes)
        return self.index.move(namespace, name, spot, new)

    async def _sync(self) -> bool:
        """Sync all that was written, for what a block grows from must be as safe as the block."""
        while self._unsynced:
            segment = self._unsynced.pop()
            try:
                await to_thread.run_sync(segment.sync, limiter=self._writers)
            except OSError as error:
                self._unsynced.add(segment)
                self._stop_writing(error, 0)
                return False
        return True

    def _stop_writing(self, error: OSError, wanted_bytes: int) -> None:
        full = error.errno in {errno.ENOSPC, errno.EDQUOT}
        self.why_read_only = "the disk is full" if full else f"the disk does not take writes: {error.strerror}"
        self._wanted_bytes = wanted_bytes
        self.counts.failed += 1
        log.error("the disk tier is read-only: %s", self.why_read_only)

    # -- what is bad ---------------------------------------------------------------

    async def _quarantine(self, spots: Sequence[Spot], error: DataCorrupt) -> None:
        self.counts.quarantined += bool(spots)
        self.counts.dropped += max(0, len(spots) - 1)
        log.error("a block on disk is bad: %s; it and %d that grow from it are gone", error.message, len(spots) - 1)
        await self._kill(spots)

    async def _kill(self, spots: Sequence[Spot]) -> None:
        for spot in spots:
            segment = self._segments.get(spot.segment)
            if segment is not None:
                with segment:
                    await to_thread.run_sync(segment.kill, spot.offset, limiter=self._writers)

    # -- restart -------------------------------------------------------------------

    async def _find(self) -> None:
        """Enter what lies in the directory, a segment at a time; what has lost its parent stays out."""
        now = self._clock.now()
        numbers = await to_thread.run_sync(Segment.numbers, self._directory)
        waiting: dict[tuple[NamespaceId, BlockHash], Found] = {}
        for number in numbers:
            segment, found = await to_thread.run_sync(_scan, self._directory, number)
            self.counts.quarantined += segment.damaged
            self._last = number
            if not segment.end:
                continue  # nothing in it could be trusted; it is gone
            self._segments[number] = segment
            self.index.open_segment(number)
            self.index.grow(number, segment.end)
            used_at = max(0.0, now - (numbers[-1] - number))  # the older, the longer ago
            for each in found:
                if not self._take_in(each, used_at):
                    waiting[each.namespace, each.hash] = each
        for namespace, name in tuple(waiting):  # a parent that was copied forward stands after its children
            chain: list[Found] = []
            while (link := waiting.pop((namespace, name), None)) is not None:
                chain.append(link)
                name = link.parent  # noqa: PLW2901 - up to where the chain starts
            for link in reversed(chain):
                self._take_in(link, now)
        newest = self._segments.get(self._last)
        self._active = newest if newest is not None and newest.end < self._limits.segment_bytes else None

    def _take_in(self, found: Found, used_at: float) -> bool:
        if not self.index.can_add(found.namespace, found.parent, found.tenant):
            return False
        self.index.add(
            found.namespace, found.hash, found.parent, found.spot, tenant=found.tenant, codec=found.codec, now=used_at
        )  # fmt: skip
        return True


def _scan(directory: Path, number: int) -> tuple[Segment, list[Found]]:
    segment = Segment(directory, number, create=False)
    found = list(segment.scan())
    if not segment.end:
        segment.give_up(remove=True)
    return segment, found


def _new_segment(directory: Path, number: int) -> Segment:
    segment = Segment(directory, number, create=True)
    sync_directory(directory)
    return segment


def _own(directory: Path) -> int:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"cannot keep blocks in {directory}: {error.strerror}", field="disk.path") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise ConfigError(f"another kvstore keeps blocks in {directory}", field="disk.path") from error
    return fd


def _free_bytes(directory: Path) -> int:
    usage = os.statvfs(directory)
    return usage.f_bavail * usage.f_frsize
