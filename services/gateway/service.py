"""The gateway as a process: its files read, its edges opened, its drain in order."""

from __future__ import annotations

import secrets
from contextlib import AsyncExitStack
from dataclasses import replace

import anyio.to_thread

from covey.auth import ApiKeys, new_api_key
from covey.codec.methods import KvStore
from covey.errors import Unavailable
from covey.net.kv_events import KvEventIndex
from covey.net.registry import Registry
from covey.net.rpc import serve as serve_rpc
from covey.runtime import Runtime
from covey.secretfile import read_secret, write_secret
from covey.types.common import Empty
from covey.types.generate import EngineLoad, Role
from covey.types.ids import TenantId, WorkerId
from covey.types.kv_state import KvSnapshot

from .assembly import Surroundings, assembled
from .config import Config
from .http.server import serve_http
from .models import open_models
from .rpc.credentials import EdgeCredentials

LOCAL_TENANT = TenantId("local")
LOCAL_KEY_FILE = "api_key"
SNAPSHOT_TIMEOUT_S = 2.0
DRAIN_NOTICE_S = 0.2
"""Between turning unready and refusing: time for load balancers to look."""


async def serve(config: Config, rt: Runtime) -> None:
    """Serve until stopped.

    Raises:
        InvalidArgument: a key or secret file, or a model's source, is wrong.
        Unavailable: NATS is not there, or an address is taken.
    """
    keys = ApiKeys(_key_files(config, rt))
    models = await anyio.to_thread.run_sync(open_models, config.models)
    remote_keys = {m.name: read_secret(m.api_key_file) for m in config.models if m.api_key_file}
    async with AsyncExitStack() as stack:
        bus = await stack.enter_async_context(rt.bus())
        registry = await stack.enter_async_context(rt.registry(bus))
        snapshots = _Snapshots(registry, rt)
        index = await stack.enter_async_context(KvEventIndex.open(bus, snapshots.fetch, role=Role.KVSTORE))
        around = Surroundings(
            channels=rt.channels,
            directory=registry,
            index=index,
            clock=rt.clock,
            rng=rt.rng,
            registry=rt.metrics,
            mesh_secret=_mesh_secret(config),
            keys=keys,
            models=models,
            remote_keys=remote_keys,
            log=rt.log,
            tracer=rt.tracing.tracer,
        )
        gateway = await stack.enter_async_context(assembled(config, around))
        credentials = EdgeCredentials(keys, rt.mesh_token)
        grpc = await stack.enter_async_context(
            serve_rpc(
                config.grpc_listen,
                gateway.handlers,
                token=credentials,
                grace_s=config.drain_s,
                tracer=rt.tracing.tracer,
            )
        )
        http = await stack.enter_async_context(serve_http(gateway.app, config.http_listen, drain_s=config.drain_s))
        await stack.enter_async_context(
            rt.announce(bus, Role.GATEWAY, grpc.address, load=EngineLoad, labels={"http": http})
        )
        await rt.ready(grpc=grpc.address, http=http)
        await rt.until_stopped()
        gateway.operations.is_draining = True
        grpc.set_serving(False)
        await anyio.sleep(DRAIN_NOTICE_S)


class _Snapshots:
    """Asks a store what it holds, when its events have a gap."""

    def __init__(self, registry: Registry, rt: Runtime) -> None:
        self._registry = registry
        self._rt = rt

    async def fetch(self, worker: WorkerId) -> KvSnapshot:
        view = self._registry.worker(worker)
        if view is None:
            raise Unavailable(f"{worker} is not in the registry")
        channel = self._rt.channels.to(view.record.address)
        async with channel.stream(KvStore.SNAPSHOT, Empty(), timeout_s=SNAPSHOT_TIMEOUT_S) as pages:
            parts = [page async for page in pages]
        if not parts:
            raise Unavailable(f"{worker} did not say what it holds")
        return replace(parts[0], entries=tuple(entry for part in parts for entry in part.entries))


def _key_files(config: Config, rt: Runtime) -> dict[TenantId, str]:
    """Each tenant's keys; without any tenant, the tenant `local` with a key made up once and kept in the run folder."""
    if config.tenants:
        return {TenantId(name): read_secret(tenant.key_file) for name, tenant in config.tenants.items()}
    path = rt.run_dir / LOCAL_KEY_FILE
    if not path.exists():
        write_secret(path, new_api_key())
        rt.log.info("made an API key", file=str(path), tenant=LOCAL_TENANT)
    return {LOCAL_TENANT: read_secret(path)}


def _mesh_secret(config: Config) -> bytes:
    text = read_secret(config.mesh_secret_file) if config.mesh_secret_file else secrets.token_urlsafe(32)
    return text.encode()
