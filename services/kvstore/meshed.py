"""A node among others: its place in the registry, its part in the ring, its copies, and how it leaves."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Final

import anyio

from covey.actor import Ref
from covey.codec import encode
from covey.net.bus import Bus
from covey.net.kv import KvClient, KvClientConfig, StoreNode, nodes_of
from covey.net.kv.agreed import AgreedRing
from covey.net.kv.copier import Copier
from covey.net.kv_events import kv_subject
from covey.net.registry import Announcement, Registry
from covey.net.tasks import background_tasks
from covey.runtime import Runtime
from covey.types.event import WorkerState
from covey.types.generate import EngineLoad, Role
from covey.types.kv import StoreInfo
from covey.types.kv_state import KvEvent, StartTask, StoreStats, TaskKind

from .config import Config
from .replication import Replication
from .ring import RingKeeper
from .spreading import Spreader
from .store import Command, Store
from .tasks import Handler, Progress

LEAVE_SHARE: Final = 0.8
"""Of the time to drain: the rest is for calls under way."""


class Meshed:
    """What a node does with others. Own it with `meshed`; `announced` makes it known."""

    def __init__(
        self, config: Config, rt: Runtime, store: Store, actor: Ref[Command[object]], bus: Bus, registry: Registry,
        ring: AgreedRing,
    ) -> None:  # fmt: skip
        self._config = config
        self._rt = rt
        self._store = store
        self._bus = bus
        self._known = nodes_of(registry)
        self._self: StoreNode | None = None
        settings = KvClientConfig(cold_wait_s=0.0)  # copies are of what is in memory, and need not be there too
        client = KvClient(
            self._nodes, rt.channels, clock=rt.clock, boot_id=rt.host, config=settings, agreed=lambda: ring.current
        )
        copier = Copier(client, rt.worker, config.copy_limits())
        self._keeper = RingKeeper(
            registry, ring, worker=rt.worker, replicas=config.replicas, clock=rt.clock, limits=config.ring_limits()
        )
        self.replication = Replication(store.log, Spreader(actor, copier), ring, rt.worker)
        self._announcement: Announcement | None = None

    def handlers(self) -> Mapping[TaskKind, Handler]:
        """Return the kinds of tasks that need other nodes."""
        return {
            TaskKind.REPLICATE: self.replication.replicate,
            TaskKind.MOVE: self.replication.move,
            TaskKind.DRAIN: self._drain,
        }

    def stats(self, stats: StoreStats) -> StoreStats:
        """Return statistics completed by what is known of other nodes."""
        return self.replication.with_ring(stats)

    @asynccontextmanager
    async def announced(self, address: str, info: StoreInfo) -> AsyncIterator[None]:
        """Be known to the mesh for a block, copy and move what the ring asks for, and take part in agreeing on it."""
        self._self = StoreNode(
            worker=self._rt.worker, address=address, capacity_bytes=info.arena_bytes, host=self._rt.host
        )
        async with background_tasks() as tg:
            tg.start_soon(self._store.log.forward, self._publish, name="kv events")
            announce = self._rt.announce(self._bus, Role.KVSTORE, address, store=info, load=self._load)
            async with announce as self._announcement:
                tg.start_soon(self._keeper.run, name="kv ring")
                tg.start_soon(self.replication.follow, name="kv copies")
                tg.start_soon(self.replication.settle, name="kv moves")
                yield

    async def leave(self) -> str:
        """Take no more writes and bring the blocks to the other nodes, within a share of `drain_s`."""
        with anyio.move_on_after(LEAVE_SHARE * self._config.drain_s):
            return await self._drain(StartTask(kind=TaskKind.DRAIN), Progress())
        return "not all of them, for drain_s was over"

    async def _drain(self, _: StartTask, progress: Progress) -> str:
        self._store.draining = True
        if self._announcement is not None:
            self._announcement.update(state=WorkerState.DRAINING)
        return await self.replication.leave(progress)

    def _nodes(self) -> tuple[StoreNode, ...]:
        known = self._known()
        if self._self is None or any(node.worker == self._rt.worker for node in known):
            return known
        return (*known, self._self)

    def _load(self) -> EngineLoad:
        stats = self._store.index.stats()
        total = self._config.blocks_max
        return EngineLoad(
            pinned_blocks=stats.pinned_blocks, cached_blocks=stats.blocks, total_blocks=total,
            free_blocks=total - stats.blocks, draining=self._store.draining or self._store.log.closed,
        )  # fmt: skip

    async def _publish(self, event: KvEvent) -> None:
        await self._bus.publish(kv_subject(Role.KVSTORE, self._rt.worker), encode(event))


@asynccontextmanager
async def meshed(
    config: Config, rt: Runtime, store: Store, actor: Ref[Command[object]]
) -> AsyncIterator[Meshed | None]:
    """Join the mesh for a block; None with `nats = ""`: the node stands alone. Raises `Unavailable` without NATS."""
    if not config.nats:
        yield None
        return
    async with (
        rt.bus() as bus,
        rt.registry(bus) as registry,
        AgreedRing.open(bus, clock=rt.clock) as ring,
    ):
        yield Meshed(config, rt, store, actor, bus, registry, ring)
