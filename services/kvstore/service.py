"""A node of the KV store: an arena, an index in an actor, RPCs, and its place in the registry."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import astuple, fields

import anyio

from covey.actor import supervise
from covey.codec import encode
from covey.net.kv_events import kv_subject
from covey.policy.arena import Arena
from covey.policy.store_index import StoreIndex
from covey.runtime import Runtime
from covey.types.generate import EngineLoad, Role
from covey.types.kv import KvEvent, StoreInfo, StoreStats, TaskKind

from .arena_file import arena_file, choose_directory
from .config import Config
from .event_log import EventLog
from .servicer import Servicer
from .store import Store, StoreActor
from .tasks import Handler, Tasks

INBOX_CAPACITY = 1024


async def serve(config: Config, rt: Runtime) -> None:
    """Serve until stopped. With `nats = ""` the node stands alone: whoever knows its address uses it."""
    directory = choose_directory(config.arena_dir, rt.run_dir, config.capacity_bytes)
    layout = Arena(config.capacity_bytes)
    with arena_file(directory, f"{rt.worker}-{rt.epoch}", layout.capacity_bytes) as arena:
        index = StoreIndex(arena=layout, epoch=rt.epoch, name=f"{rt.worker}-{rt.epoch}", limits=config.limits())
        store = Store(index, arena, EventLog(worker=rt.worker, epoch=rt.epoch, kept=config.events_kept))
        info = StoreInfo(
            worker=rt.worker,
            arena_path=str(arena.path),
            arena_bytes=arena.size_bytes,
            boot_id=rt.host,
            probe_path=str(arena.probe_path),
            probe_nonce=arena.probe_nonce,
        )
        rt.metrics.sampled("kvstore", "State and counts of the KV store.", ["what"], lambda: _by_name(index.stats()))
        async with supervise(grace_s=config.drain_s) as actors:
            actor = actors.start(lambda: StoreActor(store, rt.clock), name="store", capacity=INBOX_CAPACITY)
            handlers: dict[TaskKind, Handler] = {}  # each kind of task registers its own
            async with (
                _tasks(handlers) as tasks,
                rt.serve_rpc(config.listen, Servicer(store, actor, info, tasks).handlers(), config.drain_s) as server,
                _announced(config, rt, server.address, info, store),
            ):
                await rt.ready()
                await rt.until_stopped()
                store.log.close()


@asynccontextmanager
async def _tasks(handlers: dict[TaskKind, Handler]) -> AsyncIterator[Tasks]:
    async with anyio.create_task_group() as tg:
        yield Tasks(tg, handlers)
        tg.cancel_scope.cancel()


@asynccontextmanager
async def _announced(config: Config, rt: Runtime, address: str, info: StoreInfo, store: Store) -> AsyncIterator[None]:
    if not config.nats:
        yield
        return

    def load() -> EngineLoad:
        stats = store.index.stats()
        return EngineLoad(
            pinned_blocks=stats.pinned_blocks, cached_blocks=stats.blocks, total_blocks=config.blocks_max,
            free_blocks=config.blocks_max - stats.blocks, draining=store.log.closed,
        )  # fmt: skip

    async def publish(event: KvEvent) -> None:
        await bus.publish(kv_subject(Role.KVSTORE, rt.worker), encode(event))

    async with rt.bus() as bus, anyio.create_task_group() as tg:
        tg.start_soon(store.log.forward, publish, name="kv events")
        async with rt.announce(bus, Role.KVSTORE, address, store=info, load=load):
            yield
        store.log.close()


def _by_name(stats: StoreStats) -> dict[tuple[str, ...], float]:
    names = (field.name for field in fields(stats))
    return {(name,): float(value) for name, value in zip(names, astuple(stats), strict=True)}
