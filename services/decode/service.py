"""A decode worker: takes requests over, or prefills them itself, and generates in a running batch."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio

from covey.engine.block_events import BlockEvents
from covey.engine.neighbours import RegistryNeighbours
from covey.engine.worker import gauges, open_worker, store_client
from covey.net.bus import Bus
from covey.net.kv.agreed import AgreedRing
from covey.net.kv_events import KvEventPublisher
from covey.runtime import Runtime
from covey.types.generate import Role

from .config import Config
from .servicer import Servicer


async def serve(config: Config, rt: Runtime) -> None:
    """Serve until stopped; what runs then has `drain_s` to end. Raises Unavailable when a dependency is missing."""
    async with (
        rt.bus() as bus,
        rt.registry(bus) as registry,
        AgreedRing.open(bus, clock=rt.clock) as ring,
        _block_events(bus, rt) as events,
    ):
        store = await store_client(config, registry, rt.channels, ring, clock=rt.clock, host=rt.host)
        async with (
            open_worker(
                config,
                role=Role.DECODE,
                worker=rt.worker,
                clock=rt.clock,
                run_dir=rt.run_dir,
                store=store,
                on_blocks=events.note,
                neighbours=RegistryNeighbours(registry, rt.channels, rt.worker),
            ) as engine,
            rt.serve_rpc(config.listen, Servicer(engine, events).handlers(), config.drain_s) as server,
            rt.announce(bus, Role.DECODE, server.address, engine=engine.info(), load=engine.load),
        ):
            rt.metrics.sampled("kv_ring", "The ring of the KV store that this worker goes by.", ["what"], ring.gauges)
            rt.metrics.sampled("engine", "State and counts of the engine.", ["what"], lambda: gauges(engine))
            await rt.ready()
            await rt.until_stopped()


@asynccontextmanager
async def _block_events(bus: Bus, rt: Runtime) -> AsyncIterator[BlockEvents]:
    publisher = KvEventPublisher(bus, role=Role.DECODE, worker=rt.worker, epoch=rt.epoch)
    events = BlockEvents(publisher, rt.worker)
    async with anyio.create_task_group() as tg:
        tg.start_soon(events.run)
        yield events
        tg.cancel_scope.cancel()
