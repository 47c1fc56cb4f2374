"""Reads and fills leased slots for the RPCs and the bulk channel, on the event loop that the store's actor runs on.

Each step runs to its end without a pause, as the actor's commands do, and changes nothing in the index: between it
and a command there is no race, and a piece of a block needs no message.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from anyio import to_thread

from covey.clock import Clock
from covey.errors import DataCorrupt, InvalidArgument
from covey.net.kv.copying import checksums
from covey.net.kv.reading import Layers, layer_range
from covey.policy.store_index import Placed
from covey.types.block import BlockShape
from covey.types.ids import BlockHash
from covey.types.kv import CommitRequest, GetRequest, WriteChunk

from .store import Store

STREAMED_MAX = 65_536
"""Blocks written through the service and not yet committed whose bytes are checked at commit."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of a block as they lie in the arena; the first piece of each block has the checksums of its layers."""

    hash: BlockHash
    offset: int
    data: memoryview
    checksums: tuple[int, ...]


class Transfers:
    """What one node lets through."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._streamed: dict[tuple[str, bytes], None] = {}

    def read(self, request: GetRequest) -> SlotReader:
        """Return the pieces of leased blocks. Raises `LeaseExpired`, `Miss` and `InvalidArgument`."""
        return SlotReader(self._store, request, self._clock)

    def slot(self, chunk: WriteChunk) -> memoryview:
        """Return what is left of a granted slot's payload from a chunk's offset on; what is written is remembered.

        To be asked again after every pause: a lease that has ended may fill nothing. Raises `LeaseExpired`,
        `Fenced`, and `InvalidArgument` for an offset outside the block.
        """
        slot = self._store.index.writable(chunk.lease, chunk.hash, self._clock.now(), tenant=chunk.tenant)
        if chunk.offset >= slot.shape.size_bytes:
            raise InvalidArgument(f"a block has {slot.shape.size_bytes} bytes", field="offset")
        if (chunk.lease, chunk.hash) not in self._streamed:
            if len(self._streamed) >= STREAMED_MAX:
                del self._streamed[next(iter(self._streamed))]
            self._streamed[chunk.lease, chunk.hash] = None
        return self._store.payload(slot)[chunk.offset :]

    def write(self, chunk: WriteChunk) -> int:
        """Fill a piece of a granted slot; return its size. Raises as `slot` does."""
        room = self.slot(chunk)
        if len(chunk.data) > room.nbytes:
            raise InvalidArgument(f"a block has {room.nbytes + chunk.offset} bytes", field="data")
        room[: len(chunk.data)] = chunk.data
        return len(chunk.data)

    async def verify(self, request: CommitRequest) -> None:
        """Check blocks that came through here, until they are good, before they are committed: a stream may have ended
        early.

        Raises:
            DataCorrupt: what was written does not have the checksums that are to be committed.
            LeaseExpired, Fenced: the blocks are not the lease's to commit.
        """
        due = []
        streamed = [block for block in request.blocks if (request.lease, block.hash) in self._streamed]
        for block in streamed:
            slot = self._store.index.writable(request.lease, block.hash, self._clock.now(), tenant=request.tenant)
            due.append((self._store.payload(slot), slot.shape, block.checksums))
        if due and not await to_thread.run_sync(_are_good, due):
            raise DataCorrupt("the bytes that were written do not have these checksums", field="blocks")
        for block in streamed:
            self._streamed.pop((request.lease, block.hash), None)


def _are_good(blocks: Sequence[tuple[memoryview, BlockShape, tuple[int, ...]]]) -> bool:
    return all(checksums(payload, shape) == expected for payload, shape, expected in blocks)


class SlotReader:
    """The pieces of leased blocks, in the order asked; the lease is looked at before each."""

    def __init__(self, store: Store, request: GetRequest, clock: Clock) -> None:
        """Raises `LeaseExpired`, `Miss` and `InvalidArgument`."""
        self.slot: Placed | None = None
        """The block that is being read; the bad one after `DataCorrupt`."""
        self._store = store
        self._request = request
        self._clock = clock
        self._placed = store.index.locate(request.lease, request.hashes, clock.now(), tenant=request.tenant)
        self._passes = [self._range(layers) for layers in _passes(request, self._placed)]

    def pieces(self, size_bytes: int) -> Iterator[Piece]:
        """Yield pieces of at most so many bytes. Raises `LeaseExpired` and `DataCorrupt`."""
        for layers in self._passes:
            for slot in self._placed:
                self.check()
                self.slot, where = slot, layers.within(slot.shape)
                sums = self._store.header(slot).checksums if layers is self._passes[0] else ()
                for at in range(where.start, where.stop, size_bytes):
                    self.check()
                    data = self._store.payload(slot)[at : min(where.stop, at + size_bytes)]
                    yield Piece(slot.location.hash, at, data, sums)
                    sums = ()

    def check(self) -> None:
        """Raise `LeaseExpired` when the blocks may be given to others: to be asked after every pause."""
        self._store.index.locate(self._request.lease, (), self._clock.now())

    def _range(self, layers: tuple[int, int]) -> Layers:
        if any(slot.shape.layers != self._placed[0].shape.layers for slot in self._placed):
            raise InvalidArgument("these blocks have different layers", field="hashes")
        return layer_range(self._placed[0].shape, *layers)


def _passes(request: GetRequest, placed: tuple[Placed, ...]) -> list[tuple[int, int]]:
    if not placed:
        return []
    last = request.last_layer or placed[0].shape.layers
    if request.by_layer and request.first_layer < last <= placed[0].shape.layers:
        return [(layer, layer + 1) for layer in range(request.first_layer, last)]
    return [(request.first_layer, last)]
