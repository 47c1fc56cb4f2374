"""Who holds which blocks of a store, and until when: each lease and what it covers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from covey.errors import Fenced, LeaseExpired, Miss, Overloaded
from covey.lease import Lease, LeaseTable
from covey.policy.block_columns import BlockColumns, Rows, keys_of
from covey.types.ids import BlockHash, LeaseId, TenantId
from covey.types.kv import LeaseGrant

NO_ROWS: Rows = np.empty(0, np.int32)
HOLDING_BYTES = 1200
"""What a lease takes besides its rows, about."""


STORE = TenantId("")
"""Who asks when it is the store itself."""


class Right(IntEnum):
    READ = 0
    WRITE = 1
    PIN = 2


@dataclass(slots=True, eq=False)
class Holding:
    """What a lease covers: blocks it keeps, each once, and slots it may still fill."""

    right: Right
    tenant: TenantId
    refs: int
    rows: Rows = field(default_factory=lambda: NO_ROWS)
    more: dict[int, None] = field(default_factory=dict)
    """Rows that came one by one."""
    reserved: dict[BlockHash, int] = field(default_factory=dict)
    drafts: dict[BlockHash, int] = field(default_factory=dict)
    pinned_bytes: int = 0

    def every(self) -> Rows:
        """All rows that it keeps."""
        return np.concatenate((self.rows, np.fromiter(self.more, np.int32, len(self.more)))) if self.more else self.rows

    def find(self, columns: BlockColumns, hashes: Sequence[BlockHash]) -> list[int]:
        """Return the rows of blocks that it keeps. Raises `Miss` for one that it does not."""
        rows = self.every()
        keys = keys_of(hashes)
        part = rows[: len(keys)]
        if np.array_equal(columns.low[part], keys[:, 0]) and np.array_equal(columns.high[part], keys[:, 1]):
            return [int(row) for row in part]
        known = dict(zip(columns.names(rows), rows.tolist(), strict=True))
        found = []
        for i, name in enumerate(hashes):
            row = known.get(name)
            if row is None:
                raise Miss("the lease does not cover this block", field=f"hashes[{i}]")
            found.append(row)
        return found


class Rights:
    """Leases of a store and their holdings, bounded in number and in what they cover.

    A lease of another tenant, or of another life of the store, does not exist for who asks. Without a tenant, the
    store itself asks.
    """

    def __init__(
        self, *, epoch: int, name: str, leases_max: int, refs_max: int, token: Callable[[], str] | None
    ) -> None:
        self.epoch = epoch
        self.refs = 0
        self._refs_max = refs_max
        self._leases = LeaseTable(name=name, capacity=leases_max, token=token)
        self._holdings: dict[LeaseId, Holding] = {}
        self._soft_pins: dict[LeaseId, None] = {}

    def __len__(self) -> int:
        return len(self._leases)

    def grant(
        self, right: Right, *, tenant: TenantId, owner: str, ttl_s: float, cap_s: float, refs: int, now: float
    ) -> tuple[Lease, Holding]:
        """Grant a lease that will cover up to `refs` blocks. Raises `Overloaded`."""
        if self.refs + refs > self._refs_max:
            raise Overloaded("leases cover too many blocks", retry_after_ms=self.retry_after_ms(now))
        lease = self._leases.grant(owner, self.epoch, ttl_s=ttl_s, cap_s=cap_s, now=now)
        holding = self._holdings[lease.id] = Holding(right=right, tenant=tenant, refs=refs)
        self.refs += refs
        return lease, holding

    def get(self, lease_id: LeaseId, tenant: TenantId, now: float) -> Holding:
        """Return what a live lease covers. Raises `LeaseExpired`, also for another tenant's."""
        self._leases.get(lease_id, now=now)
        return self._of(lease_id, tenant)

    def authorize(self, lease_id: LeaseId, tenant: TenantId, epoch: int, now: float) -> Lease:
        """Return a live lease to its holder. Raises `Fenced` and `LeaseExpired`."""
        if epoch != self.epoch:
            raise Fenced(f"epoch {epoch} of this store is over; ask again", field="epoch")
        lease = self._leases.get(lease_id, now=now)
        self._of(lease_id, tenant)
        return lease

    def renew(self, lease: Lease, *, progress: int, ttl_s: float, now: float) -> Lease:
        return self._leases.renew(lease.id, lease.owner, lease.epoch, progress=progress, now=now, ttl_s=ttl_s)

    def end(self, lease_id: LeaseId, now: float) -> Holding:
        """End a live lease and return what it covered, for the caller to free."""
        lease = self._leases.get(lease_id, now=now)
        self._leases.release(lease.id, lease.owner, lease.epoch, now=now)
        return self._drop(lease.id)

    def expire(self, now: float) -> Iterable[Holding]:
        """End every lease whose time is up and return what they covered."""
        return [self._drop(lease.id) for lease in self._leases.expire(now)]

    def next_due(self) -> float | None:
        """Return a moment no later than the next end of a lease."""
        return self._leases.next_expiry()

    def retry_after_ms(self, now: float) -> int | None:
        due = self.next_due()
        return None if due is None else max(1, round((due - now) * 1000))

    # -- pins --------------------------------------------------------------------

    def may_end(self, lease_id: LeaseId) -> None:
        """Let a pin be one that gives way to a writer."""
        self._soft_pins[lease_id] = None

    def soft_pin(self, tenant: TenantId | None = None) -> LeaseId | None:
        """Return the oldest pin that gives way: of one tenant, or of any."""
        return next((i for i in self._soft_pins if tenant is None or self._holdings[i].tenant == tenant), None)

    def carry_pins(self, old: int, new: int) -> int:
        """Let pins of one row pin another; return how many there were."""
        carried = 0
        for holding in self._holdings.values():
            if holding.right is Right.PIN and (holding.rows == old).any():
                holding.rows = np.where(holding.rows == old, np.int32(new), holding.rows)
                carried += 1
        return carried

    # -- views -------------------------------------------------------------------

    @property
    def memory_bytes(self) -> int:
        return HOLDING_BYTES * len(self._holdings) + 4 * self.refs

    def holdings(self) -> Iterable[Holding]:
        return self._holdings.values()

    def check(self) -> None:
        """Assert the invariants that hold between any two calls."""
        self._leases.check()
        assert {lease.id for lease in self._leases.leases()} == self._holdings.keys()
        assert self._soft_pins.keys() <= self._holdings.keys()
        assert self.refs == sum(holding.refs for holding in self._holdings.values()) <= self._refs_max
        for holding in self._holdings.values():
            rows = holding.every()
            assert len(np.unique(rows)) == len(rows), "a lease keeps a block twice"
            assert len(rows) + len(holding.reserved) <= holding.refs

    def _of(self, lease_id: LeaseId, tenant: TenantId) -> Holding:
        holding = self._holdings[lease_id]
        if tenant and holding.tenant != tenant:
            raise LeaseExpired(f"lease {lease_id} has ended; ask for a new one", field="lease")
        return holding

    def _drop(self, lease_id: LeaseId) -> Holding:
        holding = self._holdings.pop(lease_id)
        self.refs -= holding.refs
        self._soft_pins.pop(lease_id, None)
        return holding


def as_grant(lease: Lease, now: float) -> LeaseGrant:
    return LeaseGrant(lease=lease.id, epoch=lease.epoch, ttl_s=lease.expires_at - now)
