"""Both books of a store, its blocks and the rights to them: what begins, ends and expires goes through here."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from covey.errors import NoSpace, QuotaExceeded
from covey.lease import Lease
from covey.policy.block_columns import NONE, BlockState, Rows
from covey.policy.rights import STORE, Holding, Right, Rights
from covey.policy.shelf import Shelf
from covey.policy.shelf_check import check_shelf
from covey.policy.store_limits import StoreLimits
from covey.types.ids import BlockHash, LeaseId, NamespaceId, TenantId
from covey.types.kv_state import KvEventKind


class StoreBooks:
    """Blocks and rights together. Time is passed in and never decreases."""

    def __init__(self, shelf: Shelf, rights: Rights, limits: StoreLimits) -> None:
        self.shelf = shelf
        self.rights = rights
        self.limits = limits

    def grant(
        self, right: Right, tenant: TenantId, owner: str, ttl_s: float, refs: int, now: float
    ) -> tuple[Lease, Holding]:
        """Grant a lease that will cover up to `refs` blocks. Raises `Overloaded`."""
        cap_s = self.limits.pin_ttl_max_s if right is Right.PIN else self.limits.lease_cap_s
        ttl_s = min(ttl_s, cap_s)
        cap_s = ttl_s if right is Right.PIN else cap_s  # a pin shows no progress, so nothing renews it
        return self.rights.grant(right, tenant=tenant, owner=owner, ttl_s=ttl_s, cap_s=cap_s, refs=refs, now=now)

    def grant_over(
        self, right: Right, rows: Rows, tenant: TenantId, owner: str, ttl_s: float, now: float
    ) -> tuple[Lease, Holding]:
        """Grant a lease over visible blocks. Raises `Overloaded`."""
        lease, holding = self.grant(right, tenant, owner, ttl_s, len(rows), now)
        depth = self.shelf.columns.depth[rows]
        # Down a chain depths grow, so that no row comes twice; what was asked in another order is looked through.
        holding.rows = rows if (depth[1:] > depth[:-1]).all() else np.unique(rows)
        self.shelf.hold(holding.rows, now, pin=right is Right.PIN, read=right is Right.READ)
        return lease, holding

    def keep(self, rows: Rows, owner: str, ttl_s: float, now: float) -> Lease:
        """Grant the store itself a lease over blocks, each named once, that is no use of them. Raises `Overloaded`."""
        lease, holding = self.grant(Right.READ, STORE, owner, ttl_s, len(rows), now)
        holding.rows = rows
        self.shelf.hold(rows, None)
        return lease

    def end(self, lease_id: LeaseId, now: float) -> None:
        """End a live lease; uncommitted slots are free at once."""
        self._free(self.rights.end(lease_id, now), cool_until=None)

    def expire(self, now: float) -> None:
        """End every right whose time is up and free what has cooled."""
        for holding in self.rights.expire(now):
            self._free(holding, cool_until=now + self.limits.cooling_s)
        self.shelf.thaw(now)

    def next_due(self) -> float | None:
        """Return a moment no later than the next one at which `expire` has something to do."""
        return min((at for at in (self.shelf.next_due(), self.rights.next_due()) if at is not None), default=None)

    def retry_after_ms(self, now: float) -> int | None:
        due = self.next_due()
        return None if due is None else max(1, round((due - now) * 1000))

    # -- finding -----------------------------------------------------------------

    def visible(self, namespace: NamespaceId, name: BlockHash) -> int:
        """Return the row of a visible block, or `NONE`."""
        space = self.shelf.spaces.get(namespace)
        row = NONE if space is None else self.shelf.find_one(space, name)
        return row if row != NONE and self.shelf.columns.at_state[row] == BlockState.COMMITTED else NONE

    def shared(self, namespace: NamespaceId, hashes: Iterable[BlockHash]) -> list[int]:
        """Return the rows of those of the named shared blocks that are visible."""
        rows = (self.visible(namespace, name) for name in hashes)
        return [row for row in rows if row != NONE and not self.shelf.columns.at_private[row]]

    # -- pins --------------------------------------------------------------------

    def check_pins(self, rows: Rows, tenant: TenantId, now: float) -> None:
        """Raise `NoSpace` or `QuotaExceeded` when further pins of a tenant would hold more than their share."""
        shelf, share = self.shelf, self.limits.pinned_share
        fresh_bytes = shelf.bytes_of(rows[shelf.columns.pins[rows] == 0])
        if shelf.counts.pinned_bytes + fresh_bytes > share * shelf.arena.capacity_bytes:
            raise NoSpace("pins hold their share of this store", retry_after_ms=self.retry_after_ms(now))
        quota_bytes = shelf.tenants.quota_bytes(tenant)
        if quota_bytes and shelf.tenants.pinned_bytes(tenant) + shelf.bytes_of(rows) > share * quota_bytes:
            raise QuotaExceeded(
                "pins of this tenant hold their share of its quota", retry_after_ms=self.retry_after_ms(now)
            )

    def begin_pin(self, holding: Holding) -> None:
        """Charge a fresh pin to its tenant and tell who watches."""
        holding.pinned_bytes = self.shelf.bytes_of(holding.rows)
        self.shelf.tenants.pin(holding.tenant, holding.pinned_bytes)
        self._tell_pins(KvEventKind.PINNED, holding)

    def check(self) -> None:
        """Assert the invariants that hold between any two calls."""
        self.rights.check()
        check_shelf(self.shelf)
        columns = self.shelf.columns
        held = np.zeros(columns.touched, np.int32)
        pins = np.zeros(columns.touched, np.int32)
        pinned: dict[TenantId, int] = {}
        for holding in self.rights.holdings():
            held[holding.every()] += 1
            if holding.right is Right.PIN:
                pins[holding.rows] += 1
                pinned[holding.tenant] = pinned.get(holding.tenant, 0) + holding.pinned_bytes
        assert (columns.held[: columns.touched] == held).all(), "a lease was lost or counted twice"
        assert (columns.pins[: columns.touched] == pins).all()
        for tenant, size_bytes in pinned.items():
            assert self.shelf.tenants.pinned_bytes(tenant) == size_bytes
        for state, of in ((BlockState.RESERVED, "reserved"), (BlockState.DRAFT, "drafts")):
            rows = [row for holding in self.rights.holdings() for row in getattr(holding, of).values()]
            assert len(set(rows)) == len(rows), "two writers of one slot"
            assert set(rows) == set(columns.live(state).tolist()), "a slot without its writer"

    def _free(self, holding: Holding, *, cool_until: float | None) -> None:
        is_pin = holding.right is Right.PIN
        for row in (*reversed(holding.reserved.values()), *holding.drafts.values()):
            self.shelf.discard(row, cool_until=cool_until)
        if is_pin:
            self._tell_pins(KvEventKind.UNPINNED, holding)
            self.shelf.tenants.pin(holding.tenant, -holding.pinned_bytes)
        rows = holding.every()
        if len(rows):
            self.shelf.unhold(rows, pin=is_pin)

    def _tell_pins(self, kind: KvEventKind, holding: Holding) -> None:
        columns, rows = self.shelf.columns, holding.rows
        once = rows[(columns.pins[rows] == 1) & (columns.state[rows] == BlockState.COMMITTED)]
        if len(once):
            self.shelf.changes.note(kind, once.tolist(), self.shelf.space_of(int(once[0])).namespace)
