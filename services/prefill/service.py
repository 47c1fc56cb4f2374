"""A prefill worker: computes prompts, stores their blocks, hands the requests over."""

from __future__ import annotations

from covey.codec.methods import Prefill
from covey.engine.servicer import EngineServicer
from covey.engine.worker import gauges, open_worker, store_client
from covey.net.kv.agreed import AgreedRing
from covey.runtime import Runtime
from covey.types.generate import Role

from .config import Config


async def serve(config: Config, rt: Runtime) -> None:
    """Serve until stopped; what runs then has `drain_s` to end. Raises Unavailable when a dependency is missing."""
    async with rt.bus() as bus, rt.registry(bus) as registry, AgreedRing.open(bus, clock=rt.clock) as ring:
        store = await store_client(config, registry, rt.channels, ring, clock=rt.clock, host=rt.host)
        async with (
            open_worker(
                config, role=Role.PREFILL, worker=rt.worker, clock=rt.clock, run_dir=rt.run_dir, store=store
            ) as engine,
            rt.serve_rpc(config.listen, EngineServicer(engine, Prefill).handlers(), config.drain_s) as server,
            rt.announce(bus, Role.PREFILL, server.address, engine=engine.info(), load=engine.load),
        ):
            rt.metrics.sampled("kv_ring", "The ring of the KV store that this worker goes by.", ["what"], ring.gauges)
            rt.metrics.sampled("engine", "State and counts of the engine.", ["what"], lambda: gauges(engine))
            await rt.ready()
            await rt.until_stopped()
