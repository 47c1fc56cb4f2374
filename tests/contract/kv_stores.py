"""Stores for the contract of `BlockStore`: in memory, and real processes over both transports."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyio import to_thread

from covey.clock import MonotonicClock
from covey.codec.methods import KvStore
from covey.net.kv import KvClient, KvClientConfig, StoreNode
from covey.net.memory_kv import MemoryBlockStore
from covey.net.process import boot_id
from covey.net.rpc import Channels
from covey.policy.store_index import StoreLimits
from covey.testing import free_port
from covey.types.block import BlockLocation
from covey.types.common import Empty
from covey.types.ids import BlockHash, WorkerId
from covey.types.kv import LookupRequest, ReserveRequest
from covey.types.kv_state import StoreStats
from covey.types.store import BlockStore, StoreKey

CAPACITY_BYTES = 16 << 20
COOLING_S = 0.2
BOOT_ID = boot_id()
KINDS = ("memory", "shm", "grpc", "tcp")


class StoreProcess:
    """A real `services.kvstore`, standing alone; `restart` starts it again on the same address."""

    def __init__(self, directory: Path, *sets: str) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self.arena_dir = directory / "arena"
        self._directory = directory
        self._sets = sets
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self, timeout_s: float = 30.0, env: Mapping[str, str] | None = None) -> None:
        read_fd, write_fd = os.pipe()
        settings = (
            "nats=", f"listen={self.address}", f"run_dir={self._directory}", f"arena_dir={self.arena_dir}",
            f"capacity_bytes={CAPACITY_BYTES}", f"cooling_s={COOLING_S}", "worker=kv-0", "drain_s=1", *self._sets,
        )  # fmt: skip
        flags = [flag for setting in settings for flag in ("--set", setting)]
        with (self._directory / "kvstore.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "services.kvstore", "--ready-fd", str(write_fd), *flags],
                pass_fds=(write_fd,),
                stderr=log,
                env={**os.environ, **(env or {})},
            )
        os.close(write_fd)
        try:
            ready, _, _ = select.select([read_fd], [], [], timeout_s)
            started = bool(ready) and bool(os.read(read_fd, 1))
        finally:
            os.close(read_fd)
        if not started:
            self.stop()
            raise AssertionError((self._directory / "kvstore.log").read_text())

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        assert self._process is not None
        self._process.wait(10)

    def stop(self) -> int:
        assert self._process is not None
        if self._process.poll() is None:
            self._process.terminate()
        return self._process.wait(10)

    @property
    def arena(self) -> Path:
        (path,) = self.arena_dir.glob("*.arena")
        return path


@contextmanager
def store_process(directory: Path, *sets: str) -> Iterator[StoreProcess]:
    process = StoreProcess(directory, *sets)
    process.start()
    try:
        yield process
    finally:
        process.stop()


@dataclass
class Subject:
    """A store under test, a second client of the same blocks, and ways behind the contract."""

    store: BlockStore
    other: BlockStore
    stats: Callable[[], Any]
    locate: Callable[[StoreKey, BlockHash], Any]
    flip: Callable[..., Any]
    """Damages the byte `at` of what a location holds, counted from some place in its first layer."""
    reserve: Callable[[ReserveRequest], Any]


def memory_subject() -> Subject:
    clock = MonotonicClock()
    store = MemoryBlockStore(clock=clock, capacity_bytes=CAPACITY_BYTES, limits=StoreLimits(cooling_s=COOLING_S))

    async def stats() -> StoreStats:
        store.index.expire(clock.now())
        return store.index.stats()

    async def locate(key: StoreKey, name: BlockHash) -> BlockLocation:
        return store.index.lookup(_probe(key, name), clock.now()).blocks[0]

    async def reserve(request: ReserveRequest) -> Any:
        return store.index.reserve(request, clock.now())

    async def flip(location: BlockLocation, at: int = 0) -> None:
        store.corrupt(location.offset, at)

    return Subject(store, store, stats, locate, flip, reserve)


def client_of(process: StoreProcess, channels: Channels, transport: Any, **config: Any) -> KvClient:
    node = StoreNode(worker=WorkerId("kv-0"), address=process.address, capacity_bytes=CAPACITY_BYTES)
    return KvClient(
        lambda: [node],
        channels,
        clock=MonotonicClock(),
        boot_id=BOOT_ID,
        config=KvClientConfig(transport=transport, **config),
    )


@asynccontextmanager
async def process_subject(process: StoreProcess, kind: str) -> AsyncIterator[Subject]:
    async with Channels.open() as channels, Channels.open() as others:
        channel = channels.to(process.address)

        async def stats() -> StoreStats:
            return await channel.call(KvStore.STATS, Empty(), timeout_s=5)

        async def locate(key: StoreKey, name: BlockHash) -> BlockLocation:
            return (await channel.call(KvStore.LOOKUP, _probe(key, name), timeout_s=5)).blocks[0]

        async def reserve(request: ReserveRequest) -> Any:
            return await channel.call(KvStore.RESERVE, request, timeout_s=5)

        async def flip(location: BlockLocation, at: int = 0) -> None:
            await to_thread.run_sync(flip_byte, process.arena, location.offset + 4096 + at)

        yield Subject(
            client_of(process, channels, kind), client_of(process, others, kind), stats, locate, flip, reserve
        )


def flip_byte(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 0xFF]))


def _probe(key: StoreKey, name: BlockHash) -> LookupRequest:
    return LookupRequest(
        tenant=key.tenant, namespace=key.namespace, hashes=(name,), owner="probe", ttl_s=0.05, shape=key.shape
    )
