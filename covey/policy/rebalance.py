"""What a node owes to a chain that it holds: whether to keep it, and which nodes must have it too."""

from __future__ import annotations

from dataclasses import dataclass

from covey.policy.placement import rank
from covey.policy.ring import sites_of
from covey.types.ids import BlockHash, NamespaceId, WorkerId
from covey.types.kv_state import RingVersion


@dataclass(frozen=True, slots=True, kw_only=True)
class Duty:
    """Put a chain on `to`; unless it is one's to `keep`, give it up once they have it."""

    keep: bool
    to: tuple[WorkerId, ...]


def duty(
    worker: WorkerId, ring: RingVersion, namespace: NamespaceId, root: BlockHash, *, before: RingVersion | None = None
) -> Duty:
    """Return what `worker`, which holds the chain of `root`, does about it.

    With `before`, a ring under which everything was where it belonged, an owner serves only those who are new to
    the chain: other members, or others' new lives. Somebody who owns it no longer makes sure of all who do.
    """
    owners = holders(ring, namespace, root)
    others = tuple(each for each in owners if each != worker)
    if worker not in owners:
        return Duty(keep=False, to=others)
    if before is None:
        return Duty(keep=True, to=others)
    had = set(holders(before, namespace, root)) & _same_lives(before, ring)
    if worker not in had:  # new to it oneself: whoever had it serves the others
        return Duty(keep=True, to=())
    return Duty(keep=True, to=tuple(each for each in others if each not in had))


def holders(ring: RingVersion, namespace: NamespaceId, root: BlockHash) -> tuple[WorkerId, ...]:
    """Return the owner of a chain and its other replicas."""
    return rank(sites_of(ring), namespace, root, replicas=ring.replicas)[: ring.replicas]


def without(ring: RingVersion, worker: WorkerId) -> RingVersion:
    """Return a ring as it is once a node has left."""
    return RingVersion(
        version=ring.version,
        proposer=ring.proposer,
        replicas=ring.replicas,
        members=tuple(member for member in ring.members if member.worker != worker),
    )


def _same_lives(before: RingVersion, after: RingVersion) -> set[WorkerId]:
    lives = {(member.worker, member.epoch) for member in before.members}
    return {member.worker for member in after.members if (member.worker, member.epoch) in lives}
