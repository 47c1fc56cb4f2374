"""Which nodes own blocks: who is steadily there is let in, who is gone is let go, flapping ones wait longer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from covey.policy.placement import Site
from covey.types.ids import WorkerId
from covey.types.kv_state import RingMember, RingVersion


@dataclass(frozen=True, slots=True, kw_only=True)
class RingLimits:
    """How long a node must be seen before it owns blocks, and be missing before it does not."""

    join_s: float = 0.5
    leave_s: float = 0.5
    join_max_s: float = 60.0
    """A node's wait doubles with each time that it left, up to this."""
    forgive_s: float = 300.0
    """A node that stayed for so long is steady again."""
    known_max: int = 4096


@dataclass(slots=True)
class _Known:
    member: RingMember
    present: bool
    since: float
    losses: int = 0


class Membership:
    """What one node has seen of all nodes; it proposes the next ring, and others may be faster. Pure: pass `now`."""

    def __init__(self, limits: RingLimits | None = None) -> None:
        self.limits = limits or RingLimits()
        self._known: OrderedDict[WorkerId, _Known] = OrderedDict()

    def observe(self, present: Iterable[RingMember], now: float) -> None:
        """Take in who is there now."""
        there = {member.worker: member for member in present}
        for worker, member in there.items():
            known = self._known.get(worker)
            if known is None:
                self._known[worker] = _Known(member=member, present=True, since=now)
            elif not known.present or known.member.epoch != member.epoch:
                known.losses += known.present  # a new life without a gap that we saw: it was lost all the same
                known.member, known.present, known.since = member, True, now
            else:
                known.member = member
                if now - known.since >= self.limits.forgive_s:
                    known.losses = 0
        for worker, known in self._known.items():
            if known.present and worker not in there:
                known.present, known.since = False, now
                known.losses += 1
        self._forget()

    def proposal(self, current: RingVersion | None, now: float) -> tuple[RingMember, ...] | None:
        """Return the members that the ring should have now, None when it has them. The first ring takes all at once."""
        if current is None:
            found = tuple(known.member for known in self._known.values() if known.present)
            return _ordered(found) or None
        members = {member.worker: member for member in current.members}
        self._look_for(members.values(), now)
        wanted = {worker: member for worker, member in members.items() if not self._is_gone(worker, now)}
        for worker, known in self._known.items():
            steady = now - known.since >= self._wait_s(known)
            same = worker in wanted and wanted[worker].epoch == known.member.epoch
            if known.present and (steady or same):
                wanted[worker] = known.member
        return None if wanted == members else _ordered(wanted.values())

    def check(self) -> None:
        """Assert the invariants that hold between any two calls."""
        assert len(self._known) <= self.limits.known_max
        assert all(known.losses >= 0 for known in self._known.values())

    def _look_for(self, members: Iterable[RingMember], now: float) -> None:
        """Count members that were never seen as missing from now on."""
        for member in members:
            if member.worker not in self._known:
                self._known[member.worker] = _Known(member=member, present=False, since=now)

    def _is_gone(self, worker: WorkerId, now: float) -> bool:
        known = self._known[worker]
        return not known.present and now - known.since >= self.limits.leave_s

    def _wait_s(self, known: _Known) -> float:
        return float(min(self.limits.join_max_s, self.limits.join_s * 2 ** min(known.losses, 16)))

    def _forget(self) -> None:
        gone = [worker for worker, known in self._known.items() if not known.present]
        for worker in gone[: max(0, len(self._known) - self.limits.known_max)]:
            del self._known[worker]


def sites_of(ring: RingVersion) -> tuple[Site, ...]:
    """Return a ring's members as places for blocks."""
    return tuple(Site(worker=m.worker, weight=float(m.capacity_bytes), host=m.host) for m in ring.members)


def is_newer(ring: RingVersion, than: RingVersion | None) -> bool:
    """Whether a ring replaces another one; two of the same number are ordered by their proposers' names."""
    return than is None or (ring.version, ring.proposer) > (than.version, than.proposer)


def _ordered(members: Iterable[RingMember]) -> tuple[RingMember, ...]:
    return tuple(sorted(members, key=lambda member: member.worker))
