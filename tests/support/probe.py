"""What a running mesh holds and has done, as its own processes tell: to see that nothing leaked and nothing ran."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio.from_thread
import httpx
from prometheus_client.parser import text_string_to_metric_families

from covey.auth import MeshToken
from covey.cli.mesh import Mesh
from covey.codec.methods import Decode, KvStore, Prefill
from covey.net.rpc import Channel, Channels
from covey.types.common import Empty
from covey.types.generate import EngineLoad
from tests.support.meshes import mesh_of

CALL_S = 5.0
ENGINES = {"prefill": Prefill.LOAD, "decode": Decode.LOAD}


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What is in use over the whole mesh; all zero when nothing runs and nothing leaked."""

    gateway_requests: int
    engine_requests: int
    engine_blocks: int
    leases: int
    store_blocks: int
    """Blocks of the stores that are leased, reserved, pinned or private."""

    @property
    def is_nothing(self) -> bool:
        return self == NOTHING


NOTHING = Held(gateway_requests=0, engine_requests=0, engine_blocks=0, leases=0, store_blocks=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What engines and stores have done since they started."""

    steps: int
    computed_tokens: int
    generated_tokens: int
    lookups: int


class Probe:
    """Asks the processes of a mesh, with its mesh token."""

    def __init__(self, mesh: Mesh, channels: Channels, http: httpx.AsyncClient) -> None:
        self._mesh = mesh
        self._channels = channels
        self._http = http

    def names(self, role: str) -> list[str]:
        """The running children of a role."""
        return [n for n, c in self._mesh.children.items() if n.startswith(f"{role}-") and c.running]

    def to(self, name: str) -> Channel:
        """A channel to a child by name."""
        return self._channels.to(self._mesh.children[name].addresses["grpc"])

    async def load(self, name: str) -> EngineLoad:
        """How busy an engine is."""
        return await self.to(name).call(ENGINES[name.partition("-")[0]], Empty(), timeout_s=CALL_S)

    async def held(self) -> Held:
        """Everything that is in use now."""
        gateway = await self.metrics(self._mesh.http)
        loads = [await self.load(name) for role in ENGINES for name in self.names(role)]
        stores = [await self.to(name).call(KvStore.STATS, Empty(), timeout_s=CALL_S) for name in self.names("kvstore")]
        return Held(
            gateway_requests=int(gateway["covey_num_requests_running"] + gateway["covey_num_requests_waiting"]),
            engine_requests=sum(load.running + load.waiting for load in loads),
            engine_blocks=sum(load.total_blocks - load.free_blocks - load.cached_blocks for load in loads),
            leases=sum(s.leases for s in stores),
            store_blocks=sum(s.leased_blocks + s.reserved_blocks + s.pinned_blocks + s.private_blocks for s in stores),
        )

    async def holds_nothing(self) -> bool:
        return (await self.held()).is_nothing

    async def work(self) -> Work:
        """What was done until now."""
        engines = [await self._counts(name, "covey_engine") for role in ENGINES for name in self.names(role)]
        stores = [await self._counts(name, "covey_kvstore") for name in self.names("kvstore")]
        return Work(
            steps=sum(e["steps"] for e in engines),
            computed_tokens=sum(e["computed_tokens"] for e in engines),
            generated_tokens=sum(e["generated_tokens"] for e in engines),
            lookups=sum(s["hits"] + s["misses"] for s in stores),
        )

    async def engine_counts(self, name: str) -> dict[str, int]:
        """State and counts of one engine."""
        return await self._counts(name, "covey_engine")

    async def metrics(self, url: str) -> dict[str, float]:
        """Samples without labels, by name."""
        return {s.name: s.value for s in await self._samples(url) if not s.labels}

    async def sample(self, name: str, family: str, what: str) -> int:
        """One value of a child's metrics that tell things by name."""
        return (await self._counts(name, family))[what]

    async def _counts(self, name: str, family: str) -> dict[str, int]:
        url = f"http://{self._mesh.children[name].addresses['metrics']}"
        return {s.labels["what"]: int(s.value) for s in await self._samples(url) if s.name == family}

    async def _samples(self, url: str) -> list[Any]:
        response = await self._http.get(f"{url}/metrics")
        response.raise_for_status()
        return [s for family in text_string_to_metric_families(response.text) for s in family.samples]


@asynccontextmanager
async def probing(mesh: Mesh) -> AsyncIterator[Probe]:
    """Own a probe for a block."""
    token = MeshToken((mesh.plan.files.run_dir / "mesh.token").read_text())
    async with Channels.open(token=token) as channels, httpx.AsyncClient(trust_env=False, timeout=CALL_S) as http:
        yield Probe(mesh, channels, http)


@contextmanager
def mesh_in_thread(folder: Path, **plan: Any) -> Iterator[Mesh]:
    """A mesh whose launcher runs in a thread of its own: for fixtures that outlive a test's event loop."""
    with (
        anyio.from_thread.start_blocking_portal() as portal,
        portal.wrap_async_context_manager(mesh_of(folder, **plan)) as mesh,
    ):
        yield mesh


def api_key(mesh: Mesh) -> str:
    """The key of the tenant `local`."""
    return mesh.plan.files.api_key_file.read_text().strip()
