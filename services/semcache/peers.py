"""Which semcache process writes a tenant's entries: rendezvous hashing over the registry."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b

from covey.types.event import WorkerRecord
from covey.types.ids import TenantId, WorkerId

ENCODER = "encoder"
"""The registry label that names what made a process's vectors."""

Members = Callable[[], tuple[WorkerRecord, ...]]
"""Every semcache that is ready, as this process knows the registry; itself may be missing."""


class Peers:
    """The semcaches of the mesh as one of them sees them."""

    def __init__(self, members: Members, me: WorkerId) -> None:
        self._members = members
        self.me = me

    def names(self) -> frozenset[WorkerId]:
        """Who else is there."""
        return frozenset(record.worker for record in self._members()) - {self.me}

    def rank(self, tenant: TenantId) -> tuple[WorkerRecord | None, ...]:
        """All processes by preference for a tenant, the writer first; None is this one.

        A process that joins or leaves moves only the tenants that it gets or had, and the second in rank is who wrote
        before the first one joined.
        """
        others = [record for record in self._members() if record.worker != self.me]
        everyone = [(_score(record.worker, tenant), record) for record in others]
        ranked: list[tuple[bytes, WorkerRecord | None]] = [*everyone, (_score(self.me, tenant), None)]
        return tuple(record for _, record in sorted(ranked, key=lambda pair: pair[0], reverse=True))


def _score(worker: WorkerId, tenant: TenantId) -> bytes:
    digest = blake2b(worker.encode(), digest_size=16, person=b"covey-semcache", key=b"")
    digest.update(b"\0" + tenant.encode())
    return digest.digest()
