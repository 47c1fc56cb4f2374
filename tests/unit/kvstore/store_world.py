"""Clients of a real store actor that die, stall and forget at random, and what must hold whatever they do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from random import Random
from typing import Any, TypeVar

import anyio

from covey.actor import Ref
from covey.errors import CoveyError, FailedPrecondition, Fenced, LeaseExpired, Miss, NoSpace, Overloaded, QuotaExceeded
from covey.net.kv.copying import checksums, digest
from covey.policy.slot import header_bytes, payload_offset
from covey.testing import VirtualClock
from covey.types.block import BlockLocation, BlockShape
from covey.types.ids import BlockHash, LeaseId, NamespaceId, TenantId
from covey.types.kv import (
    BlockKey,
    CommitBlock,
    CommitRequest,
    Grant,
    GrantStatus,
    LeaseGrant,
    LeaseRequest,
    LookupRequest,
    PinKind,
    PinRequest,
    QuarantineRequest,
    RenewRequest,
    ReserveRequest,
)
from covey.types.kv_state import QuotaRequest
from services.kvstore.store import Command, Store

R = TypeVar("R")

SHAPE = BlockShape(size_bytes=4096 - 256, layers=2)
LENGTH = 10
CHAINS = {
    (TenantId(tenant), NamespaceId(tenant.encode() * 16)): [
        [BlockHash(b"%c%c%014d" % (tenant.encode(), 97 + chain, i)) for i in range(LENGTH)] for chain in range(3)
    ]
    for tenant in ("t", "u")
}
COOLING_S = 2.0
FULL = (NoSpace, QuotaExceeded, Overloaded)


def content(name: BlockHash) -> bytes:
    """What a block holds: it follows from its name, so that any other bytes are a fault."""
    return (blake2b(name).digest() * 64)[: SHAPE.size_bytes]


class Died(Exception):
    """The client was killed here."""


@dataclass
class World:
    """What is known beside the store: faults that were done to it, and writers that are at it."""

    store: Store
    actor: Ref[Command[Any]]
    clock: VirtualClock
    rng: Random
    operations: int = 0
    kills: int = 0
    reads: int = 0
    flipped: set[int] = field(default_factory=set)
    """Generations of blocks in which a bit was flipped."""
    bad: dict[int, tuple[NamespaceId, BlockHash]] = field(default_factory=dict)
    """Generations of blocks that were quarantined."""
    writers: dict[tuple[NamespaceId, BlockHash], tuple[LeaseId, float]] = field(default_factory=dict)

    async def ask(self, act: Callable[[Store, float], R]) -> R:
        self.operations += 1
        result = await self.actor.ask(Command(act=act), timeout_s=60)
        if self.operations % 25 == 0:
            self.store.index.check()
        return result

    async def step(self, *, kill: float = 0.06) -> None:
        """Something else happens here, and sometimes the client dies."""
        await anyio.sleep(self.rng.expovariate(8.0))
        if self.rng.random() < kill:
            self.kills += 1
            raise Died


class Client:
    """One holder of leases. Everything it does is checked against what the store promised."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.rng = world.rng
        (self.tenant, self.namespace), chains = self.rng.choice(list(CHAINS.items()))
        self.chain = self.rng.choice(chains)[: self.rng.randint(1, LENGTH)]
        self.ttl_s = self.rng.choice([0.5, 2.0, 5.0])

    async def run(self) -> None:
        """Live once: do something, perhaps die of it."""
        lives = [self.read, self.write, self.write, self.read, self.pin, self.flip, self.meddle, self.change_quota]
        weights = [8, 8, 4, 4, 2, 0.5, 2, 0.3]
        try:
            await self.rng.choices(lives, weights)[0]()
        except (Died, *FULL):
            return

    # -- lives -------------------------------------------------------------------

    async def read(self) -> None:
        world = self.world
        request = LookupRequest(
            tenant=self.tenant, namespace=self.namespace, hashes=tuple(self.chain), owner="r", ttl_s=self.ttl_s,
            shape=SHAPE,
        )  # fmt: skip
        reply = await world.ask(lambda store, now: store.index.lookup(request, now))
        assert list(reply.blocks.names) == self.chain[: len(reply.blocks)], "not prefix-closed"
        assert not world.bad.keys() & {where.generation for where in reply.blocks}, "a bad block is served"
        if reply.lease is None:
            return
        ends_at = world.clock.now() + reply.lease.ttl_s
        for done, where in enumerate(reply.blocks, 1):
            await world.step()
            if self.rng.random() < 0.05:
                await anyio.sleep(self.ttl_s * 1.1)  # stalled: the lease ends in mid-read
            header, payload = self._copy(where)
            if not await self._still_there(reply.lease, where, ends_at):
                return
            if digest(header) != where.digest or checksums(memoryview(payload), SHAPE) != self._sums(where.hash):
                assert where.generation in world.flipped, "bytes changed under a lease"
                await self._quarantine(where)
                return
            assert payload == content(where.hash)
            world.reads += 1
            if self.rng.random() < 0.5:
                ends_at = await self._renew(reply.lease, done, ends_at)
        await self._release(reply.lease, ends_at)

    async def write(self) -> None:
        world = self.world
        parents = [BlockHash(b""), *self.chain]
        blocks = tuple(BlockKey(hash=name, parent=parents[i]) for i, name in enumerate(self.chain))
        request = ReserveRequest(
            tenant=self.tenant, namespace=self.namespace, blocks=blocks, shape=SHAPE, owner="w", ttl_s=self.ttl_s
        )
        reply = await world.ask(lambda store, now: store.reserve(request, now))
        now = world.clock.now()
        ends_at = now + reply.lease.ttl_s
        granted = [grant for grant in reply.grants if grant.status is GrantStatus.GRANTED]
        for grant in granted:
            lease, until = world.writers.get((self.namespace, grant.hash), ("", 0.0))
            assert until <= now or not lease, "two writers of one block"
            world.writers[self.namespace, grant.hash] = reply.lease.lease, ends_at
        for grant in granted:
            try:
                await world.step()
            except Died:
                if self.rng.random() < 0.5:
                    await self._write_late(grant, ends_at)
                raise
            if world.clock.now() >= ends_at:
                break  # as a client does: it writes nothing after its own deadline
            self._fill(grant)
        await self._commit(reply.lease, granted, ends_at)
        await world.step(kill=0.2)
        await self._release(reply.lease, ends_at)

    async def pin(self) -> None:
        world, kind = self.world, self.rng.choice(list(PinKind))
        request = PinRequest(
            tenant=self.tenant, namespace=self.namespace, hashes=tuple(self.chain), ttl_s=self.ttl_s, owner="p",
            kind=kind,
        )  # fmt: skip
        try:
            reply = await world.ask(lambda store, now: store.index.pin(request, now))
        except Miss:
            return
        ends_at = world.clock.now() + reply.lease.ttl_s
        pinned = self.chain[: reply.blocks]
        while world.clock.now() < ends_at:
            if kind is PinKind.HARD:
                seen = await world.ask(lambda store, _: store.index.visible(self.namespace, pinned))
                gone = len(pinned) - len(seen)
                assert not gone or set(world.bad.values()) & {(self.namespace, name) for name in pinned}, (
                    "a pinned block was evicted"
                )
            await world.step(kill=0.1)
        with_lease = LeaseRequest(tenant=self.tenant, lease=reply.lease.lease, epoch=reply.lease.epoch)
        try:
            await world.ask(lambda store, now: store.index.release(with_lease, now))
        except LeaseExpired:
            return
        raise AssertionError("a pin outlived its time")

    async def flip(self) -> None:
        """A bit of a stored block changes, as failing memory does it."""
        slots = await self.world.ask(lambda store, _: store.index.visible(self.namespace, self.chain))
        if slots and len(self.world.bad) < 6:
            slot = self.rng.choice(slots)
            self.world.flipped.add(slot.location.generation)
            self.world.store.payload(slot)[0] ^= 1

    async def meddle(self) -> None:
        """Use what is not ours: another tenant's lease, an older epoch, a slot that was not granted."""
        world = self.world
        if not world.writers:
            return
        (namespace, name), (lease, _) = self.rng.choice(list(world.writers.items()))
        other = TenantId("u" if namespace[:1] == b"t" else "t")
        for tenant, epoch in ((other, 1), (TenantId("t"), 0), (TenantId("x"), 1)):
            request = CommitRequest(
                tenant=tenant, lease=lease, epoch=epoch, blocks=(CommitBlock(hash=name, checksums=(1, 2)),)
            )
            try:
                await world.ask(lambda store, now, request=request: store.commit(request, now))  # type: ignore[misc]
            except (LeaseExpired, Fenced):
                continue
            raise AssertionError("a lease was used by who does not hold it")

    async def change_quota(self) -> None:
        request = QuotaRequest(tenant=self.tenant, quota_bytes=self.rng.choice([0, 4096 * 8, 4096 * 16]))
        await self.world.ask(lambda store, _: store.index.quota(request))

    # -- steps -------------------------------------------------------------------

    async def _still_there(self, grant: LeaseGrant, where: BlockLocation, ends_at: float) -> bool:
        """After each copy: whether the lease stands. While it does the slot is the same."""
        try:
            (slot,) = await self.world.ask(
                lambda store, now: store.index.locate(grant.lease, (where.hash,), now, tenant=self.tenant)
            )
        except LeaseExpired:
            assert self.world.clock.now() >= ends_at - 1e-6, "a lease ended early"
            return False
        except Miss:
            assert where.generation in self.world.bad
            return False
        assert self.world.clock.now() < ends_at + 1e-6, "a lease outlived its time"
        assert slot.location == where, "a leased block moved"
        return True

    async def _commit(self, grant: LeaseGrant, granted: list[Grant], ends_at: float) -> None:
        world, done = self.world, self.rng.randint(0, len(granted))
        blocks = tuple(CommitBlock(hash=each.hash, checksums=self._sums(each.hash)) for each in granted[:done])
        request = CommitRequest(tenant=self.tenant, lease=grant.lease, epoch=grant.epoch, blocks=blocks)
        try:
            await world.ask(lambda store, now: store.commit(request, now))
        except LeaseExpired:
            assert world.clock.now() >= ends_at - 1e-6, "a lease ended early"
            return
        except FailedPrecondition:
            assert world.bad, "a parent can only have gone by quarantine"
            return
        for block in blocks:
            world.writers.pop((self.namespace, block.hash), None)
        seen = await world.ask(lambda store, _: store.index.visible(self.namespace, [b.hash for b in blocks]))
        assert len(seen) == len(blocks) or world.bad or world.clock.now() >= ends_at, "a commit was not visible"

    async def _renew(self, grant: LeaseGrant, done: int, ends_at: float) -> float:
        request = RenewRequest(tenant=self.tenant, lease=grant.lease, epoch=grant.epoch, done=done, ttl_s=self.ttl_s)
        try:
            renewed = await self.world.ask(lambda store, now: store.index.renew(request, now))
        except LeaseExpired:
            assert self.world.clock.now() >= ends_at - 1e-6, "a lease ended early"
            raise Died from None
        return self.world.clock.now() + renewed.ttl_s

    async def _release(self, grant: LeaseGrant, ends_at: float) -> None:
        if self.rng.random() < 0.2:
            return  # lost on its way
        request = LeaseRequest(tenant=self.tenant, lease=grant.lease, epoch=grant.epoch)
        try:
            await self.world.ask(lambda store, now: store.index.release(request, now))
        except LeaseExpired:
            assert self.world.clock.now() >= ends_at - 1e-6, "a lease ended early"
        else:
            ended = [key for key, (lease, _) in self.world.writers.items() if lease == grant.lease]
            for key in ended:
                del self.world.writers[key]

    async def _quarantine(self, where: BlockLocation) -> None:
        request = QuarantineRequest(tenant=self.tenant, namespace=self.namespace, hash=where.hash, reason="flipped")

        def condemn(store: Store, now: float) -> None:
            seen = store.index.visible(self.namespace, (where.hash,))
            if seen and store.index.quarantine(request, now):
                self.world.bad[seen[0].location.generation] = self.namespace, where.hash

        await self.world.ask(condemn)

    async def _write_late(self, grant: Grant, ends_at: float) -> None:
        """Presumed dead, it wakes while its slot cools and writes on: nobody may notice."""
        await anyio.sleep(max(0.0, ends_at - self.world.clock.now()) + self.rng.random() * COOLING_S * 0.9)
        if self.world.clock.now() < ends_at + COOLING_S:
            self._at(grant.offset)[:] = b"\xee" * SHAPE.size_bytes

    def _fill(self, grant: Grant) -> None:
        self._at(grant.offset)[:] = content(grant.hash)

    def _copy(self, where: BlockLocation) -> tuple[bytes, bytes]:
        view, start = self.world.store.arena.view, where.offset
        return bytes(view[start : start + header_bytes(SHAPE)]), bytes(self._at(start))

    def _at(self, offset: int) -> memoryview:
        start = offset + payload_offset(SHAPE)
        return self.world.store.arena.view[start : start + SHAPE.size_bytes]

    def _sums(self, name: BlockHash) -> tuple[int, ...]:
        return checksums(memoryview(content(name)), SHAPE)


async def settled(world: World) -> None:
    """Wait until everybody's time is up, and see that nothing is left of anybody."""
    await anyio.sleep(60.0)
    await world.ask(lambda store, now: store.index.expire(now))
    stats = world.store.index.stats()
    left = (stats.leases, stats.leased_blocks, stats.pinned_blocks, stats.reserved_blocks, stats.private_blocks)
    assert left == (0, 0, 0, 0, 0), "something leaked"
    world.store.index.check()


__all__ = ["CHAINS", "COOLING_S", "SHAPE", "Client", "CoveyError", "World", "content", "settled"]
