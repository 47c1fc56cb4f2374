"""Copies stored blocks from one node to another, as an ordinary reader of the one and writer of the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import anyio

from covey.errors import DeadlineExceeded, LeaseExpired, Miss, Pending
from covey.net.kv.client import KvClient
from covey.types.ids import WorkerId
from covey.types.kv import BlockKey
from covey.types.store import StoreKey

BATCH_BYTES: Final = 8 * 1024 * 1024
BATCH_BLOCKS: Final = 256
OWNER: Final = "copy"


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyLimits:
    """`timeout_s` bounds each batch of at most 8 MiB, `bytes_per_s` the pace of all copies of one copier together."""

    timeout_s: float = 10.0
    bytes_per_s: float = 512 * 1024 * 1024


class Copier:
    """Copies on behalf of one node. Every block is verified when it is read and sealed anew when it is written."""

    def __init__(self, client: KvClient, source: WorkerId, limits: CopyLimits | None = None) -> None:
        self.copied_blocks = 0
        self._client = client
        self._source = source
        self._limits = limits or CopyLimits()
        self._pace = anyio.Lock()

    async def copy(self, key: StoreKey, blocks: Sequence[BlockKey], to: WorkerId) -> int:
        """Put blocks, parents first, on `to` as far as they are here and verify; return how many it has now.

        Raises:
            Unavailable: one of the nodes does not answer, or refuses writes.
            DeadlineExceeded: a batch took too long.
            NoSpace: `to` is full of what is in use. QuotaExceeded likewise.
        """
        size = max(1, min(BATCH_BLOCKS, BATCH_BYTES // key.shape.size_bytes))
        there = done = 0
        while done < len(blocks):
            batch = blocks[done : done + size]
            with anyio.move_on_after(self._limits.timeout_s) as scope:
                good = await self._copy_batch(key, batch, to)
            if scope.cancelled_caught:
                raise DeadlineExceeded(f"copying {len(batch)} blocks to kvstore {to} took too long")
            there += good
            done += max(good, 1) if good < len(batch) else good  # what is bad or gone is left out
        return there

    async def _copy_batch(self, key: StoreKey, batch: Sequence[BlockKey], to: WorkerId) -> int:
        ttl_s = 2 * self._limits.timeout_s
        names = [block.hash for block in batch]
        theirs = await self._client.lookup_on(to, key, names, owner=OWNER, ttl_s=ttl_s)
        try:
            known = len(theirs.hashes)
            if known == len(batch):
                return known
            ours = await self._client.lookup_on(self._source, key, names[known:], owner=OWNER, ttl_s=ttl_s)
            try:
                count = len(ours.hashes)
                data = [memoryview(bytearray(key.shape.size_bytes)) for _ in range(count)]
                good = await self._client.load(ours, data)
            except LeaseExpired:
                good = 0
            finally:
                await ours.release()
            if not good:
                return known
            return known + await self._put(key, batch[known : known + good], data[:good], to, ttl_s)
        finally:
            await theirs.release()

    async def _put(
        self, key: StoreKey, blocks: Sequence[BlockKey], data: Sequence[memoryview], to: WorkerId, ttl_s: float
    ) -> int:
        try:
            held = await self._client.store_on(to, key, blocks, data, owner=OWNER, ttl_s=ttl_s)
        except (Miss, Pending):
            return 0  # their parents are not there, or somebody else is writing them
        await held.release()
        self.copied_blocks += len(blocks)
        async with self._pace:
            await anyio.sleep(len(blocks) * key.shape.size_bytes / self._limits.bytes_per_s)
        return len(blocks)
