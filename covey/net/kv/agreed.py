"""The ring that all nodes and clients share: one record in a bucket, replaced only over the revision one knows."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Final, Self

import anyio

from covey.clock import Clock
from covey.codec import decode, encode
from covey.errors import CoveyError, Fenced, InvalidArgument, Unavailable
from covey.net.bus import Bucket, Bus, KvChange
from covey.net.tasks import background_tasks
from covey.policy.ring import is_newer
from covey.types.ids import WorkerId
from covey.types.kv_state import RingMember, RingVersion

BUCKET: Final = "covey-kv-ring"
KEY: Final = "ring"
REFRESH_S: Final = 2.0
"""A change that the watch did not bring is seen after this long."""
CALL_TIMEOUT_S: Final = 5.0

log = logging.getLogger(__name__)


class AgreedRing:
    """The newest ring that this process has heard of. While NATS is away it stays as it was.

    The bucket is in memory: when NATS comes back empty, everybody who knows the ring publishes it again, clients
    too, so that its versions go on even if all nodes started anew meanwhile.
    """

    def __init__(self, bucket: Bucket, bus: Bus, *, clock: Clock) -> None:
        self.current: RingVersion | None = None
        self.adopted_at = clock.now()
        self.rejected = 0
        """Records that could not be read."""
        self._bucket = bucket
        self._bus = bus
        self._clock = clock
        self._changed = anyio.Event()

    @classmethod
    @asynccontextmanager
    async def open(cls, bus: Bus, *, clock: Clock) -> AsyncIterator[Self]:
        """Follow the ring for a block. Raises `Unavailable` when NATS is not there at the start."""
        bucket = await bus.kv(BUCKET, storage="memory")
        ring = cls(bucket, bus, clock=clock)
        async with bucket.watch() as changes:
            await ring.refresh()
            async with background_tasks() as tg:
                tg.start_soon(ring._follow, changes)
                tg.start_soon(ring._refresh_often)
                yield ring

    def gauges(self) -> Mapping[tuple[str, ...], float]:
        """Return what is known of the ring, by name, for metrics."""
        ring = self.current
        version, nodes = (ring.version, len(ring.members)) if ring is not None else (0, 0)
        return {("version",): float(version), ("nodes",): float(nodes)}

    async def changed(self) -> None:
        """Wait for the next version."""
        await self._changed.wait()

    async def propose(self, members: Sequence[RingMember], *, replicas: int, proposer: WorkerId) -> bool:
        """Put the next version in force; False when another one came first, or NATS does not answer."""
        known = self.current
        try:
            revision = await self.refresh()
            if self.current is not known:
                return False
            version = RingVersion(
                version=(known.version if known else 0) + 1,
                proposer=proposer,
                replicas=replicas,
                members=tuple(members),
            )
            with anyio.fail_after(CALL_TIMEOUT_S):
                await self._bucket.put(KEY, encode(version), revision=revision)
        except Fenced:
            return False
        except (CoveyError, TimeoutError) as error:
            log.info("ring not changed: %s", error)
            return False
        self._adopt(version)
        return True

    async def refresh(self) -> int:
        """Read the bucket, adopt what is newer there, publish what is newer here; return the key's revision.

        Raises `Unavailable`, and `Fenced` when another one published meanwhile.
        """
        try:
            with anyio.fail_after(CALL_TIMEOUT_S):
                return await self._refresh()
        except TimeoutError as error:
            raise Unavailable("NATS does not answer for the ring", retry_after_ms=1000) from error

    async def _refresh(self) -> int:
        found = await self._bucket.get(KEY)
        stored = self._read(found) if found is not None else None
        if stored is not None and is_newer(stored, self.current):
            self._adopt(stored)
        revision = found.revision if found is not None else 0
        if self.current is not None and is_newer(self.current, stored):
            return await self._bucket.put(KEY, encode(self.current), revision=revision)
        return revision

    def _read(self, change: KvChange) -> RingVersion | None:
        try:
            version: RingVersion = decode(RingVersion, change.value)
        except InvalidArgument:
            self.rejected += 1
            return None
        return version

    def _adopt(self, version: RingVersion) -> None:
        self.current = version
        self.adopted_at = self._clock.now()
        self._changed.set()
        self._changed = anyio.Event()

    async def _follow(self, changes: AsyncIterator[KvChange]) -> None:
        """A watch hears refused values too: each one only says that it is time to read."""
        async for _ in changes:
            await self._try_refresh()

    async def _refresh_often(self) -> None:
        while True:
            await anyio.sleep(REFRESH_S)
            if not self._bus.connected:
                await self._bus.until_connected()
            await self._try_refresh()

    async def _try_refresh(self) -> None:
        try:
            await self.refresh()
        except CoveyError as error:
            log.info("ring not read: %s", error)
