"""The transport of one host: blocks are copied between buffers and the mapped arena."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import TypeVar

import anyio
from anyio import CapacityLimiter, to_thread

from covey.errors import CoveyError, DataCorrupt
from covey.net.kv.held import StoreHeld
from covey.net.kv.mapping import ArenaMapping, SlotView
from covey.net.kv.reading import Layers, Reading
from covey.net.kv.transport import batches
from covey.types.kv import CommitBlock, Grant

R = TypeVar("R")

BATCH_BYTES = 32 * 1024 * 1024
THREAD_BYTES = 2 * 1024 * 1024
"""What a thread must get to be worth starting."""


class SharedMemory:
    """Reads and writes a mapped arena, on the threads of `limiter`: one alone does not reach the memory's speed."""

    def __init__(self, mapping: ArenaMapping, limiter: CapacityLimiter) -> None:
        self._mapping = mapping
        self._limiter = limiter

    async def load(self, held: StoreHeld, reading: Reading) -> None:
        """Copy blocks out of the arena. Raises `LeaseExpired`."""
        copy = _Copy(self._mapping, held, reading)
        for layers in reading.passes():
            each_bytes = reading.size_bytes * layers.count // layers.of // len(reading.into)
            for batch in batches(reading.good, each_bytes, BATCH_BYTES):
                faults = await self._spread(batch, each_bytes, partial(copy.read, layers))
                held.check()  # after the copy: before this moment nobody else was given the slots
                fault = next((fault for fault in faults if fault is not None), None)
                if fault is not None:
                    reading.fail(*fault)
                    break
                await held.advance(len(batch))

    async def store(self, held: StoreHeld, grants: Sequence[Grant], data: Sequence[memoryview]) -> list[CommitBlock]:
        """Copy blocks into granted slots. Raises `LeaseExpired`."""
        shape, mapping = held.key.shape, self._mapping

        def write(blocks: range) -> list[CommitBlock]:
            return [
                CommitBlock(hash=grants[i].hash, checksums=mapping.write(grants[i].offset, shape, data[i]))
                for i in blocks
            ]

        done: list[CommitBlock] = []
        for batch in batches(len(grants), shape.size_bytes, BATCH_BYTES):
            held.check()
            for part in await self._spread(batch, shape.size_bytes, write):
                done += part
            await held.advance(len(batch))
        return done

    async def _spread(self, batch: range, each_bytes: int, work: Callable[[range], R]) -> list[R]:
        """Do a batch in threads, each a stretch of it that is worth a thread; return what each gave, in order."""
        worth = max(1, len(batch) * each_bytes // THREAD_BYTES)
        count = min(int(self._limiter.total_tokens), len(batch), worth)
        bounds = [batch.start + len(batch) * n // count for n in range(count + 1)]
        parts = [range(start, stop) for start, stop in pairwise(bounds)]
        if count == 1:
            return [await to_thread.run_sync(work, batch, limiter=self._limiter)]
        found: dict[int, R] = {}
        failed: list[CoveyError] = []

        async def run(number: int) -> None:
            try:
                found[number] = await to_thread.run_sync(work, parts[number], limiter=self._limiter)
            except CoveyError as error:
                failed.append(error)

        async with anyio.create_task_group() as tg:
            for number in range(count):
                tg.start_soon(run, number)
        if failed:
            raise failed[0]
        return [found[number] for number in range(count)]


class _Copy:
    """Slots seen once, at the first pass over them; their headers are compared again after every copy."""

    def __init__(self, mapping: ArenaMapping, held: StoreHeld, reading: Reading) -> None:
        self._mapping = mapping
        self._held = held
        self._reading = reading
        self._slots: list[SlotView | None] = [None] * len(reading.into)

    def read(self, layers: Layers, blocks: range) -> tuple[int, str] | None:
        """Copy some layers of some blocks; return the first that is bad, and why."""
        for block in blocks:
            try:
                self._slot(block).read(layers, self._reading.piece(block, layers))
            except DataCorrupt as error:
                return block, error.message
        return None

    def _slot(self, block: int) -> SlotView:
        slot = self._slots[block]
        if slot is None:
            location, shape = self._held.locations[block], self._reading.shapes[block]
            slot = self._slots[block] = self._mapping.slot(location, self._held.key.namespace, shape)
        return slot
