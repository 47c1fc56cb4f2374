"""The index of a store: who may read, write or keep which blocks, and until when."""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from covey.errors import CoveyError, FailedPrecondition, Fenced, InvalidArgument, Miss, NoSpace, Overloaded
from covey.lease import Lease, LeaseTable
from covey.policy.arena import Arena
from covey.policy.shelf import IndexChange, Shelf, Space
from covey.policy.slot import slot_bytes
from covey.policy.store_block import Block, BlockState, EvictionScore, least_recently_used
from covey.types.ids import BlockHash, LeaseId, NamespaceId, TenantId
from covey.types.kv import (
    BlockCodec,
    BlockKey,
    BlockLocation,
    BlockLocations,
    BlockShape,
    CommitRequest,
    Grant,
    GrantStatus,
    KvEventKind,
    LeaseGrant,
    LeaseRequest,
    LookupReply,
    LookupRequest,
    PinKind,
    PinReply,
    PinRequest,
    QuarantineRequest,
    QuotaReply,
    QuotaRequest,
    RenewRequest,
    ReserveReply,
    ReserveRequest,
    StoreStats,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreLimits:
    """Bounds of a store. `cooling_s` is how long a slot rests after its writer was presumed dead."""

    blocks_max: int = 1_048_576
    leases_max: int = 65_536
    lease_refs_max: int = 4_194_304
    lease_cap_s: float = 600.0
    pin_ttl_max_s: float = 3600.0
    pinned_share: float = 0.8
    cooling_s: float = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A block's slot and geometry."""

    namespace: NamespaceId
    location: BlockLocation
    shape: BlockShape
    """As it lies in the slot: of an encoded payload, `size_bytes` is the encoded size."""
    parent: BlockHash = BlockHash(b"")
    tenant: TenantId = TenantId("")
    codec: BlockCodec = BlockCodec.RAW


_CODECS = tuple(BlockCodec)


class _Right(IntEnum):
    READ = 0
    WRITE = 1
    PIN = 2


@dataclass(slots=True, eq=False)
class _Holding:
    """What a lease covers: blocks it keeps, and slots it may still fill."""

    right: _Right
    refs: int
    blocks: dict[BlockHash, Block] = field(default_factory=dict)
    reserved: dict[BlockHash, Block] = field(default_factory=dict)
    drafts: dict[BlockHash, Block] = field(default_factory=dict)


class StoreIndex:
    """Leases, pins and reservations of one node; pure, so the caller passes `now`, which never decreases.

    Contract: committed blocks are immutable and visible only with all their ancestors; a block is evicted
    only when it is a leaf without lease or pin; a private block goes with its last lease; every right ends
    by itself. All of it is checked by `check`.
    """

    def __init__(
        self,
        *,
        arena: Arena,
        epoch: int,
        name: str,
        limits: StoreLimits | None = None,
        score: EvictionScore = least_recently_used,
    ) -> None:
        """`epoch` is this life of the store, `name` prefixes its lease ids."""
        self.epoch = epoch
        self.limits = limits or StoreLimits()
        self._shelf = Shelf(arena=arena, blocks_max=self.limits.blocks_max, score=score)
        self._leases = LeaseTable(name=name, capacity=self.limits.leases_max)
        self._holdings: dict[LeaseId, _Holding] = {}
        self._soft_pins: dict[LeaseId, None] = {}
        self._refs = self._hits = self._misses = 0

    # -- reading -----------------------------------------------------------------

    def lookup(self, request: LookupRequest, now: float) -> LookupReply:
        """Lease the longest visible prefix of the hashes. Raises `LayoutMismatch` and `Overloaded`."""
        self.expire(now)
        found = _readable(self._shelf.prefix(request.namespace, request.hashes, request.shape), request.codecs)
        self._hits += len(found)
        self._misses += len(request.hashes) - len(found)
        if not found:
            return LookupReply()
        lease = self._grant_over(_Right.READ, found, request.owner, request.ttl_s, now)
        return LookupReply(blocks=_locations(found), lease=_as_grant(lease, now))

    def locate(self, lease_id: LeaseId, hashes: Sequence[BlockHash], now: float) -> tuple[Placed, ...]:
        """Return the slots of leased blocks. Raises `LeaseExpired`, and `Miss` for a block not under the lease."""
        self._leases.get(lease_id, now=now)
        blocks = self._holdings[lease_id].blocks
        placed = []
        for i, name in enumerate(hashes):
            block = blocks.get(name)
            if block is None or block.state is BlockState.GONE:
                raise Miss("the lease does not cover this block", field=f"hashes[{i}]")
            placed.append(_placed(block))
        return tuple(placed)

    def pin(self, request: PinRequest, now: float) -> PinReply:
        """Keep a visible prefix of the hashes from eviction.

        A soft pin ends early when a writer finds no other room; a hard one never does. Raises `Miss` when
        nothing is stored, and `NoSpace` when pins would hold more than their share of the store.
        """
        self.expire(now)
        found = self._shelf.prefix(request.namespace, request.hashes, None)
        if not found:
            raise Miss("none of these blocks is stored", field="hashes")
        fresh_bytes = sum(block.slot_bytes for block in found if not block.pins)
        if self._shelf.pinned_bytes + fresh_bytes > self.limits.pinned_share * self._shelf.arena.capacity_bytes:
            raise NoSpace("pins hold their share of this store", retry_after_ms=self._retry_after_ms(now))
        lease = self._grant_over(_Right.PIN, found, request.owner, request.ttl_s, now)
        if request.kind is PinKind.SOFT:
            self._soft_pins[lease.id] = None
        self._shelf.tell(KvEventKind.PINNED, _pinned_once(found))
        return PinReply(lease=_as_grant(lease, now), blocks=len(found))

    # -- writing -----------------------------------------------------------------

    def reserve(self, request: ReserveRequest, now: float) -> ReserveReply:
        """Grant slots for blocks that are not there, all or none.

        A block that another writer holds is PENDING, and so is all that grows from it: ask again. When that
        writer's lease ends the next one to ask takes over. Raises `NoSpace`, `LayoutMismatch`, `Overloaded`,
        and `Miss` when the block that the first one grows from is not stored.
        """
        self.expire(now)
        if slot_bytes(request.shape) * len(request.blocks) > self._shelf.arena.capacity_bytes:
            raise NoSpace("these blocks are larger than the whole store")
        space = self._shelf.space(request.namespace, request.shape)
        lease = self._grant(_Right.WRITE, request.owner, request.ttl_s, len(request.blocks) + 1, now)
        holding = self._holdings[lease.id]
        try:
            pending: set[BlockHash] = set()
            grants = tuple(self._take(space, request, i, holding, pending, now) for i in range(len(request.blocks)))
        except CoveyError:
            self._end(lease.id, now)
            raise
        return ReserveReply(lease=_as_grant(lease, now), grants=grants)

    def writable(self, lease_id: LeaseId, name: BlockHash, now: float) -> Placed:
        """Return the slot that a lease may fill. Raises `LeaseExpired`, and `Fenced` if it is not its to fill."""
        self._leases.get(lease_id, now=now)
        holding = self._holdings[lease_id]
        block = holding.reserved.get(name) or holding.drafts.get(name)
        if block is None:
            raise Fenced("this lease has no such slot to fill", field="hash")
        return _placed(block)

    def can_commit(self, request: CommitRequest, now: float) -> tuple[Placed, ...]:
        """Return the slots whose headers to seal before `commit`; those committed before are left out.

        Raises `Fenced`, `LeaseExpired`, `InvalidArgument` for a block that was not granted or has a wrong number
        of checksums, and `FailedPrecondition` for one whose parent is not visible.
        """
        self._authorize(request.lease, request.epoch, now)
        holding = self._holdings[request.lease]
        ready: dict[Block, None] = {}
        for i, item in enumerate(request.blocks):
            block = holding.reserved.get(item.hash)
            if block is None:
                if item.hash not in holding.blocks:
                    raise InvalidArgument("this block was not granted to the lease", field=f"blocks[{i}].hash")
                continue
            if len(item.checksums) != block.shape.layers:
                raise InvalidArgument(f"a block has {block.shape.layers} checksums", field=f"blocks[{i}].checksums")
            parent = block.parent
            if parent is not None and parent.state is not BlockState.COMMITTED and parent not in ready:
                raise FailedPrecondition("the block before it is not stored", field=f"blocks[{i}].hash")
            ready[block] = None
        return tuple(map(_placed, ready))

    def commit(self, lease_id: LeaseId, digests: Mapping[BlockHash, int], now: float) -> None:
        """Make blocks that `can_commit` returned visible, with the digests of their sealed headers."""
        holding = self._holdings[lease_id]
        done = []
        for name, digest in digests.items():
            block = holding.reserved.pop(name)
            self._shelf.seal(block, digest)
            self._shelf.hold(block, now, pin=False)
            holding.blocks[name] = block
            done.append(block)
        self._shelf.tell(KvEventKind.STORED, done)

    def draft(
        self, namespace: NamespaceId, sizes: Mapping[BlockHash, int], codec: BlockCodec, *, owner: str, ttl_s: float,
        now: float,
    ) -> tuple[LeaseGrant, tuple[Placed, ...]]:  # fmt: skip
        """Take slots for new versions of visible blocks, of so many payload bytes each, under a lease of the store.

        Fill the slots, then `replace`; readers see the old versions until then. Raises `Miss` for a block that is
        not visible, `NoSpace`, `Overloaded` and `InvalidArgument`; then nothing is taken.
        """
        self.expire(now)
        lease = self._grant(_Right.WRITE, owner, ttl_s, len(sizes), now)
        holding = self._holdings[lease.id]
        try:
            for name, size_bytes in sizes.items():
                (block,) = self._shelf.prefix(namespace, (name,), None) or (None,)
                if block is None:
                    raise Miss("this block is not stored", field="hashes")
                draft = self._shelf.draft(block, size_bytes, codec)
                if draft is None:
                    raise NoSpace("every block is leased or pinned", retry_after_ms=self._retry_after_ms(now))
                holding.drafts[name] = draft
        except CoveyError:
            self._end(lease.id, now)
            raise
        return _as_grant(lease, now), tuple(map(_placed, holding.drafts.values()))

    def replace(self, lease_id: LeaseId, digests: Mapping[BlockHash, int], now: float) -> int:
        """Put drafts with sealed headers in the place of what readers see; the lease does not cover them afterwards.

        The old slots are free when their leases end. A block that went since `draft` is left out. Returns how many
        were replaced. Raises `LeaseExpired`, and `Fenced` for a block without a draft.
        """
        self._leases.get(lease_id, now=now)
        drafts = self._holdings[lease_id].drafts
        if not digests.keys() <= drafts.keys():
            raise Fenced("this lease has no such slot to fill", field="hash")
        return sum(self._shelf.swap(drafts.pop(name), digest) for name, digest in digests.items())

    # -- leases ------------------------------------------------------------------

    def renew(self, request: RenewRequest, now: float) -> LeaseGrant:
        """Extend a lease by its own time-to-live if its owner made progress. Raises `Fenced` and `LeaseExpired`."""
        lease = self._authorize(request.lease, request.epoch, now)
        renewed = self._leases.renew(lease.id, lease.owner, lease.epoch, progress=request.done, now=now)
        return _as_grant(renewed, now)

    def release(self, request: LeaseRequest, now: float) -> None:
        """End a lease of any kind; uncommitted slots are free at once. Raises `Fenced` and `LeaseExpired`."""
        lease = self._authorize(request.lease, request.epoch, now)
        self._end(lease.id, now)

    def next_due(self) -> float | None:
        """Return a moment no later than the next one at which `expire` has something to do."""
        return min((at for at in (self._shelf.next_due(), self._leases.next_expiry()) if at is not None), default=None)

    def expire(self, now: float) -> None:
        """End every right whose time is up and free what has cooled."""
        for lease in self._leases.expire(now):
            self._drop(lease.id, cool_until=now + self.limits.cooling_s)
        self._shelf.thaw(now)

    def quarantine(self, request: QuarantineRequest, now: float) -> bool:
        """Take a bad block out: it and all that grows from it are no longer visible, its slot is never used again."""
        self.expire(now)
        return self._shelf.quarantine(request.namespace, request.hash)

    def quota(self, request: QuotaRequest) -> QuotaReply:
        """Say what a tenant may use and uses here."""
        used_bytes = sum(block.slot_bytes for block in self._shelf.every() if block.tenant == request.tenant)
        return QuotaReply(tenant=request.tenant, quota_bytes=0, used_bytes=used_bytes)

    # -- views -------------------------------------------------------------------

    def coldest(self, count: int, now: float) -> tuple[Placed, ...]:
        """Return the blocks that would be evicted next, worst first; changes nothing but what has expired."""
        self.expire(now)
        return tuple(map(_placed, self._shelf.coldest(count)))

    def visible(self, namespace: NamespaceId, hashes: Sequence[BlockHash]) -> tuple[Placed, ...]:
        """Return those of the named shared blocks that are stored, without leasing or touching them."""
        return tuple(map(_placed, self._shelf.visible(namespace, hashes)))

    def drop(self, namespace: NamespaceId, hashes: Sequence[BlockHash], now: float) -> int:
        """Evict the named blocks, parents first in `hashes`, except what somebody needs; return how many went."""
        self.expire(now)
        return sum(self._shelf.drop(block) for block in reversed(self._shelf.visible(namespace, hashes)))

    def drain_changes(self) -> tuple[IndexChange, ...]:
        """Return what became visible or went since the last call, in order."""
        return self._shelf.drain_changes()

    def snapshot(self) -> Iterator[tuple[NamespaceId, tuple[BlockHash, ...]]]:
        """Yield each namespace's shared blocks, parents first."""
        return self._shelf.snapshot()

    def stats(self) -> StoreStats:
        """Count what is there."""
        return self._shelf.stats(leases=len(self._leases), hits=self._hits, misses=self._misses)

    def check(self) -> None:
        """Assert the invariants that hold between any two calls."""
        self._leases.check()
        self._shelf.check()
        assert {lease.id for lease in self._leases.leases()} == self._holdings.keys()
        assert self._soft_pins.keys() <= self._holdings.keys()
        held: dict[Block, int] = {}
        pins: dict[Block, int] = {}
        reserved: list[Block] = []
        for holding in self._holdings.values():
            reserved += holding.reserved.values()
            for block in holding.blocks.values():
                held[block] = held.get(block, 0) + 1
                pins[block] = pins.get(block, 0) + (holding.right is _Right.PIN)
        for block in (*self._shelf.every(), *held):
            assert block.held == held.get(block, 0), "a lease was lost or counted twice"
            assert block.pins == pins.get(block, 0)
        in_shelf = [block for block in self._shelf.every() if block.state is BlockState.RESERVED]
        assert set(in_shelf) == set(reserved), "a reservation without a lease"
        assert len(reserved) == len(in_shelf), "two writers of one block"
        assert self._refs == sum(holding.refs for holding in self._holdings.values()) <= self.limits.lease_refs_max

    # -- inside ------------------------------------------------------------------

    def _take(
        self, space: Space, request: ReserveRequest, i: int, holding: _Holding, pending: set[BlockHash], now: float
    ) -> Grant:
        key = request.blocks[i]
        if key.hash in holding.reserved or key.hash in pending:
            raise InvalidArgument("this block is named twice", field=f"blocks[{i}].hash")
        block = space.blocks.get(key.hash)
        if block is not None and block.state is BlockState.COMMITTED:
            self._keep(holding, block, now)
            return Grant(hash=key.hash, status=GrantStatus.EXISTS, offset=block.offset, generation=block.generation)
        parent = space.blocks.get(key.parent) if key.parent else None
        foreign = parent is not None and parent.state is BlockState.RESERVED and key.parent not in holding.reserved
        if block is not None or foreign or key.parent in pending:
            pending.add(key.hash)
            return Grant(hash=key.hash, status=GrantStatus.PENDING)
        if key.parent and parent is None:
            raise Miss("the block that it grows from is not stored", field=f"blocks[{i}].parent")
        if parent is not None and parent.private and not request.private:
            raise InvalidArgument("a shared block cannot grow from a private one", field=f"blocks[{i}].parent")
        if parent is not None and parent.state is BlockState.COMMITTED:
            self._keep(holding, parent, now)
        block = self._add(space, request, key, parent, now)
        holding.reserved[key.hash] = block
        return Grant(hash=key.hash, status=GrantStatus.GRANTED, offset=block.offset, generation=block.generation)

    def _add(self, space: Space, request: ReserveRequest, key: BlockKey, parent: Block | None, now: float) -> Block:
        while True:
            block = self._shelf.add(
                request.namespace, space, key.hash, parent, private=request.private, tenant=request.tenant
            )
            if block is not None:
                return block
            if not self._soft_pins:
                raise NoSpace("every block is leased or pinned", retry_after_ms=self._retry_after_ms(now))
            self._end(next(iter(self._soft_pins)), now)

    def _keep(self, holding: _Holding, block: Block, now: float) -> None:
        if block.hash not in holding.blocks:
            self._shelf.hold(block, now, pin=holding.right is _Right.PIN)
            holding.blocks[block.hash] = block

    def _grant_over(self, right: _Right, blocks: Sequence[Block], owner: str, ttl_s: float, now: float) -> Lease:
        lease = self._grant(right, owner, ttl_s, len(blocks), now)
        for block in blocks:
            self._keep(self._holdings[lease.id], block, now)
        return lease

    def _grant(self, right: _Right, owner: str, ttl_s: float, refs: int, now: float) -> Lease:
        if self._refs + refs > self.limits.lease_refs_max:
            raise Overloaded("leases cover too many blocks", retry_after_ms=self._retry_after_ms(now))
        cap_s = self.limits.pin_ttl_max_s if right is _Right.PIN else self.limits.lease_cap_s
        ttl_s = min(ttl_s, cap_s)
        cap_s = ttl_s if right is _Right.PIN else cap_s  # a pin shows no progress, so nothing renews it
        lease = self._leases.grant(owner, self.epoch, ttl_s=ttl_s, cap_s=cap_s, now=now)
        self._holdings[lease.id] = _Holding(right=right, refs=refs)
        self._refs += refs
        return lease

    def _authorize(self, lease_id: LeaseId, epoch: int, now: float) -> Lease:
        if epoch != self.epoch:
            raise Fenced(f"epoch {epoch} of this store is over; ask again", field="epoch")
        return self._leases.get(lease_id, now=now)

    def _end(self, lease_id: LeaseId, now: float) -> None:
        lease = self._leases.get(lease_id, now=now)
        self._leases.release(lease.id, lease.owner, lease.epoch, now=now)
        self._drop(lease.id, cool_until=None)

    def _drop(self, lease_id: LeaseId, *, cool_until: float | None) -> None:
        holding = self._holdings.pop(lease_id)
        self._refs -= holding.refs
        self._soft_pins.pop(lease_id, None)
        for block in reversed(holding.reserved.values()):
            self._shelf.discard(block, cool_until=cool_until)
        for block in holding.drafts.values():
            self._shelf.drop_draft(block)
        if holding.right is _Right.PIN:
            self._shelf.tell(KvEventKind.UNPINNED, _pinned_once(holding.blocks.values()))
        for block in reversed(holding.blocks.values()):
            self._shelf.unhold(block, pin=holding.right is _Right.PIN)

    def _retry_after_ms(self, now: float) -> int | None:
        due = self.next_due()
        return None if due is None else max(1, round((due - now) * 1000))


def _readable(blocks: list[Block], codecs: Collection[BlockCodec]) -> list[Block]:
    """The prefix that a reader takes who takes these lossy codecs."""
    for i, block in enumerate(blocks):
        if block.codec is not BlockCodec.RAW and block.codec not in codecs:
            return blocks[:i]
    return blocks


def _location(block: Block) -> BlockLocation:
    return BlockLocation(
        hash=block.hash, offset=block.offset, generation=block.generation, digest=block.digest, codec=block.codec,
        size_bytes=block.shape.size_bytes if block.codec is not BlockCodec.RAW else 0,
    )  # fmt: skip


def _locations(blocks: Sequence[Block]) -> BlockLocations:
    count = len(blocks)
    codecs = sizes = b""
    if any(block.codec is not BlockCodec.RAW for block in blocks):
        codecs = bytes(_CODECS.index(block.codec) + 1 for block in blocks)
        sizes = struct.pack(f"<{count}Q", *(_location(block).size_bytes for block in blocks))
    return BlockLocations(
        hashes=b"".join(block.hash for block in blocks),
        offsets=struct.pack(f"<{count}Q", *(block.offset for block in blocks)),
        generations=struct.pack(f"<{count}Q", *(block.generation for block in blocks)),
        digests=struct.pack(f"<{count}Q", *(block.digest for block in blocks)),
        codecs=codecs,
        sizes=sizes,
    )


def _pinned_once(blocks: Iterable[Block]) -> list[Block]:
    return [block for block in blocks if block.pins == 1 and block.state is BlockState.COMMITTED]


def _placed(block: Block) -> Placed:
    return Placed(
        namespace=block.namespace, location=_location(block), shape=block.shape, tenant=block.tenant, codec=block.codec,
        parent=block.parent.hash if block.parent is not None else BlockHash(b""),
    )  # fmt: skip


def _as_grant(lease: Lease, now: float) -> LeaseGrant:
    return LeaseGrant(lease=lease.id, epoch=lease.epoch, ttl_s=lease.expires_at - now)
