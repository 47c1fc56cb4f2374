"""Real kvstore processes that found each other through real NATS, and clients of them."""

from __future__ import annotations

import secrets
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
from anyio import to_thread

from covey.clock import MonotonicClock
from covey.codec.methods import KvStore
from covey.errors import CoveyError
from covey.net.kv import KvClient, KvClientConfig, nodes_of
from covey.net.kv.agreed import AgreedRing
from covey.net.nats import NatsBus
from covey.net.registry import Registry
from covey.net.rpc import Channel, Channels
from covey.policy.rebalance import holders
from covey.testing import assert_eventually
from covey.types.block import BlockShape
from covey.types.common import Empty
from covey.types.ids import BlockHash, NamespaceId, TenantId, WorkerId
from covey.types.kv import BlockKey
from covey.types.kv_state import StartTask, StoreStats, TaskKind, TaskRequest, TaskState, TaskStatus
from covey.types.store import BlockStore, Held, StoreKey
from tests.contract.kv_stores import BOOT_ID, StoreProcess
from tests.support.nats import NatsServer

SHAPE = BlockShape(size_bytes=4 * 8192, layers=4)
TENANT = TenantId("t")
CALL_S = 5.0


@dataclass
class Chain:
    """Blocks that grow from one another, with their bytes."""

    key: StoreKey
    blocks: list[BlockKey]
    data: list[memoryview]

    @property
    def names(self) -> list[BlockHash]:
        return [block.hash for block in self.blocks]

    @property
    def root(self) -> BlockHash:
        return self.blocks[0].hash

    async def put(self, store: BlockStore, *, ttl_s: float = 20.0) -> None:
        """Store all of it and keep no lease."""
        held = await store.store(self.key, self.blocks, self.data, owner="writer", ttl_s=ttl_s)
        await held.release()

    async def find(self, store: BlockStore, *, ttl_s: float = 20.0) -> Held:
        return await store.lookup(self.key, self.names, owner="reader", ttl_s=ttl_s)

    def buffers(self) -> list[memoryview]:
        return [memoryview(bytearray(self.key.shape.size_bytes)) for _ in self.blocks]

    async def read(self, store: BlockStore) -> int:
        """Return how many leading blocks come back; what comes back is what was put."""
        held = await self.find(store)
        try:
            into = self.buffers()
            good = await store.load(held, into)
            assert into[:good] == self.data[:good], "bytes that nobody stored"
            return good
        finally:
            await held.release()


def chain_of(count: int, shape: BlockShape = SHAPE, namespace: bytes | None = None) -> Chain:
    """A chain of random blocks in a namespace of its own."""
    names = [BlockHash(secrets.token_bytes(16)) for _ in range(count)]
    blocks = [BlockKey(hash=n, parent=names[i - 1] if i else BlockHash(b"")) for i, n in enumerate(names)]
    where = StoreKey(tenant=TENANT, namespace=NamespaceId(namespace or secrets.token_bytes(16)), shape=shape)
    return Chain(where, blocks, [memoryview(secrets.token_bytes(shape.size_bytes)) for _ in names])


class KvMesh:
    """The processes by name, the ring as a client knows it."""

    def __init__(
        self, folder: Path, sets: tuple[str, ...], nats: NatsServer, bus: NatsBus, channels: Channels,
        registry: Registry, ring: AgreedRing,
    ) -> None:  # fmt: skip
        self.nodes: dict[str, StoreProcess] = {}
        self.nats = nats
        self.bus = bus
        self.ring = ring
        self.registry = registry
        self._folder = folder
        self._sets = sets
        self._channels = channels

    @property
    def version(self) -> int:
        return self.ring.current.version if self.ring.current is not None else 0

    async def start(self, name: str, env: Mapping[str, str] | None = None) -> StoreProcess:
        """Start a node, or start it anew at its old address."""
        if name not in self.nodes:
            folder = self._folder / name
            folder.mkdir()
            sets = (f"nats={self.nats.url}", f"nats_token_file={self.nats.token_file}", f"worker={name}", *self._sets)
            self.nodes[name] = StoreProcess(folder, *sets)
        await to_thread.run_sync(lambda: self.nodes[name].start(env=env))
        return self.nodes[name]

    def client(self, transport: Any = "auto", **config: Any) -> KvClient:
        """A client of its own, with its own breakers and memory."""
        return KvClient(
            nodes_of(self.registry),
            self._channels,
            clock=MonotonicClock(),
            boot_id=BOOT_ID,
            config=KvClientConfig(transport=transport, **config),
            agreed=lambda: self.ring.current,
        )

    def channel(self, name: str) -> Channel:
        """Plain calls to a node."""
        return self._channels.to(self.nodes[name].address)

    def holders(self, chain: Chain) -> list[str]:
        """Who should have a chain, the owner first."""
        assert self.ring.current is not None
        return list(holders(self.ring.current, chain.key.namespace, chain.root))

    async def until_members(self, *names: str, timeout_s: float = 20.0) -> None:
        """Wait until the ring has exactly these members, and they know."""

        async def agreed() -> bool:
            ring = self.ring.current
            if ring is None or {member.worker for member in ring.members} != set(names):
                return False
            try:
                return all([(await self.stats(name)).ring_version == ring.version for name in names])
            except CoveyError:  # a channel to a node that was away connects again after a while
                return False

        await assert_eventually(agreed, timeout_s=timeout_s)

    async def until_copied(self, chains: Sequence[Chain], timeout_s: float = 20.0) -> None:
        """Wait until every chain is whole on each node that owns it, and on no other one that runs."""
        client = self.client()

        async def count(chain: Chain, name: str) -> int:
            held = await client.lookup_on(WorkerId(name), chain.key, chain.names, owner="count", ttl_s=1)
            await held.release()
            return len(held.hashes)

        async def placed() -> bool:
            running = [name for name, node in self.nodes.items() if node.running]
            try:
                for chain in chains:
                    owners = self.holders(chain)
                    for name in running:
                        if await count(chain, name) != (len(chain.blocks) if name in owners else 0):
                            return False
            except CoveyError:
                return False
            return True

        await assert_eventually(placed, timeout_s=timeout_s, every_s=0.1)

    async def stats(self, name: str) -> StoreStats:
        return await self.channel(name).call(KvStore.STATS, Empty(), timeout_s=CALL_S)

    async def blocks(self) -> dict[str, int]:
        """How many blocks each running node has."""
        return {name: (await self.stats(name)).blocks for name, node in self.nodes.items() if node.running}

    async def run_task(self, name: str, kind: TaskKind, **fields: Any) -> TaskStatus:
        """Start a task at a node and wait for its end."""
        channel = self.channel(name)
        status = await channel.call(KvStore.START, StartTask(kind=kind, tenant=TENANT, **fields), timeout_s=CALL_S)
        with anyio.fail_after(30):
            while status.state is TaskState.RUNNING:
                await anyio.sleep(0.02)
                status = await channel.call(KvStore.GET_TASK, TaskRequest(task=status.task), timeout_s=CALL_S)
        return status


@asynccontextmanager
async def kv_mesh(folder: Path, *sets: str, nodes: int = 3) -> AsyncIterator[KvMesh]:
    """Nodes `kv-0` and so on with these settings, once all of them are in the ring."""
    async with (
        NatsServer(folder / "nats") as nats,
        NatsBus.open(nats.url, token=nats.token, name="test") as bus,
        Registry.open(bus, clock=MonotonicClock()) as registry,
        AgreedRing.open(bus, clock=MonotonicClock()) as ring,
        Channels.open() as channels,
    ):
        mesh = KvMesh(folder, sets, nats, bus, channels, registry, ring)
        try:
            async with anyio.create_task_group() as tg:
                for i in range(nodes):
                    tg.start_soon(mesh.start, f"kv-{i}")
            await mesh.until_members(*(f"kv-{i}" for i in range(nodes)))
            yield mesh
        finally:
            for node in mesh.nodes.values():
                if node.running:
                    node.signal(signal.SIGCONT)
                    node.kill()
