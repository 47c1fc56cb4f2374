"""The transport between hosts: blocks as they lie in memory, over plain TCP connections of their own."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

import anyio
from anyio import CapacityLimiter, to_thread

from covey.clock import Clock
from covey.errors import DataCorrupt, Fenced, LeaseExpired, Miss, Overloaded, Unavailable
from covey.net.kv import bulk_frame
from covey.net.kv.bulk_connection import BulkConnection, BulkPool
from covey.net.kv.bulk_frame import COUNT, DATA_BYTES_MAX, Kind
from covey.net.kv.copying import layer_sums
from covey.net.kv.held import StoreHeld
from covey.net.kv.reading import Layers, Reading
from covey.net.kv.transport import BATCH_BYTES, batches
from covey.net.kv.verifying import Verifier
from covey.net.tasks import background_tasks
from covey.types.kv import CommitBlock, GetRequest, Grant, WriteChunk

R = TypeVar("R")

LEASE_SHARE = 0.25
"""Of a lease's time, what a thread may take before the lease is looked at again."""


class BulkTcp:
    """Reads and writes over the bulk channel; an exchange has a connection and, while it moves bytes, a thread."""

    def __init__(self, pool: BulkPool, limiter: CapacityLimiter, clock: Clock) -> None:
        self._pool = pool
        self._limiter = limiter
        self._clock = clock

    async def load(self, held: StoreHeld, reading: Reading) -> None:
        """Receive blocks; a node that goes away in the middle ends it early. Raises `LeaseExpired`."""
        receiver = _Receiver(held, reading, self._clock)
        try:
            async with self._exchange() as exchange:
                await exchange.run(receiver.ask)
                for layers in reading.passes():
                    receiver.begin(layers)
                    while not receiver.is_done:
                        await held.advance(await exchange.run(receiver.receive))
                exchange.is_over = await exchange.run(receiver.end)
        except (LeaseExpired, Fenced) as error:
            raise LeaseExpired("the lease on these blocks has ended; look them up again", field="lease") from error
        except (DataCorrupt, Miss, Overloaded, Unavailable):
            held.check()  # the server hangs up on a reader whose lease has ended
            reading.fail(receiver.verifier.complete)

    async def store(self, held: StoreHeld, grants: Sequence[Grant], data: Sequence[memoryview]) -> list[CommitBlock]:
        """Send blocks. Raises `LeaseExpired`, `Unavailable` and what the node answers."""
        sender = _Sender(held, grants, data)
        done: list[CommitBlock] = []
        async with self._exchange() as exchange:
            for batch in batches(len(grants), held.key.shape.size_bytes):
                held.check()
                done += await exchange.run(sender.batch(batch))
                await held.advance(len(batch))
            exchange.is_over = await exchange.run(sender.end)
        return done

    @asynccontextmanager
    async def _exchange(self) -> AsyncIterator[_Exchange]:
        """Own a connection for a block; unless the exchange is over then, it is closed: nothing waits for its rest."""
        connection = self._pool.take()
        if connection is None:
            connection = await to_thread.run_sync(self._pool.open, limiter=self._limiter)
        exchange = _Exchange(connection, self._limiter)
        try:
            async with background_tasks() as tg:
                tg.start_soon(exchange.abort_when_cancelled)
                yield exchange
        finally:
            if exchange.is_over:
                self._pool.give(connection)
            else:
                connection.close()


class _Exchange:
    """One use of a connection. Cancelling it wakes the thread that waits for the other side."""

    def __init__(self, connection: BulkConnection, limiter: CapacityLimiter) -> None:
        self.is_over = False
        self._connection = connection
        self._limiter = limiter

    async def run(self, work: Callable[[BulkConnection], R]) -> R:
        """Do something with the connection in a thread."""
        connection = self._connection

        def locked() -> R:
            with connection.in_use:
                return work(connection)

        return await to_thread.run_sync(locked, limiter=self._limiter)

    async def abort_when_cancelled(self) -> None:
        """Wait for the end of the exchange."""
        try:
            await anyio.sleep_forever()
        finally:
            if not self.is_over:
                self._connection.abort()


class _Receiver:
    """Scatters what comes into its buffers, and verifies layers while they are in the cache."""

    def __init__(self, held: StoreHeld, reading: Reading, clock: Clock) -> None:
        self.verifier = Verifier(held, reading)
        self._held = held
        self._reading = reading
        self._clock = clock
        self._layers = Layers(first=0, last=0, of=0)
        self._block = self._filled = 0

    @property
    def is_done(self) -> bool:
        """Whether a pass is over; without passes for each layer, a bad block ends it."""
        return self._block == len(self._reading.into) or (not self._reading.by_layer and self._is_bad)

    @property
    def _is_bad(self) -> bool:
        return self._reading.good < len(self._reading.into)

    def begin(self, layers: Layers) -> None:
        """Start a pass."""
        self._layers, self._block, self._filled = layers, 0, 0

    def ask(self, connection: BulkConnection) -> None:
        """Send the request."""
        key, grant, reading = self._held.key, self._held.grant, self._reading
        names = self._held.hashes[: len(reading.into)]
        request = GetRequest(tenant=key.tenant, lease=grant.lease, hashes=names, by_layer=reading.by_layer)
        connection.request(Kind.READ, request)

    def receive(self, connection: BulkConnection) -> int:
        """Receive for a while; return the progress. Raises what the server answers, and `LeaseExpired`."""
        progress = received = 0
        until = self._clock.now() + LEASE_SHARE * self._held.grant.ttl_s
        while not self.is_done and received < BATCH_BYTES and self._clock.now() < until:
            received += self._receive(connection)
            progress += 1
        return progress

    def end(self, connection: BulkConnection) -> bool:
        """Receive the end; return whether the connection is as good as before."""
        if self._is_bad:
            return False
        connection.take(connection.receive(Kind.DONE).length)
        return True

    def _receive(self, connection: BulkConnection) -> int:
        block, piece = self._block, self._reading.piece(self._block, self._layers)
        if not self.verifier.knows(block):
            data = connection.take(connection.receive(Kind.SUMS).length)
            self.verifier.note(struct.unpack(f"<{len(data) // 8}Q", data))
        length = connection.receive(Kind.DATA).length
        if length > piece.nbytes - self._filled:
            raise Unavailable("the store sent more than was asked")
        connection.receive_into(piece[self._filled : self._filled + length])
        self._filled += length
        if self._filled == piece.nbytes:
            self.verifier.settle(block, self._layers)
            self._block, self._filled = block + 1, 0
        return length


class _Sender:
    """Sends blocks as they lie, and takes their checksums while they are in the cache."""

    def __init__(self, held: StoreHeld, grants: Sequence[Grant], data: Sequence[memoryview]) -> None:
        self._held = held
        self._grants = grants
        self._data = data

    def batch(self, blocks: range) -> Callable[[BulkConnection], list[CommitBlock]]:
        """Return what sends some of the blocks."""

        def send(connection: BulkConnection) -> list[CommitBlock]:
            return [self._send(connection, block) for block in blocks]

        return send

    def end(self, connection: BulkConnection) -> bool:
        """Say that this was all; the server has it when this returns. Raises what it answers."""
        expected = len(self._grants) * self._held.key.shape.size_bytes
        connection.send((bulk_frame.pack(Kind.DONE, COUNT.size), COUNT.pack(expected)))
        (total,) = COUNT.unpack(connection.take(connection.receive(Kind.DONE).length))
        if total != expected:
            raise Unavailable("the store took only a part of what was sent")
        return True

    def _send(self, connection: BulkConnection, block: int) -> CommitBlock:
        if not connection.is_idle:
            connection.receive()  # nothing is due: it says why it takes no more
        held, source = self._held, self._data[block]
        head = WriteChunk(
            tenant=held.key.tenant, lease=held.grant.lease, hash=self._grants[block].hash, offset=0, data=b""
        )
        connection.request(Kind.WRITE, head)
        for at in range(0, source.nbytes, DATA_BYTES_MAX):
            piece = source[at : at + DATA_BYTES_MAX]
            connection.send((bulk_frame.pack(Kind.DATA, piece.nbytes), piece))
        return CommitBlock(hash=head.hash, checksums=layer_sums(source, held.key.shape.layers))
