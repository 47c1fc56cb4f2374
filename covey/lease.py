"""Leases: bounded rights with owner, epoch and deadline, renewed by progress and never for ever."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, replace

from covey.errors import Fenced, InvalidArgument, LeaseExpired, Overloaded
from covey.types.ids import LeaseId


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """One right as it stands; times are monotonic seconds of the table's process."""

    id: LeaseId
    owner: str
    epoch: int
    ttl_s: float
    granted_at: float
    expires_at: float
    cap_at: float
    """No renewal reaches past this moment."""
    progress: int = 0
    """The furthest point the owner has reported; only a further one renews."""


class LeaseTable:
    """Grants, renews, releases and expires leases; pure, so the caller passes `now`, which never decreases.

    An owner's epoch grows with each of its lives. The table remembers the highest one it has seen: an older
    epoch is fenced and changes nothing, and a newer one revokes what the owner's earlier lives still hold.
    Owners without leases are forgotten, oldest first, past `capacity`. Expired leases stay in the table,
    dead, until `expire` hands them out exactly once: that is where their resources are freed.
    """

    def __init__(self, *, name: str, capacity: int, token: Callable[[], str] | None = None) -> None:
        """`name` prefixes lease ids: give each life of the table's process its own.

        `token` makes what ends them, where a lease id must not be guessed.
        """
        if capacity < 1:
            raise ValueError("capacity must be at least 1")
        self._name = name
        self._token = token
        self._capacity = capacity
        self._count = 0
        self._leases: dict[LeaseId, Lease] = {}
        self._by_owner: dict[str, set[LeaseId]] = {}
        self._epochs: dict[str, int] = {}
        self._due: list[tuple[float, LeaseId]] = []  # lazy heap: may be early or stale, never late

    def __len__(self) -> int:
        return len(self._leases)

    def get(self, lease_id: LeaseId, *, now: float) -> Lease:
        """Return a live lease. Raises `LeaseExpired` when it ended, was released or never was."""
        lease = self._leases.get(lease_id)
        if lease is None or now >= lease.expires_at:
            raise LeaseExpired(f"lease {lease_id} has ended; ask for a new one", field="lease")
        return lease

    def leases(self) -> tuple[Lease, ...]:
        """Return every lease that `expire` or `release` has not handed out yet, oldest first."""
        return tuple(self._leases.values())

    def next_expiry(self) -> float | None:
        """Return a moment no later than the next expiry: when to call `expire` again."""
        return self._due[0][0] if self._due else None

    def grant(self, owner: str, epoch: int, *, ttl_s: float, cap_s: float, now: float) -> Lease:
        """Grant a lease of `ttl_s`, renewable up to `cap_s` from now.

        Raises:
            InvalidArgument: not 0 < ttl_s <= cap_s.
            Fenced: a newer life of this owner is known.
            Overloaded: the table is full.
        """
        if not 0 < ttl_s <= cap_s < float("inf"):
            raise InvalidArgument("a lease needs 0 < ttl_s <= cap_s", field="ttl_s")
        self._admit(owner, epoch, now)
        if len(self._leases) >= self._capacity:
            raise Overloaded("the lease table is full", retry_after_ms=self._retry_after_ms(now))
        self._count += 1
        lease = Lease(
            id=LeaseId(f"{self._name}-{self._token() if self._token else self._count}"),
            owner=owner,
            epoch=epoch,
            ttl_s=ttl_s,
            granted_at=now,
            expires_at=now + ttl_s,
            cap_at=now + cap_s,
        )
        self._leases[lease.id] = lease
        self._by_owner.setdefault(owner, set()).add(lease.id)
        self._schedule(lease)
        return lease

    def renew(
        self, lease_id: LeaseId, owner: str, epoch: int, *, progress: int, now: float, ttl_s: float | None = None
    ) -> Lease:
        """Extend a lease to `ttl_s` from now (None: its own), within its cap, if the owner got further since last time.

        A report without progress changes nothing and returns the lease as it is: a stuck owner that still
        sends heartbeats loses its lease like a dead one. Raises `Fenced` and `LeaseExpired`.
        """
        lease = self._authorize(lease_id, owner, epoch, now)
        if progress <= lease.progress:
            return lease
        expires_at = max(lease.expires_at, min(now + (lease.ttl_s if ttl_s is None else ttl_s), lease.cap_at))
        # The heap keeps its earlier entry; `expire` finds the lease alive there and schedules it again.
        self._leases[lease_id] = lease = replace(lease, progress=progress, expires_at=expires_at)
        return lease

    def release(self, lease_id: LeaseId, owner: str, epoch: int, *, now: float) -> Lease:
        """End a lease early and return it, for the caller to free. Raises `Fenced` and `LeaseExpired`."""
        lease = self._authorize(lease_id, owner, epoch, now)
        self._remove(lease)
        return lease

    def fence(self, owner: str, epoch: int, *, now: float) -> None:
        """End the leases of `owner`'s lives before `epoch`. Raises `Fenced` if a newer one is known."""
        self._admit(owner, epoch, now)

    def expire(self, now: float) -> tuple[Lease, ...]:
        """Remove and return every lease whose time is up, each exactly once."""
        ended = []
        while self._due and self._due[0][0] <= now:
            _, lease_id = heapq.heappop(self._due)
            lease = self._leases.get(lease_id)
            if lease is None:
                continue
            if lease.expires_at <= now:
                self._remove(lease)
                ended.append(lease)
            else:
                heapq.heappush(self._due, (lease.expires_at, lease_id))
        return tuple(ended)

    def check(self) -> None:
        """Assert the table's invariants."""
        assert len(self._leases) <= self._capacity
        assert len(self._epochs) <= self._capacity + 1
        scheduled = {lease_id: at for at, lease_id in sorted(self._due, reverse=True)}
        for lease_id, lease in self._leases.items():
            assert lease.granted_at <= lease.expires_at <= lease.cap_at
            assert lease_id in self._by_owner[lease.owner]
            assert scheduled[lease_id] <= lease.expires_at, "a lease would be expired late"
            assert lease.epoch <= self._epochs[lease.owner]
        assert sum(map(len, self._by_owner.values())) == len(self._leases)

    def _admit(self, owner: str, epoch: int, now: float) -> None:
        known = self._epochs.get(owner)
        if known is not None and epoch < known:
            raise Fenced(f"epoch {epoch} of {owner} is over; epoch {known} is current", field="epoch")
        if known == epoch:
            return
        self._epochs.pop(owner, None)
        self._epochs[owner] = epoch
        for lease_id in self._by_owner.get(owner, ()):
            lease = self._leases[lease_id]
            if lease.expires_at > now:
                self._leases[lease_id] = lease = replace(lease, expires_at=now)
                self._schedule(lease)
        self._forget_owners()

    def _authorize(self, lease_id: LeaseId, owner: str, epoch: int, now: float) -> Lease:
        self._admit_known(owner, epoch, now)
        lease = self.get(lease_id, now=now)
        if (lease.owner, lease.epoch) != (owner, epoch):
            raise Fenced(f"lease {lease_id} belongs to another owner or epoch", field="lease")
        return lease

    def _admit_known(self, owner: str, epoch: int, now: float) -> None:
        """Fence as `_admit` does, but let no stranger's renewal take room in the table."""
        if owner in self._epochs:
            self._admit(owner, epoch, now)

    def _forget_owners(self) -> None:
        if len(self._epochs) > self._capacity:
            idle = next((owner for owner in self._epochs if owner not in self._by_owner), None)
            if idle is not None:
                del self._epochs[idle]

    def _remove(self, lease: Lease) -> None:
        del self._leases[lease.id]
        owned = self._by_owner[lease.owner]
        owned.discard(lease.id)
        if not owned:
            del self._by_owner[lease.owner]

    def _schedule(self, lease: Lease) -> None:
        heapq.heappush(self._due, (lease.expires_at, lease.id))
        if len(self._due) > 2 * len(self._leases) + 64:  # entries of released leases: amortised O(1) to sweep
            self._due = [(held.expires_at, held.id) for held in self._leases.values()]
            heapq.heapify(self._due)

    def _retry_after_ms(self, now: float) -> int | None:
        due = self.next_expiry()
        return None if due is None else max(1, round((due - now) * 1000))
