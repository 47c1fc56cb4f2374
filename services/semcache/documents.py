"""The truth about all entries: documents that outlive the process, and the contract of what keeps them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from covey.types.ids import TenantId

from .entry import Document

LOAD_BATCH = 512
"""Documents read at a time when a process starts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Voided:
    """Where a tenant stands: `epoch` counts its invalidations, `reign` the processes that wrote its entries."""

    epoch: int = 0
    reign: int = 0


class Documents(Protocol):
    """Keeps documents by label. What `put` or `remove` returned from is there, or gone, after a kill too.

    Times of documents are of the process's clock; they are kept as wall time.
    """

    @property
    def writable(self) -> str:
        """Why nothing can be written now; empty when it can."""
        ...

    async def put(self, documents: Sequence[Document]) -> None:
        """Keep documents, replacing those of equal labels; durable on return. Raises `NoSpace` or `Unavailable`."""
        ...

    async def remove(self, labels: Iterable[int]) -> None:
        """Drop documents; durable on return. Raises `NoSpace` or `Unavailable`: then nothing is promised."""
        ...

    def forget(self, labels: Iterable[int]) -> None:
        """Drop documents soon: for evicted and expired ones, that do no harm if they come back."""
        ...

    async def get(self, labels: Sequence[int]) -> list[Document]:
        """Return those that are there. Raises `Unavailable`."""
        ...

    def load(self) -> AsyncIterator[list[Document]]:
        """Every document, a batch at a time, the oldest first. Raises `Unavailable`."""
        ...

    async def standing(self, tenant: TenantId) -> Voided:
        """Return where a tenant stands; zeros for an unknown one."""
        ...

    async def void(self, tenant: TenantId, voided: Voided, labels: Iterable[int]) -> None:
        """Drop documents and move the tenant on, both or neither; durable on return."""
        ...


class MemoryDocuments:
    """Documents that end with the process: for a cache that is configured to keep nothing on a disk."""

    writable = ""

    def __init__(self) -> None:
        self._documents: dict[int, Document] = {}
        self._standing: dict[TenantId, Voided] = {}

    async def put(self, documents: Sequence[Document]) -> None:
        self._documents.update((document.label, document) for document in documents)

    async def remove(self, labels: Iterable[int]) -> None:
        self.forget(labels)

    def forget(self, labels: Iterable[int]) -> None:
        for label in labels:
            self._documents.pop(label, None)

    async def get(self, labels: Sequence[int]) -> list[Document]:
        return [self._documents[label] for label in labels if label in self._documents]

    async def load(self) -> AsyncIterator[list[Document]]:
        everything = sorted(self._documents.values(), key=lambda document: document.stored_at)
        for at in range(0, len(everything), LOAD_BATCH):
            yield everything[at : at + LOAD_BATCH]

    async def standing(self, tenant: TenantId) -> Voided:
        return self._standing.get(tenant, Voided())

    async def void(self, tenant: TenantId, voided: Voided, labels: Iterable[int]) -> None:
        self.forget(labels)
        self._standing[tenant] = voided
