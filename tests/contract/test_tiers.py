"""The contract of `Tier`: the disk, Valkey or Redis alone and as a cluster, and S3-compatible object storage."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from covey.clock import MonotonicClock
from covey.policy.disk_record import Record, pack
from covey.types import block
from services.kvstore.tiers.disk import DiskLimits, DiskTier
from services.kvstore.tiers.engine import Engine, open_engine
from services.kvstore.tiers.remote import RemoteLimits, RemoteTier
from services.kvstore.tiers.tier import Tier
from tests.support.engines_remote import REDIS, S3_CREDENTIALS, redis_server, s3_server
from tests.support.records import SHAPE, names, new_chain, new_namespace, record

KINDS = ("disk", "redis", "cluster", "s3")
BUCKET = "blocks"
LIMITS = DiskLimits(capacity_bytes=8 << 20, segment_bytes=1 << 20)


@pytest.fixture(scope="module", params=KINDS)
def where(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """A kind of tier, and its URL, endpoint or directory."""
    kind = request.param
    if kind in {"redis", "cluster"} and REDIS is None:
        pytest.skip("redis-server is not installed")
    directory = tmp_path_factory.mktemp(kind)
    if kind == "disk":
        yield kind, str(directory)
    elif kind == "s3":
        with s3_server(BUCKET) as endpoint:
            yield kind, endpoint
    else:
        with redis_server(directory, cluster=kind == "cluster") as server:
            yield kind, server.url


@asynccontextmanager
async def opened(kind: str, place: str) -> AsyncIterator[tuple[Tier, Engine | None]]:
    clock = MonotonicClock()
    if kind == "disk":
        async with DiskTier.open(Path(place), LIMITS, clock=clock, seed=1) as disk:
            yield disk, None
        return
    url, endpoint = (f"s3://{BUCKET}/some/where", place) if kind == "s3" else (place, "")
    credentials = S3_CREDENTIALS if kind == "s3" else None
    limits = RemoteLimits(timeout_s=10.0, lookup_s=10.0)
    async with open_engine(url, endpoint=endpoint, credentials=credentials, timeout_s=10.0) as engine:
        yield RemoteTier(engine, limits=limits, clock=clock), engine


def same(read: Record | None, written: Record) -> bool:
    return read is not None and (read.header, read.parent, read.tenant, bytes(read.payload)) == (
        written.header, written.parent, written.tenant, bytes(written.payload),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _region(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REGION", "us-east-1")


async def test_blocks_are_kept_under_their_names_and_found_as_prefixes(where: tuple[str, str]) -> None:
    async with opened(*where) as (tier, _):
        namespace, other = new_namespace(), new_namespace()
        chain = new_chain(5, namespace)
        assert await tier.prefix(namespace, names(chain)) == 0
        assert await tier.get(namespace, chain[0].hash) is None
        assert await tier.put(chain[:4], durable=False) == 4
        assert await tier.put(chain, durable=True) == 5, "those that are here count"
        assert await tier.prefix(namespace, names(chain)) == 5
        assert await tier.prefix(namespace, [*names(chain[:2]), os.urandom(16), chain[3].hash]) == 2  # type: ignore[list-item]
        assert await tier.prefix(other, names(chain)) == 0, "a name means nothing in another namespace"
        for each in chain:
            assert same(await tier.get(namespace, each.hash), each)
        assert await tier.get(other, chain[0].hash) is None
        assert tier.counts.puts == 5
        assert (tier.counts.hits, tier.counts.quarantined) == (5, 0)
        assert tier.stats().writable


async def test_what_is_removed_is_gone_with_all_that_grows_from_it(where: tuple[str, str]) -> None:
    async with opened(*where) as (tier, _):
        namespace = new_namespace()
        chain = new_chain(4, namespace)
        await tier.put(chain, durable=False)
        assert await tier.remove(namespace, [chain[1].hash]) == 1
        assert await tier.prefix(namespace, names(chain)) == 1
        assert await tier.get(namespace, chain[1].hash) is None
        assert await tier.put(chain, durable=False) == 4
        assert await tier.prefix(namespace, names(chain)) == 4


async def test_what_was_put_is_there_for_the_next_process(where: tuple[str, str]) -> None:
    namespace = new_namespace()
    chain = new_chain(3, namespace)
    async with opened(*where) as (tier, _):
        await tier.put(chain, durable=True)
    async with opened(*where) as (tier, _):
        assert await tier.prefix(namespace, names(chain)) == 3
        assert same(await tier.get(namespace, chain[2].hash), chain[2])


async def test_lossy_blocks_keep_their_codec(where: tuple[str, str]) -> None:
    async with opened(*where) as (tier, _):
        namespace = new_namespace()
        exact = new_chain(1, namespace)[0]
        lossy = record(namespace, names(new_chain(1, namespace))[0], exact.hash, codec=block.BlockCodec.INT8)
        assert await tier.put([exact, lossy], durable=False) == 2
        read = await tier.get(namespace, lossy.hash)
        assert read is not None
        assert read.header.codec is block.BlockCodec.INT8
        if where[0] == "disk":  # an engine tells only when the block is read
            assert await tier.prefix(namespace, names([exact, lossy]), (block.BlockCodec.RAW,)) == 1


async def test_large_blocks_pass(where: tuple[str, str]) -> None:
    async with opened(*where) as (tier, _):
        namespace = new_namespace()
        chain = new_chain(3, namespace, shape=block.BlockShape(size_bytes=1 << 20, layers=4))
        assert await tier.put(chain, durable=False) == 3
        assert same(await tier.get(namespace, chain[1].hash), chain[1])
        assert tier.counts.put_bytes == 3 << 20


@pytest.mark.parametrize("damage", ["bit", "truncated", "another block's"])
async def test_what_an_engine_gives_back_is_not_believed(where: tuple[str, str], damage: str) -> None:
    async with opened(*where) as (tier, engine):
        if engine is None:
            return  # damage of files: tests/unit/kvstore/test_disk_tier.py
        namespace = new_namespace()
        chain = new_chain(2, namespace)
        await tier.put(chain, durable=False)
        good = pack(chain[1])
        at = len(good) - SHAPE.size_bytes // 2
        bad = {
            "bit": good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :],
            "truncated": good[:-1],
            "another block's": pack(chain[0]),
        }[damage]
        await engine.put({f"{namespace.hex()}/{chain[1].hash.hex()}": bad})
        assert await tier.get(namespace, chain[1].hash) is None
        assert tier.counts.quarantined == 1
        assert await tier.prefix(namespace, names(chain)) == 1, "it was taken out"
        assert same(await tier.get(namespace, chain[0].hash), chain[0])
