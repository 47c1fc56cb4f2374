"""A node of the KV store: an arena, an index in an actor, RPCs, and its place in the registry."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import fields, replace
from functools import partial

import anyio
from anyio import to_thread

from covey.actor import supervise
from covey.net.kv.heap import keep_freed_memory
from covey.policy.arena import Arena
from covey.policy.store_index import StoreIndex
from covey.runtime import Runtime
from covey.types.kv import StoreInfo
from covey.types.kv_state import StoreStats, TaskKind

from .arena_file import ArenaFile, arena_file, choose_directory
from .bulk import BulkServer
from .config import Config
from .encoding import encoders
from .event_log import EventLog
from .meshed import meshed
from .recode import Recoder
from .scrub import Scrubber
from .servicer import Servicer, condemn
from .store import Store, StoreActor
from .tasks import Handler, Tasks
from .tiers.opening import open_tiers
from .transfers import Transfers

INBOX_CAPACITY = 1024


async def serve(config: Config, rt: Runtime) -> None:
    """Serve until stopped. With `nats = ""` the node stands alone: whoever knows its address uses it."""
    keep_freed_memory()
    directory = choose_directory(config.arena_dir, rt.run_dir, config.capacity_bytes)
    codecs = await to_thread.run_sync(config.codecs.open)
    layout = Arena(config.capacity_bytes)
    with arena_file(directory, f"{rt.worker}-{rt.epoch}", layout.capacity_bytes) as arena:
        index = StoreIndex(
            arena=layout, epoch=rt.epoch, name=f"{rt.worker}-{rt.epoch}", limits=config.limits(),
            retention=config.retention(), quotas=config.quotas(), token=partial(secrets.token_urlsafe, 12),
        )  # fmt: skip
        store = Store(index, arena, EventLog(worker=rt.worker, epoch=rt.epoch, kept=config.events_kept))
        info = _info(rt, arena)
        async with supervise(grace_s=config.drain_s) as actors:
            actor = actors.start(lambda: StoreActor(store, rt.clock), name="store", capacity=INBOX_CAPACITY)
            recoder = Recoder(store, actor, codecs, config.codecs)
            scrubber = Scrubber(store, actor, bytes_per_s=config.scrub_bytes_per_s)
            handlers: dict[TaskKind, Handler] = {TaskKind.RECODE: recoder.recode}  # each kind has its own
            transfers = Transfers(store, rt.clock)
            bulk = BulkServer(transfers, partial(condemn, actor), token=rt.mesh_token, limits=config.bulk_limits())
            async with AsyncExitStack() as stack:
                mesh = await stack.enter_async_context(meshed(config, rt, store, actor))
                if mesh is not None:
                    handlers |= mesh.handlers()
                opened = open_tiers(
                    store, actor, disk=config.disk, remote=config.remote, move=config.move, worker=config.worker,
                    clock=rt.clock, rng=rt.rng, encoders=encoders(codecs, config.codecs.policy()),
                )  # fmt: skip
                tiers = await stack.enter_async_context(opened)
                handlers |= tiers.handlers()
                handlers[TaskKind.SCRUB] = tiers.scrub_after(scrubber.scrub)
                rt.metrics.sampled("kvstore_tier", "State and counts of each tier.", ["tier", "what"], tiers.metrics)
                tasks = await stack.enter_async_context(_tasks(handlers))
                await stack.enter_async_context(recoder.running())
                await stack.enter_async_context(scrubber.running())
                if config.bulk_address():
                    info = replace(
                        info, bulk_address=await stack.enter_async_context(bulk.serve(config.bulk_address()))
                    )
                servicer = Servicer(store, actor, info, tasks, transfers, tiers, mesh)
                rt.metrics.sampled(
                    "kvstore", "State and counts of the KV store.", ["what"], lambda: _by_name(servicer.now())
                )
                server = await stack.enter_async_context(
                    rt.serve_rpc(config.listen, servicer.handlers(), config.drain_s)
                )
                if mesh is not None:
                    await stack.enter_async_context(mesh.announced(server.address, info))
                await rt.ready()
                await rt.until_stopped()
                if mesh is not None:
                    rt.log.info("left", blocks=await mesh.leave())
                rt.log.info("kept below", blocks=await tiers.save(config.drain_s / 2))
                store.log.close()


@asynccontextmanager
async def _tasks(handlers: dict[TaskKind, Handler]) -> AsyncIterator[Tasks]:
    async with anyio.create_task_group() as tg:
        yield Tasks(tg, handlers)
        tg.cancel_scope.cancel()


def _info(rt: Runtime, arena: ArenaFile) -> StoreInfo:
    return StoreInfo(
        worker=rt.worker,
        arena_path=str(arena.path),
        arena_bytes=arena.size_bytes,
        boot_id=rt.host,
        probe_path=str(arena.probe_path),
        probe_nonce=arena.probe_nonce,
    )


def _by_name(stats: StoreStats) -> dict[tuple[str, ...], float]:
    values = ((field.name, getattr(stats, field.name)) for field in fields(stats))
    return {(name,): float(value) for name, value in values if isinstance(value, int | float)}
