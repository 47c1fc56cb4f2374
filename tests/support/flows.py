"""An agentflow of one's own for tests: real NATS, real gRPC, a fake gateway."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

from covey.auth import ApiKeys, MeshToken
from covey.clock import MonotonicClock
from covey.net.nats import NatsBus
from covey.net.rpc import Channel, serve
from covey.types.ids import TenantId
from services.agentflow.blob import Blobs
from services.agentflow.config import Config
from services.agentflow.gatekeeper import TenantGate
from services.agentflow.journal import STREAM, SUBJECT, Journal
from services.agentflow.runs import Runs
from services.agentflow.service import opened_runs
from services.agentflow.servicer import Servicer
from services.agentflow.toolbox import Toolbox

KEY = "ck-tests-tests-tests-0"
OTHER_KEY = "ck-tests-tests-tests-1"


class OneGateway:
    """Always the same address."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def channel(self) -> Channel:
        return self._channel


@dataclass(frozen=True, slots=True, kw_only=True)
class Agentflow:
    address: str
    runs: Runs
    toolbox: Toolbox


@asynccontextmanager
async def agentflow(
    nats_url: str, nats_token: str, gateway: str, blob_dir: Path, **settings: object
) -> AsyncIterator[Agentflow]:
    """Serve agentflow's parts as the service puts them together, without its process."""
    config = Config(blob_dir=str(blob_dir), **settings)  # type: ignore[arg-type]
    keys = ApiKeys({TenantId("local"): KEY, TenantId("other"): OTHER_KEY})
    blobs, toolbox = Blobs(config.blob_path()), Toolbox()
    async with AsyncExitStack() as stack:
        bus = await stack.enter_async_context(NatsBus.open(nats_url, token=nats_token, rng=Random(1)))
        stream = await bus.stream(STREAM, (f"{SUBJECT}.*",), bytes_max=64 * 1024**2)
        journal = Journal(stream, owner=secrets.token_hex(4))
        channel = await stack.enter_async_context(Channel.open(gateway))
        runs = await stack.enter_async_context(
            opened_runs(config, journal, blobs, toolbox, OneGateway(channel), MonotonicClock(), Random(1))
        )
        servicer = Servicer(runs, toolbox, blobs, beat_s=config.tool_beat_s)
        server = await stack.enter_async_context(
            serve("127.0.0.1:0", servicer.handlers(), token=TenantGate(keys), grace_s=1.0)
        )
        yield Agentflow(address=server.address, runs=runs, toolbox=toolbox)
        await runs.stop(1.0)
        toolbox.close()


def key_channel(address: str, key: str = KEY):  # type: ignore[no-untyped-def] # what `Channel.open` returns
    """Open a channel with a tenant's API key."""
    return Channel.open(address, token=MeshToken(key))
