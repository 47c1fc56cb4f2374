"""The transport of one host: blocks are copied between buffers and the mapped arena."""

from __future__ import annotations

from collections.abc import Sequence

from anyio import CapacityLimiter, to_thread

from covey.errors import DataCorrupt
from covey.net.kv.held import StoreHeld
from covey.net.kv.mapping import ArenaMapping, SlotView
from covey.net.kv.reading import Layers, Reading
from covey.net.kv.transport import batches
from covey.types.kv import CommitBlock, Grant


class SharedMemory:
    """Reads and writes a mapped arena, on threads of `limiter`."""

    def __init__(self, mapping: ArenaMapping, limiter: CapacityLimiter) -> None:
        self._mapping = mapping
        self._limiter = limiter

    async def load(self, held: StoreHeld, reading: Reading) -> None:
        """Copy blocks out of the arena. Raises `LeaseExpired`."""
        copy = _Copy(self._mapping, held, reading)
        for layers in reading.passes():
            for batch in batches(reading.good, reading.size_bytes * layers.count // layers.of // len(reading.into)):
                good, fault = await to_thread.run_sync(copy.read, batch, layers, limiter=self._limiter)
                held.check()  # after the copy: before this moment nobody else was given the slots
                if good < len(batch):
                    reading.fail(batch.start + good, fault)
                    break
                await held.advance(good)

    async def store(self, held: StoreHeld, grants: Sequence[Grant], data: Sequence[memoryview]) -> list[CommitBlock]:
        """Copy blocks into granted slots. Raises `LeaseExpired`."""
        shape, mapping = held.key.shape, self._mapping

        def write(batch: range) -> list[CommitBlock]:
            return [
                CommitBlock(hash=grants[i].hash, checksums=mapping.write(grants[i].offset, shape, data[i]))
                for i in batch
            ]

        done: list[CommitBlock] = []
        for batch in batches(len(grants), shape.size_bytes):
            held.check()
            done += await to_thread.run_sync(write, batch, limiter=self._limiter)
            await held.advance(len(batch))
        return done


class _Copy:
    """Slots seen once, at the first pass over them; their headers are compared again after every copy."""

    def __init__(self, mapping: ArenaMapping, held: StoreHeld, reading: Reading) -> None:
        self._mapping = mapping
        self._held = held
        self._reading = reading
        self._slots: list[SlotView] = []

    def read(self, batch: range, layers: Layers) -> tuple[int, str]:
        """Copy some layers of some blocks; return how many blocks are good and what is wrong with the next."""
        for good, block in enumerate(batch):
            try:
                self._slot(block).read(layers, self._reading.piece(block, layers))
            except DataCorrupt as error:
                return good, error.message
        return len(batch), ""

    def _slot(self, block: int) -> SlotView:
        if block == len(self._slots):
            location, shape = self._held.locations[block], self._reading.shapes[block]
            self._slots.append(self._mapping.slot(location, self._held.key.namespace, shape))
        return self._slots[block]
