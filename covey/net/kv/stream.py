"""The portable transport: blocks in chunks over the gRPC connection that carries the node's other calls."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import anyio
from anyio import CapacityLimiter, to_thread

from covey.codec.methods import KvStore
from covey.errors import DataCorrupt, DeadlineExceeded, Fenced, LeaseExpired, Miss, Unavailable
from covey.net.kv.copying import checksums, copy
from covey.net.kv.held import StoreHeld
from covey.net.kv.reading import Layers, Reading
from covey.net.kv.transport import batches
from covey.net.kv.verifying import Verifier
from covey.types.ids import BlockHash
from covey.types.kv import CHUNK_BYTES_MAX, BlockChunk, CommitBlock, GetRequest, Grant, WriteChunk

SPAN_BYTES = 64 * 1024 * 1024
"""What a call may move within one `timeout_s`; a longer one gets more of them."""
INLINE_BYTES = 4 * 1024 * 1024
"""Hashed on the event loop: up to here, going to a thread and back takes longer."""


class GrpcStream:
    """Reads and writes over gRPC. A chunk that takes `stall_s` to come ends a load."""

    def __init__(self, *, timeout_s: float, stall_s: float, limiter: CapacityLimiter) -> None:
        self._timeout_s = timeout_s
        self._stall_s = stall_s
        self._limiter = limiter

    async def load(self, held: StoreHeld, reading: Reading) -> None:
        """Receive blocks; a node that goes away in the middle ends it early. Raises `LeaseExpired`."""
        request = GetRequest(
            tenant=held.key.tenant,
            lease=held.grant.lease,
            hashes=held.hashes[: len(reading.into)],
            by_layer=reading.by_layer,
        )
        receiver = _Receiver(held, reading, self._limiter)
        timeout_s = self._timeout_s * (1 + reading.size_bytes // SPAN_BYTES)
        try:
            async with held.node.channel.stream(KvStore.GET, request, timeout_s=timeout_s) as chunks:
                await receiver.run(aiter(chunks), self._stall_s)
        except (LeaseExpired, Fenced) as error:
            raise LeaseExpired("the lease on these blocks has ended; look them up again", field="lease") from error
        except (DataCorrupt, Miss, Unavailable, DeadlineExceeded, TimeoutError):
            reading.fail(receiver.verifier.complete)  # the node knows, or is gone

    async def store(self, held: StoreHeld, grants: Sequence[Grant], data: Sequence[memoryview]) -> list[CommitBlock]:
        """Send blocks. Raises `LeaseExpired`, `Unavailable` and what the node answers."""
        done: list[CommitBlock] = []
        shape = held.key.shape
        for batch in batches(len(grants), shape.size_bytes, SPAN_BYTES):
            upload = self._upload(held, [(grants[i].hash, data[i]) for i in batch], done)
            try:
                reply = await held.node.channel.upload(KvStore.WRITE, upload, timeout_s=self._timeout_s)
            except DeadlineExceeded as error:
                raise Unavailable("the store did not take the blocks in time") from error
            if reply.size_bytes != len(batch) * shape.size_bytes:
                raise Unavailable("the store took only a part of what was sent")
        return done

    async def _upload(
        self, held: StoreHeld, blocks: Sequence[tuple[BlockHash, memoryview]], done: list[CommitBlock]
    ) -> AsyncIterator[WriteChunk]:
        """Yield blocks in chunks, and note what is to be committed. Raises `LeaseExpired`."""
        for name, source in blocks:
            for at in range(0, source.nbytes, CHUNK_BYTES_MAX):
                data = source[at : at + CHUNK_BYTES_MAX]
                yield WriteChunk(tenant=held.key.tenant, lease=held.grant.lease, hash=name, offset=at, data=data)
                await held.advance(1)
            if source.nbytes <= INLINE_BYTES:
                sums = checksums(source, held.key.shape)
            else:
                sums = await to_thread.run_sync(checksums, source, held.key.shape, limiter=self._limiter)
            done.append(CommitBlock(hash=name, checksums=sums))


class _Receiver:
    """Puts chunks where they belong and verifies each block's layers once they are whole."""

    def __init__(self, held: StoreHeld, reading: Reading, limiter: CapacityLimiter) -> None:
        self.verifier = Verifier(held, reading)
        self._held = held
        self._reading = reading
        self._limiter = limiter

    async def run(self, chunks: AsyncIterator[BlockChunk], stall_s: float) -> None:
        """Receive all passes. Raises what the call fails with, and `TimeoutError` when a chunk does not come."""
        reading = self._reading
        for layers in reading.passes():
            for block in range(len(reading.into)):
                await self._receive(chunks, block, layers, stall_s)
                if not await self._settle(block, layers) and not reading.by_layer:
                    return

    async def _receive(self, chunks: AsyncIterator[BlockChunk], block: int, layers: Layers, stall_s: float) -> None:
        name, into = self._held.hashes[block], self._reading.piece(block, layers)
        start, filled = layers.within(self._reading.shapes[block]).start, 0
        while filled < into.nbytes:
            with anyio.fail_after(stall_s):
                chunk = await anext(chunks, None)
            if chunk is None or chunk.hash != name or chunk.offset != start + filled or not chunk.data:
                raise Unavailable("the store did not send what was asked")
            size = len(chunk.data)
            if filled + size > into.nbytes:
                raise Unavailable("the store sent more than was asked")
            if block < self._reading.good:
                copy(into[filled : filled + size], memoryview(chunk.data))
            if not self.verifier.knows(block):
                self.verifier.note(chunk.checksums)
            filled += size
            await self._held.advance(1)

    async def _settle(self, block: int, layers: Layers) -> bool:
        if self._reading.piece(block, layers).nbytes <= INLINE_BYTES:
            return self.verifier.settle(block, layers)
        return await to_thread.run_sync(self.verifier.settle, block, layers, limiter=self._limiter)
