"""A prefill worker: computes prompts, stores their blocks, hands the requests over."""

from __future__ import annotations

from contextlib import closing

from covey.engine.engine import open_engine
from covey.engine.worker import gauges, load_model, store_client
from covey.runtime import Runtime
from covey.types.generate import Role

from .config import Config
from .servicer import Servicer


async def serve(config: Config, rt: Runtime) -> None:
    """Serve until stopped; what runs then has `drain_s` to end. Raises Unavailable when a dependency is missing."""
    async with rt.bus() as bus, rt.registry(bus) as registry:
        model = await load_model(config, run_dir=rt.run_dir, clock=rt.clock)
        with closing(model.runner):
            async with (
                open_engine(
                    model.runner,
                    model.vocabulary,
                    role=Role.PREFILL,
                    worker=rt.worker,
                    clock=rt.clock,
                    limits=config.limits(),
                    store=store_client(config, registry, rt.channels, clock=rt.clock, host=rt.host),
                    model=model.name,
                    grace_s=config.drain_s,
                ) as engine,
                rt.serve_rpc(config.listen, Servicer(engine).handlers(), config.drain_s) as server,
                rt.announce(bus, Role.PREFILL, server.address, engine=engine.info(), load=engine.load),
            ):
                rt.metrics.sampled("engine", "State and counts of the engine.", ["what"], lambda: gauges(engine))
                await rt.ready()
                await rt.until_stopped()
