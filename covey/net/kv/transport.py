"""What moves blocks between a caller's buffers and one node: one interface, whatever carries them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from covey.net.kv.held import StoreHeld
from covey.net.kv.reading import Reading
from covey.types.kv import CommitBlock, Grant

BATCH_BYTES = 8 * 1024 * 1024
"""Moved in one go, off the event loop: the lease is looked at, and renewed by the progress, in between."""


class Transport(Protocol):
    """Reads and writes leased blocks of one node. Cancelling a call frees its connection and its threads at once."""

    async def load(self, held: StoreHeld, reading: Reading) -> None:
        """Fill what `reading` asks for, verified; a node that goes away ends it early. Raises `LeaseExpired`."""
        ...

    async def store(self, held: StoreHeld, grants: Sequence[Grant], data: Sequence[memoryview]) -> list[CommitBlock]:
        """Write blocks into granted slots. Raises `LeaseExpired`, `Unavailable` and what the node answers."""
        ...


def batches(count: int, each_bytes: int, batch_bytes: int = BATCH_BYTES) -> Iterator[range]:
    """Yield runs of blocks, each of about `batch_bytes` and at least one block."""
    size = max(1, batch_bytes // each_bytes)
    for start in range(0, count, size):
        yield range(start, min(count, start + size))
