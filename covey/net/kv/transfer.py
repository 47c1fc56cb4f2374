"""Blocks between a caller's buffers and a node: through shared memory on one host, else in chunks over gRPC."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass

from anyio import CapacityLimiter, to_thread

from covey.codec.methods import KvStore
from covey.errors import DataCorrupt, DeadlineExceeded, Fenced, LeaseExpired, Miss, Unavailable
from covey.net.kv.copying import checksums, digest
from covey.net.kv.held import StoreHeld
from covey.net.kv.mapping import ArenaMapping, rebuilt_header
from covey.types.ids import BlockHash
from covey.types.kv import CHUNK_BYTES_MAX, BlockChunk, BlockShape, CommitBlock, GetRequest, Grant, WriteChunk

BATCH_BYTES = 8 * 1024 * 1024
"""Copied in one go by a worker thread: the lease is looked at in between."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """How many leading blocks are good, and what was wrong with the next one, if that should be told."""

    good: int
    fault: str = ""


async def load_shared(
    mapping: ArenaMapping, held: StoreHeld, into: Sequence[memoryview], limiter: CapacityLimiter
) -> Loaded:
    """Copy blocks out of a mapped arena. Raises `LeaseExpired`."""
    done = 0
    for batch in _batches(len(into), held.key.shape):
        good, fault = await to_thread.run_sync(_read, mapping, held, into, batch, limiter=limiter)
        held.check()  # after the copy: before this moment nobody else was given the slots
        done += good
        if fault:
            return Loaded(good=done, fault=fault)
        await held.advance(good)
    return Loaded(good=done)


async def load_remote(
    held: StoreHeld, into: Sequence[memoryview], *, timeout_s: float, limiter: CapacityLimiter
) -> Loaded:
    """Receive blocks over gRPC. A node that goes away in the middle ends it early. Raises `LeaseExpired`."""
    request = GetRequest(lease=held.grant.lease, hashes=held.hashes)
    done = 0
    try:
        async with held.node.channel.stream(KvStore.GET, request, timeout_s=timeout_s) as chunks:
            for i, buffer in enumerate(into):
                sums = await _receive(aiter(chunks), held.hashes[i], buffer)
                header = rebuilt_header(held.locations[i], held.key.namespace, held.key.shape, sums)
                found = await to_thread.run_sync(checksums, buffer, held.key.shape, limiter=limiter)
                if found != sums or digest(header) != held.locations[i].digest:
                    held.check()
                    return Loaded(good=done, fault="a layer does not have its checksum")
                done += 1
                await held.advance(1)
    except (LeaseExpired, Fenced) as error:
        raise LeaseExpired("the lease on these blocks has ended; look them up again", field="lease") from error
    except (DataCorrupt, Miss, Unavailable, DeadlineExceeded):
        return Loaded(good=done)  # the node knows, or is gone
    return Loaded(good=done)


async def store_shared(
    mapping: ArenaMapping,
    held: StoreHeld,
    grants: Sequence[Grant],
    data: Sequence[memoryview],
    limiter: CapacityLimiter,
) -> list[CommitBlock]:
    """Copy blocks into granted slots. Raises `LeaseExpired`."""
    done: list[CommitBlock] = []
    for batch in _batches(len(grants), held.key.shape):
        held.check()
        done += await to_thread.run_sync(_write, mapping, held.key.shape, grants, data, batch, limiter=limiter)
        await held.advance(len(batch))
    return done


async def store_remote(
    held: StoreHeld, grants: Sequence[Grant], data: Sequence[memoryview], *, timeout_s: float, limiter: CapacityLimiter
) -> list[CommitBlock]:
    """Send blocks over gRPC. Raises `LeaseExpired` and what the node answers."""
    done: list[CommitBlock] = []
    for batch in _batches(len(grants), held.key.shape):
        upload = _pieces(held, [(grants[i].hash, data[i]) for i in batch])
        try:
            reply = await held.node.channel.upload(KvStore.WRITE, upload, timeout_s=timeout_s)
        except DeadlineExceeded as error:
            raise Unavailable("the store did not take the blocks in time") from error
        if reply.size_bytes != len(batch) * held.key.shape.size_bytes:
            raise Unavailable("the store took only a part of what was sent")
        for i in batch:
            sums = await to_thread.run_sync(checksums, data[i], held.key.shape, limiter=limiter)
            done.append(CommitBlock(hash=grants[i].hash, checksums=sums))
        await held.advance(len(batch))
    return done


def _batches(count: int, shape: BlockShape) -> Iterator[range]:
    size = max(1, BATCH_BYTES // shape.size_bytes)
    for start in range(0, count, size):
        yield range(start, min(count, start + size))


def _read(mapping: ArenaMapping, held: StoreHeld, into: Sequence[memoryview], batch: range) -> tuple[int, str]:
    for good, i in enumerate(batch):
        try:
            mapping.read(held.locations[i], held.key.namespace, held.key.shape, into[i])
        except DataCorrupt as error:
            return good, error.message
    return len(batch), ""


def _write(
    mapping: ArenaMapping, shape: BlockShape, grants: Sequence[Grant], data: Sequence[memoryview], batch: range
) -> list[CommitBlock]:
    return [CommitBlock(hash=grants[i].hash, checksums=mapping.write(grants[i].offset, shape, data[i])) for i in batch]


async def _pieces(held: StoreHeld, blocks: Sequence[tuple[BlockHash, memoryview]]) -> AsyncIterator[WriteChunk]:
    for name, source in blocks:
        for at in range(0, source.nbytes, CHUNK_BYTES_MAX):
            data = bytes(source[at : at + CHUNK_BYTES_MAX])
            yield WriteChunk(lease=held.grant.lease, hash=name, offset=at, data=data)


async def _receive(chunks: AsyncIterator[BlockChunk], name: BlockHash, buffer: memoryview) -> tuple[int, ...]:
    filled = 0
    sums: tuple[int, ...] = ()
    while filled < buffer.nbytes:
        chunk = await anext(chunks, None)
        if chunk is None or chunk.hash != name or chunk.offset != filled or not chunk.data:
            raise Unavailable("the store did not send what was asked")
        if filled + len(chunk.data) > buffer.nbytes:
            raise Unavailable("the store sent more than was asked")
        buffer[filled : filled + len(chunk.data)] = chunk.data
        sums = sums or chunk.checksums
        filled += len(chunk.data)
    return sums
