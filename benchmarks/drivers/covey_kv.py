"""Our store as a driver: one node as a process of its own, and clients that reach it by each transport.

A put is everything that `BlockStore.store` does (reserve, copy, checksums, commit) and the release of its lease; a
get is look-up, copy, checksums and release.
"""

from __future__ import annotations

import os
import secrets
import select
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import anyio
from anyio.from_thread import BlockingPortal, start_blocking_portal
from grpc import aio

from benchmarks.drivers.kv_load import BATCH_BYTES, blocks_of, contents
from benchmarks.drivers.lines import private_output, serve
from benchmarks.drivers.ports import free_port
from covey.clock import MonotonicClock
from covey.codec.methods import KvStore
from covey.errors import CoveyError
from covey.net.kv import KvClient, KvClientConfig, StoreNode
from covey.net.kv.heap import keep_freed_memory
from covey.net.process import boot_id
from covey.net.rpc import Channels
from covey.types.block import BlockShape
from covey.types.common import Empty
from covey.types.ids import BlockHash, NamespaceId, TenantId, WorkerId
from covey.types.kv import BlockKey
from covey.types.store import StoreKey

ARENA_BYTES = 768 << 20
LAYERS = 8
TTL_S = 60.0
START_LIMIT_S = 30.0
LOOKUP_BYTES = 4096
EMPTY_PATH = "/grpc.health.v1.Health/Check"


class CoveyStore:
    """Operations run on the event loop of a portal; the node is in our process group."""

    def __init__(self, run_dir: Path, portal: BlockingPortal) -> None:
        self._portal = portal
        self._address = f"127.0.0.1:{free_port()}"
        self._node = _start_node(self._address, run_dir)
        self._stack = ExitStack()
        self._clients: dict[str, list[tuple[Channels, KvClient]]] = {}
        self._buffers = memoryview(bytearray(BATCH_BYTES))
        self._data: dict[int, list[memoryview]] = {}
        self._stored: dict[tuple[str, int, int], list[tuple[StoreKey, list[BlockHash]]]] = {}
        self._chain: tuple[StoreKey, list[BlockHash]] | None = None

    def put(self, transport: str, size: int, clients: int) -> float:
        """Seconds to store a batch under new names."""
        if size not in self._data:
            self._data[size] = contents(size, blocks_of(size))
        users = self._users(transport, clients)
        parts = [self._data[size][number::clients] for number in range(clients)]
        chains = [_chain(len(part)) for part in parts]
        keys = [_key(size) for _ in parts]

        async def work(number: int) -> None:
            held = await users[number].store(keys[number], chains[number], parts[number], owner="bench", ttl_s=TTL_S)
            await held.release()

        took_s = self._portal.call(_together, clients, work)
        named = [[block.hash for block in chain] for chain in chains]
        self._stored[transport, size, clients] = list(zip(keys, named, strict=True))
        return float(took_s)

    def get(self, transport: str, size: int, clients: int) -> float:
        """Seconds to look up and read the batch that was stored last; the bytes are compared after the clock stops."""
        users = self._users(transport, clients)
        stored = self._stored[transport, size, clients]
        into = [self._buffers[i * size : (i + 1) * size] for i in range(blocks_of(size))]

        async def work(number: int) -> None:
            key, names = stored[number]
            held = await users[number].lookup(key, names, owner="bench", ttl_s=TTL_S)
            good = await users[number].load(held, into[number::clients])
            await held.release()
            if good != len(names):
                raise RuntimeError(f"{good} of {len(names)} blocks came back")

        took_s = self._portal.call(_together, clients, work)
        if into != self._data[size]:
            raise RuntimeError("what was read is not what was stored")
        return float(took_s)

    def lookup(self, blocks: int, repeats: int) -> dict[str, float]:
        """Median seconds of a look-up of so many stored blocks, of an empty gRPC call, and of an RPC of our own with an
        empty request (`Info`), in turns.
        """
        client = self._users("grpc", 1)[0]
        return self._portal.call(self._lookup, client, self._clients["grpc"][0][0], blocks, repeats)

    def close(self) -> None:
        """Close the clients and end the node."""
        self._stack.close()
        self._node.kill()

    async def _lookup(self, client: KvClient, channels: Channels, blocks: int, repeats: int) -> dict[str, float]:
        key, names = await self._stored_chain(client, blocks)
        lookups, calls, rpcs = [], [], []
        async with aio.insecure_channel(self._address) as channel:
            empty = channel.unary_unary(EMPTY_PATH)
            for _ in range(repeats):
                began = time.perf_counter()
                held = await client.lookup(key, names, owner="bench", ttl_s=TTL_S)
                lookups.append(time.perf_counter() - began)
                if len(held.hashes) != blocks:
                    raise RuntimeError("the chain is not there")
                await held.release()
                began = time.perf_counter()
                await empty(b"", timeout=5.0)
                calls.append(time.perf_counter() - began)
                began = time.perf_counter()
                await channels.to(self._address).call(KvStore.INFO, Empty(), timeout_s=5.0)
                rpcs.append(time.perf_counter() - began)
        return {"lookup_s": median(lookups), "empty_call_s": median(calls), "rpc_s": median(rpcs)}

    async def _stored_chain(self, client: KvClient, blocks: int) -> tuple[StoreKey, list[BlockHash]]:
        if self._chain is None or len(self._chain[1]) != blocks:
            key, chain, data = _key(LOOKUP_BYTES), _chain(blocks), contents(LOOKUP_BYTES, 1)
            held = await client.store(key, chain, data * blocks, owner="bench", ttl_s=TTL_S)
            await held.release()
            self._chain = key, [block.hash for block in chain]
        return self._chain

    def _users(self, transport: str, count: int) -> list[KvClient]:
        """Clients with a connection each, all of them awake: between two operations this process stands still."""
        users = self._clients.setdefault(transport, [])
        node = StoreNode(worker=WorkerId("bench"), address=self._address, capacity_bytes=ARENA_BYTES)
        while len(users) < count:
            channels = self._stack.enter_context(self._portal.wrap_async_context_manager(Channels.open()))
            config = KvClientConfig(transport=transport, call_timeout_s=30.0)  # type: ignore[arg-type]
            client = KvClient(lambda: [node], channels, clock=MonotonicClock(), boot_id=boot_id(), config=config)
            users.append((channels, client))
        for channels, _ in users[:count]:
            self._portal.call(self._wake, channels)
        return [client for _, client in users[:count]]

    async def _wake(self, channels: Channels) -> None:
        """Wait until calls get through again: pings that were due while all stood still count as lost."""
        with anyio.fail_after(START_LIMIT_S):
            while True:
                try:
                    await channels.to(self._address).call(KvStore.STATS, Empty(), timeout_s=1.0)
                except CoveyError:
                    await anyio.sleep(0.05)
                    continue
                return


async def _together(clients: int, work: Callable[[int], Coroutine[Any, Any, None]]) -> float:
    began = time.perf_counter()
    async with anyio.create_task_group() as tg:
        for number in range(clients):
            tg.start_soon(work, number)
    return time.perf_counter() - began


def _key(size: int) -> StoreKey:
    shape = BlockShape(size_bytes=size, layers=LAYERS)
    return StoreKey(tenant=TenantId("bench"), namespace=NamespaceId(secrets.token_bytes(16)), shape=shape)


def _chain(count: int) -> list[BlockKey]:
    names = [BlockHash(secrets.token_bytes(16)) for _ in range(count)]
    return [BlockKey(hash=name, parent=names[i - 1] if i else BlockHash(b"")) for i, name in enumerate(names)]


def _start_node(address: str, run_dir: Path) -> subprocess.Popen[bytes]:
    read_fd, write_fd = os.pipe()
    settings = ("nats=", f"listen={address}", f"run_dir={run_dir}", f"capacity_bytes={ARENA_BYTES}", "worker=bench")
    flags = [flag for setting in settings for flag in ("--set", setting)]
    command = [sys.executable, "-m", "services.kvstore", "--ready-fd", str(write_fd), *flags]
    root = Path(__file__).resolve().parent.parent.parent
    node = subprocess.Popen(command, pass_fds=(write_fd,), cwd=root, stdout=sys.stderr.fileno())
    os.close(write_fd)
    try:
        ready, _, _ = select.select([read_fd], [], [], START_LIMIT_S)
        if not ready or not os.read(read_fd, 1):
            raise RuntimeError("the node did not start")
    finally:
        os.close(read_fd)
    return node


def main() -> None:
    """Serve until standard input ends."""
    lines = private_output()
    keep_freed_memory()  # as every engine does
    with start_blocking_portal() as portal:
        store = CoveyStore(Path(sys.argv[1]), portal)
        try:
            serve(version("covey"), {"put": store.put, "get": store.get, "lookup": store.lookup}, lines)
        finally:
            store.close()


if __name__ == "__main__":
    main()
