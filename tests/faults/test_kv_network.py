"""A network that cuts, flips, delays, swallows and slows between engine and kvstore: the text is the golden one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from random import Random
from typing import Any, Literal

import anyio
import pytest

from covey.clock import MonotonicClock
from covey.codec.methods import KvStore
from covey.engine.engine import Engine
from covey.engine.limits import EngineLimits
from covey.errors import CoveyError, InvalidArgument, LeaseExpired, PayloadTooLarge
from covey.model.runner import TorchRunner, open_runner
from covey.model.tokenizer import Tokenizer, open_tokenizer
from covey.net.kv import KvClient, KvClientConfig, StoreNode
from covey.net.rpc import Channels
from covey.types.block import BlockShape
from covey.types.common import Empty
from covey.types.generate import GenerateRequest, Handover, Role
from covey.types.ids import BlockHash, LeaseId, WorkerId
from covey.types.kv import CHUNK_BYTES_MAX, LookupRequest, WriteChunk
from tests.contract.kv_stores import BOOT_ID, StoreProcess, store_process
from tests.support.detour import Detour
from tests.support.engines import collect, is_whole, plain, request_of, running_engine
from tests.support.kv_mesh import TENANT, chain_of
from tests.support.proxy import Fault, Proxy, proxy_to
from tests.support.tiny_llama import write_tiny_llama

pytestmark = [pytest.mark.faults, pytest.mark.timeout(120)]

BLOCK = 16
LENGTH = 200
BLOCK_BYTES_MIN = 8192
Way = Literal["grpc", "tcp"]


@dataclass(frozen=True)
class Model:
    """A tiny model, one runner for each engine."""

    prefill: TorchRunner
    decode: TorchRunner
    vocabulary: Tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = write_tiny_llama(tmp_path_factory.mktemp("tiny"))
    runners = [open_runner(str(folder), cache_dir=folder / "cache", n_blocks=64, block_size=BLOCK) for _ in range(2)]
    return Model(runners[0], runners[1], open_tokenizer(str(folder)))


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreProcess]:
    with store_process(tmp_path_factory.mktemp("kvstore"), "capacity_bytes=134217728") as process:
        yield process


@asynccontextmanager
async def through(process: StoreProcess, way: Way, **config: Any) -> AsyncIterator[tuple[KvClient, Proxy]]:
    """A client whose blocks come through a proxy: all of gRPC, or the bulk channel alone."""
    async with Channels.open() as channels:
        info = await channels.to(process.address).call(KvStore.INFO, Empty(), timeout_s=5)
        async with proxy_to(process.address if way == "grpc" else info.bulk_address) as proxy:
            address = proxy.address if way == "grpc" else process.address
            node = StoreNode(worker=WorkerId("kv-0"), address=address, capacity_bytes=1 << 20)
            source: Any = channels if way == "grpc" else Detour(channels, proxy.address)
            settings = KvClientConfig(transport=way, stall_timeout_s=0.5, **config)
            yield KvClient(lambda: [node], source, clock=MonotonicClock(), boot_id=BOOT_ID, config=settings), proxy


@asynccontextmanager
async def straight(process: StoreProcess) -> AsyncIterator[KvClient]:
    async with Channels.open() as channels:
        node = StoreNode(worker=WorkerId("kv-0"), address=process.address, capacity_bytes=1 << 20)
        yield KvClient(lambda: [node], channels, clock=MonotonicClock(), boot_id=BOOT_ID)


def prompt(seed: int) -> GenerateRequest:
    rng = Random(seed)
    tokens = [rng.randrange(250) for _ in range(LENGTH)]
    return plain(request_of(tokens, request_id=f"r{seed}", max_tokens=12), model="")


async def _golden(model: Model, request: GenerateRequest) -> tuple[int, ...]:
    async with running_engine(model.decode, vocabulary=model.vocabulary) as engine:
        answer = await collect(engine, request)
    return answer.ids


async def _handed_over(model: Model, process: StoreProcess, request: GenerateRequest) -> Any:
    """Prefill it over an undisturbed way; its blocks are in the store then."""
    async with (
        straight(process) as store,
        running_engine(model.prefill, role=Role.PREFILL, vocabulary=model.vocabulary, store=store, name="p") as engine,
    ):
        answer = await collect(engine, request)
        assert isinstance(answer.last, Handover)
        yield answer
        await engine.cancel(request.request_id)


FAULTS = {
    "nothing": Fault(),
    "cut": Fault(cut_after=3 * BLOCK_BYTES_MIN),
    "cut in a frame": Fault(cut_after=5 * BLOCK_BYTES_MIN + 13),
    "flip": Fault(flip_at=3 * BLOCK_BYTES_MIN + 1000),
    "flip later": Fault(flip_at=9 * BLOCK_BYTES_MIN + 77),
    "blackhole": Fault(blackhole=True),
    "delay": Fault(delay_s=0.05),
    "throttle": Fault(bytes_per_s=400_000),
}


@pytest.mark.parametrize("way", ["grpc", "tcp"])
async def test_whatever_the_network_does_the_text_is_golden(way: Way, model: Model, process: StoreProcess) -> None:
    limits = EngineLimits(kv_timeout_s=3.0)
    for seed, (name, fault) in enumerate(FAULTS.items(), start=100 if way == "grpc" else 200):
        request = prompt(seed)
        golden = await _golden(model, request)
        async for first in _handed_over(model, process, request):
            async with (
                through(process, way) as (store, proxy),
                running_engine(model.decode, vocabulary=model.vocabulary, store=store, limits=limits) as engine,
            ):
                await _warm(store)
                proxy.passed, proxy.fault = 0, fault
                rest = await _decode(engine, replace(request, ticket=first.last.ticket))
                assert is_whole(rest, start=1), name
                assert first.ids + rest.ids == golden, name
                usage = rest.last.usage
                if name in {"nothing", "delay"}:
                    assert usage.loaded_tokens == LENGTH, name
                elif name.startswith(("cut", "flip")):
                    assert proxy.struck, f"{name}: never reached, {proxy.passed} bytes"
                elif name == "blackhole":
                    assert usage.loaded_tokens < LENGTH, name
                proxy.fault = Fault()


async def _warm(store: KvClient) -> None:
    """Connect, so that places in the stream count from the blocks on."""
    chain = chain_of(1)
    try:
        await chain.read(store)
    except CoveyError:
        return


async def _decode(engine: Engine, request: GenerateRequest) -> Any:
    with anyio.fail_after(30):
        return await collect(engine, request)


async def test_messages_at_their_limits(process: StoreProcess) -> None:
    """KV of any size passes in chunks; a chunk over its bound, and a message over gRPC's, are refused by type."""
    async with Channels.open() as channels:
        channel = channels.to(process.address)
        for size, error in ((CHUNK_BYTES_MAX, LeaseExpired), (CHUNK_BYTES_MAX + 1, InvalidArgument)):
            chunk = WriteChunk(
                tenant=TENANT, lease=LeaseId("nobody's"), hash=BlockHash(b"h"), offset=0, data=bytes(size)
            )

            async def chunks(chunk: WriteChunk = chunk) -> AsyncIterator[WriteChunk]:
                yield chunk

            with pytest.raises(error):
                await channel.upload(KvStore.WRITE, chunks(), timeout_s=5)
        huge = LookupRequest(
            tenant=TENANT, namespace=chain_of(1).key.namespace, hashes=(), owner="x" * (5 << 20), ttl_s=1,
            shape=BlockShape(size_bytes=8, layers=1),
        )  # fmt: skip
        with pytest.raises((PayloadTooLarge, InvalidArgument)):
            await channel.call(KvStore.LOOKUP, huge, timeout_s=5)
    for size in (CHUNK_BYTES_MAX - 8, CHUNK_BYTES_MAX, CHUNK_BYTES_MAX + 8, 5 * CHUNK_BYTES_MAX + 8):
        for way in ("grpc", "tcp"):
            async with through(process, way) as (store, _):
                chain = chain_of(2, BlockShape(size_bytes=size, layers=2))
                await chain.put(store)
                assert await chain.read(store) == 2
