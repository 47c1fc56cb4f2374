"""The agentflow process: journal, blobs, runs and tool workers, put together and taken apart in order."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from random import Random

import anyio

from covey.auth import ApiKeys
from covey.clock import Clock
from covey.errors import Unavailable
from covey.net.registry import Registry
from covey.net.rpc import Channel, Channels, Handlers, Server
from covey.net.rpc import serve as serve_rpc
from covey.net.tasks import background_tasks
from covey.runtime import Runtime
from covey.secretfile import read_secret
from covey.types.generate import EngineLoad, Role
from covey.types.ids import TenantId
from services.agentflow.blob import Blobs
from services.agentflow.config import Config
from services.agentflow.gatekeeper import TenantGate
from services.agentflow.journal import STREAM, SUBJECT, Journal
from services.agentflow.program import Gateways
from services.agentflow.runs import Runs
from services.agentflow.servicer import Servicer
from services.agentflow.toolbox import Toolbox
from services.agentflow.work import Surroundings

LOCAL_TENANT = TenantId("local")
LOCAL_KEY_FILE = "api_key"
STOP_S = 5.0
"""What executors get to journal what they hold; the rest is done by the next owner."""


class MeshGateways:
    """The configured gateway, or one that the registry knows."""

    def __init__(self, address: str, registry: Registry, channels: Channels) -> None:
        self._address = address
        self._registry = registry
        self._channels = channels

    def channel(self) -> Channel:
        address = self._address
        if not address:
            views = self._registry.workers(Role.GATEWAY)
            if not views:
                raise Unavailable("no gateway is in the registry", retry_after_ms=500)
            address = min(views, key=lambda view: view.record.worker).record.address
        return self._channels.to(address)


@asynccontextmanager
async def opened_runs(
    config: Config, journal: Journal, blobs: Blobs, toolbox: Toolbox, gateways: Gateways, clock: Clock, rng: Random
) -> AsyncIterator[Runs]:
    """Replay the journal and own the executors for a block; leaving it leaves open runs to the next owner."""
    around = Surroundings(
        blobs=blobs,
        toolbox=toolbox,
        gateways=gateways,
        waits=anyio.CapacityLimiter(config.waits_max),
        clock=clock,
        rng=rng,
        gateway_patience_s=config.gateway_patience_s,
        tool_stop_s=config.tool_stop_s,
    )
    async with background_tasks() as tasks:
        runs = Runs(
            journal,
            around,
            tasks,
            limits=config.limits(),
            open_max=config.open_runs_max,
            runs_max=config.runs_max,
            in_memory_max=config.runs_in_memory_max,
        )
        await runs.replay()
        try:
            yield runs
        finally:
            with anyio.CancelScope(shield=True):
                await runs.stop(STOP_S)


async def serve(config: Config, rt: Runtime) -> None:
    """Run agentflow until the process is told to stop."""
    keys = ApiKeys(_key_files(config, rt))
    blobs, toolbox = Blobs(config.blob_path()), Toolbox()
    async with AsyncExitStack() as stack:
        bus = await stack.enter_async_context(rt.bus())
        registry = await stack.enter_async_context(rt.registry(bus))
        stream = await bus.stream(STREAM, (f"{SUBJECT}.*",), bytes_max=config.journal_bytes_max)
        journal = Journal(stream, owner=f"{rt.worker}:{rt.epoch}")
        gateways = MeshGateways(config.gateway, registry, rt.channels)
        runs = await stack.enter_async_context(opened_runs(config, journal, blobs, toolbox, gateways, rt.clock, rt.rng))
        rt.metrics.gauge("agentflow_open_runs", "Runs that have not ended").set_function(lambda: runs.open_count)
        rt.metrics.gauge("agentflow_tool_workers", "Attached tool workers").set_function(lambda: toolbox.workers)
        servicer = Servicer(runs, toolbox, blobs, beat_s=config.tool_beat_s)
        # No mesh token here: callers are tenants.
        server = await _serve_where_before(stack, config, rt, servicer.handlers(), TenantGate(keys))
        await stack.enter_async_context(
            rt.announce(bus, Role.AGENTFLOW, server.address, load=lambda: EngineLoad(running=runs.open_count))
        )
        await rt.ready(grpc=server.address)
        await rt.until_stopped()
        # Runs first: a tool lost while its run is still driven would count as a failed attempt.
        await runs.stop(STOP_S)
        toolbox.close()


async def _serve_where_before(
    stack: AsyncExitStack, config: Config, rt: Runtime, handlers: Handlers, gate: TenantGate
) -> Server:
    """Serve on the port of the last time, if any port will do: clients of a restarted agentflow find it again."""
    file = rt.run_dir / f"{rt.worker}.port" if config.worker and config.listen.endswith(":0") else None
    listens = [config.listen]
    if file is not None and file.exists() and (port := file.read_text().strip()).isdigit():
        listens.insert(0, f"{config.listen.removesuffix(':0')}:{port}")
    for listen in listens:
        try:
            served = serve_rpc(listen, handlers, token=gate, grace_s=config.drain_s, tracer=rt.tracing.tracer)
            server = await stack.enter_async_context(served)
        except Unavailable:
            if listen is listens[-1]:
                raise
        else:
            break
    if file is not None:
        file.write_text(server.address.rpartition(":")[2])
    return server


def _key_files(config: Config, rt: Runtime) -> dict[TenantId, str]:
    """Return each tenant's keys; without any tenant, the key that the gateway of the same run folder made up."""
    if config.tenants:
        return {TenantId(name): read_secret(tenant.key_file) for name, tenant in config.tenants.items()}
    return {LOCAL_TENANT: read_secret(rt.run_dir / LOCAL_KEY_FILE)}
