"""The index of a store: who may read, write or keep which blocks, and until when."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from covey.errors import Miss
from covey.policy.arena import Arena
from covey.policy.block_columns import NONE, keys_of
from covey.policy.changes import IndexChange
from covey.policy.placed import Placed, located, placed
from covey.policy.retention import LeastRecentlyUsed, Retention
from covey.policy.rights import STORE, Right, Rights, as_grant
from covey.policy.shelf import CODECS, RAW, Shelf
from covey.policy.store_books import StoreBooks
from covey.policy.store_limits import StoreLimits
from covey.policy.tenant_ledger import TenantLedger
from covey.policy.writing import Writing
from covey.types.block import BlockCodec
from covey.types.ids import BlockHash, LeaseId, NamespaceId, TenantId
from covey.types.kv import (
    CommitRequest,
    LeaseGrant,
    LeaseRequest,
    LookupReply,
    LookupRequest,
    PinKind,
    PinReply,
    PinRequest,
    QuarantineRequest,
    RenewRequest,
    ReserveReply,
    ReserveRequest,
)
from covey.types.kv_state import QuotaReply, QuotaRequest, StoreStats


def _readable(codecs: Sequence[BlockCodec]) -> NDArray[np.bool_]:
    """Which codecs a reader takes, by number."""
    taken = np.zeros(len(CODECS), np.bool_)
    taken[[RAW, *(CODECS.index(codec) for codec in codecs)]] = True
    return taken


_RAW_ONLY = _readable(())

__all__ = ["Placed", "StoreIndex", "StoreLimits"]


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
        retention: Retention | None = None,
        quotas: Mapping[TenantId, int] | None = None,
        token: Callable[[], str] | None = None,
    ) -> None:
        """`epoch` is this life of the store; `name` begins its lease ids, and what `token` returns ends them."""
        self.epoch = epoch
        self.limits = limits or StoreLimits()
        self._shelf = Shelf(
            arena=arena,
            blocks_max=self.limits.blocks_max,
            retention=retention or LeastRecentlyUsed(),
            tenants=TenantLedger(quotas or {}, self.limits.quota_bytes),
        )
        self._rights = Rights(
            epoch=epoch, name=name, leases_max=self.limits.leases_max, refs_max=self.limits.lease_refs_max, token=token
        )
        self._books = StoreBooks(self._shelf, self._rights, self.limits)
        self._writing = Writing(self._books)
        self._hits = self._misses = 0

    # -- reading -----------------------------------------------------------------

    def lookup(self, request: LookupRequest, now: float) -> LookupReply:
        """Lease the longest visible prefix of the hashes. Raises `LayoutMismatch` and `Overloaded`."""
        self.expire(now)
        keys = keys_of(request.hashes)
        space = self._shelf.spaces.of(request.namespace, request.shape)
        rows = self._shelf.prefix(space, keys, _readable(request.codecs) if request.codecs else _RAW_ONLY)
        self._hits += len(rows)
        self._misses += len(keys) - len(rows)
        if not len(rows):
            return LookupReply()
        lease, _ = self._books.grant_over(Right.READ, rows, request.tenant, request.owner, request.ttl_s, now)
        return LookupReply(blocks=located(self._shelf.columns, rows, keys), lease=as_grant(lease, now))

    def keep(
        self, namespace: NamespaceId, hashes: Sequence[BlockHash], *, owner: str, ttl_s: float, now: float
    ) -> tuple[LeaseGrant, tuple[Placed, ...]] | None:
        """Lease those of the named shared blocks that are visible to the store itself; None when none is.

        Unlike a look-up this is no use of them: it changes neither what goes first nor what is learned of reuse.
        Raises `Overloaded`.
        """
        self.expire(now)
        rows = self._books.shared(namespace, hashes)
        if not rows:
            return None
        lease = self._books.keep(np.unique(np.array(rows, np.int32)), owner, ttl_s, now)
        return as_grant(lease, now), tuple(placed(self._shelf, row) for row in rows)

    def locate(
        self, lease_id: LeaseId, hashes: Sequence[BlockHash], now: float, *, tenant: TenantId = STORE
    ) -> tuple[Placed, ...]:
        """Return the slots of leased blocks. Raises `LeaseExpired`, and `Miss` for a block not under the lease.

        Without `tenant`, the store itself asks.
        """
        holding = self._rights.get(lease_id, tenant, now)
        rows = holding.find(self._shelf.columns, hashes) if hashes else []
        for i, row in enumerate(rows):
            if self._shelf.arena.is_retired(self._shelf.columns.offset(row)):
                raise Miss("this block was found to be bad", field=f"hashes[{i}]")
        return tuple(placed(self._shelf, row) for row in rows)

    def pin(self, request: PinRequest, now: float) -> PinReply:
        """Keep a visible prefix of the hashes from eviction.

        A soft pin ends early when a writer finds no other room; a hard one never does. Raises `Miss` when
        nothing is stored, `NoSpace` when pins would hold more than their share of the store, and
        `QuotaExceeded` when those of this tenant would hold more than that share of its quota.
        """
        self.expire(now)
        space = self._shelf.spaces.get(request.namespace)
        rows = self._shelf.prefix(space, keys_of(request.hashes)) if space is not None else None
        if rows is None or not len(rows):
            raise Miss("none of these blocks is stored", field="hashes")
        self._books.check_pins(rows, request.tenant, now)
        lease, holding = self._books.grant_over(Right.PIN, rows, request.tenant, request.owner, request.ttl_s, now)
        self._books.begin_pin(holding)
        if request.kind is PinKind.SOFT:
            self._rights.may_end(lease.id)
        return PinReply(lease=as_grant(lease, now), blocks=len(rows))

    # -- writing -----------------------------------------------------------------

    def reserve(self, request: ReserveRequest, now: float) -> ReserveReply:
        """Grant slots for blocks that are not there, all or none.

        A block that another writer holds is PENDING, and so is all that grows from it: ask again. When that
        writer's lease ends the next one to ask takes over. Raises `NoSpace`, `QuotaExceeded`, `LayoutMismatch`,
        `Overloaded`, and `Miss` when the block that the first one grows from is not stored.
        """
        self.expire(now)
        return self._writing.reserve(request, now)

    def writable(self, lease_id: LeaseId, name: BlockHash, now: float, *, tenant: TenantId = STORE) -> Placed:
        """Return the slot that a lease may fill. Raises `LeaseExpired`, and `Fenced` if it is not its to fill."""
        return self._writing.writable(lease_id, name, now, tenant=tenant)

    def can_commit(self, request: CommitRequest, now: float) -> tuple[Placed, ...]:
        """Return the slots whose headers to seal before `commit`; those committed before are left out.

        Raises `Fenced`, `LeaseExpired`, `InvalidArgument` for a block that was not granted or has a wrong number
        of checksums, and `FailedPrecondition` for one whose parent is not visible.
        """
        return self._writing.can_commit(request, now)

    def commit(self, lease_id: LeaseId, digests: Mapping[BlockHash, int], now: float) -> None:
        """Make blocks that `can_commit` returned visible, with the digests of their sealed headers."""
        self._writing.commit(lease_id, digests, now)

    def draft(
        self, namespace: NamespaceId, sizes: Mapping[BlockHash, int], codec: BlockCodec, *, owner: str, ttl_s: float,
        now: float,
    ) -> tuple[LeaseGrant, tuple[Placed, ...]]:  # fmt: skip
        """Take slots for new versions of visible shared blocks, of so many payload bytes each, under a lease.

        Fill the slots, then `replace`; readers see the old versions until then. The lease is the store's own. Raises
        `Miss` for a block that is not visible, `NoSpace`, `QuotaExceeded`, `Overloaded` and `InvalidArgument`; then
        nothing is taken.
        """
        self.expire(now)
        return self._writing.draft(namespace, sizes, codec, owner=owner, ttl_s=ttl_s, now=now)

    def replace(self, lease_id: LeaseId, digests: Mapping[BlockHash, int], now: float) -> int:
        """Put drafts with sealed headers in the place of what readers see; the lease does not cover them afterwards.

        The old slots are free when their leases end; pins go over to the new versions. A block that went since
        `draft` is left out. Returns how many were replaced. Raises `LeaseExpired`, and `Fenced` for a block without
        a draft.
        """
        return self._writing.replace(lease_id, digests, now)

    # -- leases ------------------------------------------------------------------

    def renew(self, request: RenewRequest, now: float) -> LeaseGrant:
        """Extend a lease to `ttl_s` from now, within its cap, if its owner made progress.

        Raises `Fenced` and `LeaseExpired`.
        """
        lease = self._rights.authorize(request.lease, request.tenant, request.epoch, now)
        return as_grant(self._rights.renew(lease, progress=request.done, ttl_s=request.ttl_s, now=now), now)

    def release(self, request: LeaseRequest, now: float) -> None:
        """End a lease of any kind; uncommitted slots are free at once. Raises `Fenced` and `LeaseExpired`."""
        lease = self._rights.authorize(request.lease, request.tenant, request.epoch, now)
        self._books.end(lease.id, now)

    def next_due(self) -> float | None:
        """Return a moment no later than the next one at which `expire` has something to do."""
        return self._books.next_due()

    def expire(self, now: float) -> None:
        """End every right whose time is up and free what has cooled."""
        self._books.expire(now)

    def quarantine(self, request: QuarantineRequest, now: float) -> bool:
        """Take a bad block out: it and all that grows from it are no longer visible, its slot is never used again."""
        self.expire(now)
        row = self._books.visible(request.namespace, request.hash)
        if row != NONE:
            self._shelf.quarantine(row)
        return row != NONE

    def quota(self, request: QuotaRequest) -> QuotaReply:
        """Say what a tenant may use and uses here, after setting it if asked."""
        tenants = self._shelf.tenants
        if request.quota_bytes is not None:
            tenants.set_quota(request.tenant, request.quota_bytes)
        return QuotaReply(
            tenant=request.tenant,
            quota_bytes=tenants.quota_bytes(request.tenant),
            used_bytes=tenants.used_bytes(request.tenant),
        )

    # -- views -------------------------------------------------------------------

    def coldest(self, count: int, now: float) -> tuple[Placed, ...]:
        """Return the blocks that would be evicted next, worst first; changes nothing but what has expired."""
        self.expire(now)
        return tuple(placed(self._shelf, row) for row in self._shelf.eviction.coldest(count, now))

    def visible(self, namespace: NamespaceId, hashes: Sequence[BlockHash]) -> tuple[Placed, ...]:
        """Return those of the named shared blocks that are stored, without leasing or touching them."""
        return tuple(placed(self._shelf, row) for row in self._books.shared(namespace, hashes))

    def drop(self, namespace: NamespaceId, hashes: Sequence[BlockHash], now: float) -> int:
        """Evict the named blocks, parents first in `hashes`, except what somebody needs; return how many went."""
        self.expire(now)
        return sum(self._shelf.drop(row, now) for row in reversed(self._books.shared(namespace, hashes)))

    def note_below(self, namespace: NamespaceId, hashes: Sequence[BlockHash], *, below: bool) -> None:
        """Take note of whether a lower tier has these blocks: then evicting them costs less."""
        self._shelf.columns.below[self._books.shared(namespace, hashes)] = below

    def drain_changes(self) -> tuple[IndexChange, ...]:
        """Return what became visible or went since the last call, in order."""
        return self._shelf.changes.drain()

    def snapshot(
        self, first: int = 0, rows_max: int | None = None
    ) -> Iterator[tuple[NamespaceId, tuple[BlockHash, ...]]]:
        """Yield shared blocks by namespace: all, or those among `rows_max` rows from `first` on.

        Pieces taken one after the other, and the changes since the first of them, say together what there is.
        """
        last = self.rows if rows_max is None else first + rows_max
        for namespace, rows in self._shelf.shared(first, last):
            yield namespace, self._shelf.columns.names(rows)

    @property
    def rows(self) -> int:
        """How many rows a walk by `snapshot` has to cover now."""
        return self._shelf.columns.touched

    def stats(self) -> StoreStats:
        """Count what is there; reads counters only, so another thread may call it."""
        counts, arena = self._shelf.counts, self._shelf.arena
        return StoreStats(
            blocks=counts.blocks - counts.reserved,
            used_bytes=arena.used_bytes,
            capacity_bytes=arena.capacity_bytes,
            leases=len(self._rights),
            leased_blocks=counts.held,
            pinned_blocks=counts.pinned,
            pinned_bytes=counts.pinned_bytes,
            reserved_blocks=counts.reserved,
            private_blocks=counts.private,
            hits=self._hits,
            misses=self._misses,
            evictions=counts.evictions,
            quarantined=counts.quarantined,
            index_bytes=self._shelf.memory_bytes + self._rights.memory_bytes,
        )

    def check(self) -> None:
        """Assert the invariants that hold between any two calls."""
        self._books.check()
