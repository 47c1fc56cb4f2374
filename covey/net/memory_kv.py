"""A `BlockStore` in this process's memory: the same index as a real node, under the same contract suite."""

from __future__ import annotations

from collections.abc import Sequence

import anyio

from covey.clock import Clock
from covey.errors import CoveyError, InvalidArgument, LeaseExpired, Miss, Unavailable
from covey.net.kv.copying import checksums, layer_sums
from covey.net.kv.reading import Layers, Reading
from covey.policy.arena import Arena
from covey.policy.store_index import Placed, StoreIndex, StoreLimits
from covey.types.ids import BlockHash
from covey.types.kv import (
    BlockKey,
    CommitBlock,
    CommitRequest,
    GrantStatus,
    LeaseGrant,
    LeaseRequest,
    LookupRequest,
    PinRequest,
    QuarantineRequest,
    ReserveReply,
    ReserveRequest,
)
from covey.types.store import Held, Ready, StoreKey

PENDING_WAIT_S = 0.02


class MemoryHeld:
    """A lease of a `MemoryBlockStore`."""

    def __init__(self, store: MemoryBlockStore, key: StoreKey, grant: LeaseGrant | None, hashes: tuple[BlockHash, ...]):
        self.key = key
        self.grant = grant
        self._store = store
        self._hashes = hashes

    @property
    def hashes(self) -> tuple[BlockHash, ...]:
        return self._hashes

    async def release(self) -> None:
        """Give the lease back; safe to call twice."""
        if self.grant is not None:
            self._store.release(self.grant)
            self.grant = None


class MemoryBlockStore:
    """Blocks as bytes objects. `index` is public, for tests that look behind the contract or act as other writers."""

    def __init__(self, *, clock: Clock, capacity_bytes: int = 64 << 20, limits: StoreLimits | None = None) -> None:
        self.index = StoreIndex(arena=Arena(capacity_bytes), epoch=1, name="memory", limits=limits)
        self._clock = clock
        self._slots: dict[int, tuple[int, bytearray, tuple[int, ...]]] = {}  # offset: bounded by the arena

    async def lookup(self, key: StoreKey, hashes: Sequence[BlockHash], *, owner: str, ttl_s: float) -> Held:
        """Lease the longest stored prefix of `hashes`."""
        await anyio.lowlevel.checkpoint()
        request = LookupRequest(
            tenant=key.tenant, namespace=key.namespace, hashes=tuple(hashes), owner=owner, ttl_s=ttl_s, shape=key.shape
        )
        reply = self.index.lookup(request, self._clock.now())
        return MemoryHeld(self, key, reply.lease, reply.blocks.names)

    async def load(self, held: Held, into: Sequence[memoryview], *, ready: Ready | None = None) -> int:
        """Copy leased blocks into buffers, verified; return how many leading ones are good. Raises `LeaseExpired`."""
        await anyio.lowlevel.checkpoint()
        if not isinstance(held, MemoryHeld) or not held.hashes:
            return 0
        if held.grant is None:
            raise LeaseExpired("this lease was released", field="lease")
        _check_sizes(held.key, into, "into")
        count = min(len(held.hashes), len(into))
        reading = Reading([view.cast("B") for view in into[:count]], [held.key.shape] * count, ready)
        self.index.locate(held.grant.lease, (), self._clock.now())
        for layers in reading.passes():
            for block in range(reading.good):
                fault = self._copy_out(held.grant, held.hashes[block], reading.piece(block, layers), layers)
                if fault:
                    reading.fail(block, fault)
                    break
            if reading.by_layer:
                await anyio.lowlevel.checkpoint()
        if reading.fault:
            name = held.hashes[reading.good]
            bad = QuarantineRequest(
                tenant=held.key.tenant, namespace=held.key.namespace, hash=name, reason=reading.fault
            )
            self.index.quarantine(bad, self._clock.now())
        return reading.good

    async def store(
        self, key: StoreKey, blocks: Sequence[BlockKey], data: Sequence[memoryview], *, owner: str, ttl_s: float,
        private: bool = False,
    ) -> Held:  # fmt: skip
        """Write blocks that are not there yet and lease them all. Raises `NoSpace` and `Unavailable`."""
        await anyio.lowlevel.checkpoint()
        if len(blocks) != len(data):
            raise InvalidArgument("each block needs its data", field="data")
        _check_sizes(key, data, "data")
        if not blocks:
            return MemoryHeld(self, key, None, ())
        request = ReserveRequest(
            tenant=key.tenant, namespace=key.namespace, blocks=tuple(blocks), shape=key.shape, owner=owner,
            ttl_s=ttl_s, private=private,
        )  # fmt: skip
        reply = await self._reserve(request)
        granted = {grant.hash for grant in reply.grants if grant.status is GrantStatus.GRANTED}
        sources = {block.hash: view for block, view in zip(blocks, data, strict=True) if block.hash in granted}
        self._fill(reply, sources, self._clock.now())
        return MemoryHeld(self, key, reply.lease, tuple(block.hash for block in blocks))

    async def pin(self, key: StoreKey, hashes: Sequence[BlockHash], *, owner: str, ttl_s: float) -> Held:
        """Keep the stored prefix of `hashes` from eviction for `ttl_s` seconds."""
        await anyio.lowlevel.checkpoint()
        request = PinRequest(tenant=key.tenant, namespace=key.namespace, hashes=tuple(hashes), ttl_s=ttl_s, owner=owner)
        try:
            reply = self.index.pin(request, self._clock.now())
        except Miss:
            return MemoryHeld(self, key, None, ())
        return MemoryHeld(self, key, reply.lease, tuple(hashes[: reply.blocks]))

    def release(self, grant: LeaseGrant) -> None:
        """End a lease, if it has not ended already."""
        try:
            self.index.release(LeaseRequest(lease=grant.lease, epoch=grant.epoch), self._clock.now())
        except LeaseExpired:
            return

    def corrupt(self, offset: int, at: int = 0) -> None:
        """Flip a bit in the byte `at` of the block in a slot, as failing memory does."""
        self._slots[offset][1][at] ^= 1

    async def _reserve(self, request: ReserveRequest) -> ReserveReply:
        give_up_at = self._clock.now() + request.ttl_s
        while True:
            try:
                reply = self.index.reserve(request, self._clock.now())
            except Miss as error:
                raise Unavailable(f"not stored: {error.message}") from error
            if all(grant.status is not GrantStatus.PENDING for grant in reply.grants):
                return reply
            self.release(reply.lease)
            if self._clock.now() >= give_up_at:
                raise Unavailable("another writer holds these blocks and does not finish")
            await anyio.sleep(PENDING_WAIT_S)

    def _fill(self, reply: ReserveReply, sources: dict[BlockHash, memoryview], now: float) -> None:
        commits = []
        try:
            for name, source in sources.items():
                slot = self.index.writable(reply.lease.lease, name, now)
                copy = bytearray(source)
                sums = checksums(memoryview(copy), slot.shape)
                self._slots[slot.location.offset] = (slot.location.generation, copy, sums)
                commits.append(CommitBlock(hash=name, checksums=sums))
            request = CommitRequest(lease=reply.lease.lease, epoch=reply.lease.epoch, blocks=tuple(commits))
            self.index.can_commit(request, now)
        except CoveyError:
            self.release(reply.lease)
            raise
        self.index.commit(reply.lease.lease, dict.fromkeys(sources, 0), now)

    def _copy_out(self, grant: LeaseGrant, name: BlockHash, into: memoryview, layers: Layers) -> str:
        try:
            (slot,) = self.index.locate(grant.lease, (name,), self._clock.now())
        except Miss:
            return "the block was taken out"
        data, sums = self._contents(slot)
        into[:] = memoryview(data)[layers.within(slot.shape)]
        is_good = layer_sums(into, layers.count) == sums[layers.first : layers.last]
        return "" if is_good else "a layer does not have its checksum"

    def _contents(self, slot: Placed) -> tuple[bytearray, tuple[int, ...]]:
        generation, data, sums = self._slots[slot.location.offset]
        assert generation == slot.location.generation, "a leased slot was used again"
        return data, sums


def _check_sizes(key: StoreKey, views: Sequence[memoryview], field: str) -> None:
    for i, view in enumerate(views):
        if view.nbytes != key.shape.size_bytes:
            raise InvalidArgument(f"a buffer of {key.shape.size_bytes} bytes is needed", field=f"{field}[{i}]")
