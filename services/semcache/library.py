"""Tables in memory and documents on disk as one: what is acknowledged is on disk first, what is served is fetched."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import anyio
import numpy as np
from anyio import to_thread
from structlog.typing import FilteringBoundLogger

from covey import failpoint
from covey.clock import Clock
from covey.types.ids import TenantId

from .documents import Documents, Voided
from .entry import Document, Shelf
from .graph import Graph
from .segment_files import SegmentFiles
from .store import Store
from .vectors import Vectors, check_vector


@dataclass(frozen=True, slots=True, kw_only=True)
class Filing:
    """A document, its vector if it has one, and what its category may hold."""

    document: Document
    vector: Vectors | None
    quota_entries: int
    quota_bytes: int = 0


Quotas = Callable[[str], tuple[int, int]]
"""The quota of a category by name, in entries and bytes; zero entries for one that is no more."""


class Listener(Protocol):
    """Hears of every change as it happens."""

    def stored(self, tenant: TenantId, label: int) -> None: ...

    def removed(self, tenant: TenantId, label: int) -> None: ...

    def voided(self, tenant: TenantId, epoch: int, labels: tuple[int, ...]) -> None: ...


class Library:
    """Every entry of this process; owned by the event loop."""

    listener: Listener | None = None

    def __init__(
        self,
        store: Store,
        documents: Documents,
        *,
        encoder: str,
        recent_bytes_max: int,
        clock: Clock,
        log: FilteringBoundLogger,
        files: SegmentFiles | None = None,
    ) -> None:
        """`encoder` names whose vectors these are; `recent_bytes_max` bounds documents kept in memory to be served."""
        self.store = store
        self.documents = documents
        self.encoder = encoder
        self.files = files
        self._recent_bytes_max = recent_bytes_max
        self._clock = clock
        self._log = log
        self._recent: OrderedDict[int, Document] = OrderedDict()
        self._recent_bytes = 0
        self._voids: dict[TenantId, int] = {}
        self._is_voiding = False
        store.on_removed = self._removed

    async def restore(self, quotas: Quotas) -> None:
        """File every document that has not expired, with its graph or its vector; called once, before serving."""
        graphs: dict[Shelf, list[Graph]] = {}
        for shelf, graph in await to_thread.run_sync(self._saved):
            graphs.setdefault(shelf, []).append(graph)
        strange = 0
        async for batch in self.documents.load():
            for document in batch:
                if self._admit(document, quotas) and document.vector:
                    is_built = any(document.label in graph for graph in graphs.get(document.shelf, ()))
                    strange += not is_built and not self._place(document)
        for shelf, found in graphs.items():
            for graph in found:
                self.store.adopt_segment(shelf, graph)
        if strange:
            self._log.warning("vectors of another encoder set aside: only equal requests find them", count=strange)

    def _saved(self) -> list[tuple[Shelf, Graph]]:
        return list(self.files.load()) if self.files is not None else []

    def _admit(self, document: Document, quotas: Quotas) -> bool:
        entries, size_bytes = quotas(document.shelf.partition.category)
        if document.expires_at <= self._clock.now() or not entries:
            self.documents.forget((document.label,))
            return False
        self.documents.forget(self.store.add(document, None, quota_entries=entries, quota_bytes=size_bytes))
        return True

    def _place(self, document: Document) -> bool:
        vector = self.vector_of(document)
        if vector is not None:
            self.store.index_vector(document.label, vector)
        return vector is not None

    def vector_of(self, document: Document) -> Vectors | None:
        """A document's vector, if this process's encoder made it and it can be indexed."""
        if document.encoder != self.encoder:
            return None
        vector = np.frombuffer(document.vector, dtype="<f4").astype(np.float32)
        try:
            check_vector(vector, len(vector))
        except ValueError:
            return None
        return vector

    async def put(self, filings: Sequence[Filing]) -> list[tuple[int, ...] | None]:
        """Keep entries: on disk, then in memory; return for each the labels of those that went for it.

        None stands for one whose tenant's entries were voided while it was written: it is not kept. Raises `NoSpace`
        or `Unavailable`: then none of them is kept; and `ValueError` for a vector that may not be indexed.
        """
        for filing in filings:
            if filing.vector is not None:
                check_vector(filing.vector, len(filing.vector))
        tenants = [filing.document.scope.tenant for filing in filings]
        voids = [self._voids.get(tenant, 0) for tenant in tenants]
        await self.documents.put([filing.document for filing in filings])
        filed: list[tuple[int, ...] | None] = []
        for filing, tenant, before in zip(filings, tenants, voids, strict=True):
            if filed:  # one takes a millisecond or more: others have their turn in between
                await anyio.lowlevel.cancel_shielded_checkpoint()
            is_void = self._voids.get(tenant, 0) != before
            if is_void:
                self.documents.forget((filing.document.label,))
            filed.append(None if is_void else self._file(filing))
        return filed

    async def fetch(self, labels: Sequence[int]) -> Mapping[int, Document]:
        """Return the documents of entries that are still held. Raises `Unavailable`."""
        found = {label: self._recent[label] for label in labels if label in self._recent}
        missing = [label for label in labels if label not in found]
        if missing:
            for document in await self.documents.get(missing):
                found[document.label] = document
                if document.label in self.store:
                    self._remember(document)
        for label in found:
            if label in self._recent:
                self._recent.move_to_end(label)
        return {label: document for label, document in found.items() if label in self.store}

    async def remove(self, labels: Iterable[int]) -> int:
        """Remove entries: from memory at once, from disk on return; how many there were. Raises as `put`."""
        gone = [label for label in labels if self.drop(label)]
        if gone:
            await self.documents.remove(gone)
        return len(gone)

    async def void(self, tenant: TenantId, voided: Voided, labels: Sequence[int]) -> int:
        """Remove a tenant's entries and move it on to another epoch, both at once on disk. Raises as `put`."""
        self._voids[tenant] = self._voids.get(tenant, 0) + 1
        self._is_voiding = True
        try:
            removed = sum(self.drop(label) for label in labels)
        finally:
            self._is_voiding = False
        if self.listener is not None:
            self.listener.voided(tenant, voided.epoch, tuple(labels))
        await self.documents.void(tenant, voided, labels)
        return removed

    def sweep(self, now: float) -> tuple[int, ...]:
        """Remove some entries whose time is over; return their labels."""
        expired = self.store.sweep(now)
        for label in expired:
            self._forget(label)
        self.documents.forget(expired)
        return expired

    def drop(self, label: int) -> bool:
        """Remove an entry from memory; False when it is not here."""
        self._forget(label)
        return self.store.remove(label)

    def _file(self, filing: Filing) -> tuple[int, ...]:
        failpoint.hit("semcache.file")
        gone = self.store.add(
            filing.document, filing.vector, quota_entries=filing.quota_entries, quota_bytes=filing.quota_bytes
        )
        for label in gone:
            self._forget(label)
        self.documents.forget(gone)
        self._remember(filing.document)
        if self.listener is not None:
            self.listener.stored(filing.document.scope.tenant, filing.document.label)
        return gone

    def _removed(self, label: int, tenant: TenantId) -> None:
        if self.listener is not None and not self._is_voiding:
            self.listener.removed(tenant, label)

    def _remember(self, document: Document) -> None:
        self._forget(document.label)
        self._recent[document.label] = document
        self._recent_bytes += document.size_bytes
        while self._recent_bytes > self._recent_bytes_max:
            self._forget(next(iter(self._recent)))

    def _forget(self, label: int) -> None:
        document = self._recent.pop(label, None)
        if document is not None:
            self._recent_bytes -= document.size_bytes
