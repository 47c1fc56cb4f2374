"""Every entry as memory knows it: exact keys, shelves of vectors, quotas, expiry. Its documents lie elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from random import Random

import anyio

from covey.types.ids import TenantId

from .calendar import Calendar
from .entry import Document, Held, Partition, Scope, Shelf, hash_of, label_of
from .graph import Graph, Segment, Slab
from .quota import Ledger, Quota
from .shelves import Place, Shelves
from .slots import Slots
from .table import Table
from .vectors import Neighbour, Rebuild, VectorIndex, Vectors, merged

SWEEP_MAX = 1000
"""Expired entries removed at a time, so that one sweep never holds up the event loop."""
SAME = 1.0 - 1e-5
"""From this similarity on two vectors are one: equal ones spoil an hnsw graph."""
SLICE_ROWS = 8192
"""Rows compared before a look-up lets others pass: about 1 ms."""


class Store:
    """Every entry of this process, bounded in number and bytes; owned by the event loop, changed without awaiting."""

    def __init__(
        self,
        *,
        entries_max: int,
        size_bytes_max: int,
        tail_max: int,
        tenant: Quota | None = None,
        rng: Random | None = None,
    ) -> None:
        """`tail_max`: vectors of one shelf that are compared one by one. `tenant`: what each tenant may hold."""
        self._table = Table()
        self._shelves = Shelves(tail_max=tail_max)
        whole = Quota(entries=entries_max, size_bytes=size_bytes_max)
        self._ledger = Ledger(self._table, whole, tenant, rng or Random(0))  # noqa: S311 - samples, not secrets
        self._slots = Slots()
        self._exact = Slots()
        self._calendar = Calendar()
        self.on_removed: Callable[[int, TenantId], None] | None = None

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, label: int) -> bool:
        return label in self._slots

    @property
    def size_bytes(self) -> int:
        """Bytes accounted to all entries."""
        return self._ledger.size_bytes

    def get(self, tenant: TenantId, entry: str) -> Held | None:
        """Return a tenant's entry; another tenant's is as absent as one that never was."""
        label = label_of(entry)
        held = self.held(label) if label is not None else None
        return held if held is not None and held.scope.tenant == tenant else None

    def held(self, label: int) -> Held | None:
        """Return the entry of a label, if it is still there."""
        slot = self._slots.get(label)
        return self._held(slot) if slot is not None else None

    def exact(self, scope: Scope, category: str, exact_key: bytes) -> Held | None:
        """Return what is probably the entry of an equal request, stale or not; its document decides (`answers`)."""
        slot = self._exact.get(hash_of(scope, category, exact_key))
        return self._held(slot) if slot is not None else None

    async def nearest(self, shelf: Shelf, vector: Vectors, k: int) -> list[tuple[Held, float]]:
        """Return the `k` nearest entries of a shelf with their similarities, by falling similarity."""
        place = self._shelves.find(shelf)
        if place is None or place.index is None or k < 1:
            return []
        found: list[list[Neighbour]] = []
        rows = 0
        sizes = [len(place.index.rows), *(len(s) * isinstance(s, Slab) for s in place.index.segments)]
        for part, size in zip(place.index.parts(vector, k), sizes, strict=False):
            found.append(part)
            rows += size
            if rows > SLICE_ROWS:
                rows = 0
                await anyio.lowlevel.checkpoint()
        alive = ((self.held(n.label), n.similarity) for n in merged(found, k))
        return [(held, similarity) for held, similarity in alive if held is not None and held.shelf == shelf]

    def add(
        self, document: Document, vector: Vectors | None, *, quota_entries: int, quota_bytes: int = 0
    ) -> tuple[int, ...]:
        """Hold an entry in place of any that answers the same; return the labels of all that went for it.

        The entry must fit: at most `size_bytes_max`, and `quota_entries` at least 1. Raises `ValueError` for a vector
        that may not be indexed.
        """
        place = self._shelves.enter(document.shelf)
        gone: list[int] = []
        try:
            if vector is not None:
                gone.extend(self._index(place, document.label, vector))
        except ValueError:
            self._shelves.leave(place)
            raise
        twin = self._exact.get(document.exact_hash) if document.exact_key else None
        if twin is not None:
            gone.append(int(self._table.label[twin]))
            self.remove(gone[-1])
        slot = self._file(place, document, indexed=vector is not None)
        quota = Quota(entries=quota_entries, size_bytes=quota_bytes)
        while (worst := self._ledger.excess(slot, document.shelf.partition, quota)) is not None:
            gone.append(int(self._table.label[worst]))
            self.remove(gone[-1])
        return tuple(gone)

    def touch(self, label: int, now: float) -> None:
        """Note that an entry was used; its age does not change."""
        slot = self._slots.get(label)
        if slot is not None:
            self._ledger.use(slot, self._place(slot).shelf.partition, now)

    def remove(self, label: int) -> bool:
        """Remove an entry from every table; False when it is not here."""
        slot = self._slots.get(label)
        if slot is None:
            return False
        self._slots.remove(label, slot)
        table, place = self._table, self._place(slot)
        exact = int(table.exact[slot])
        if exact:
            self._exact.remove(exact, slot)
        self._unindex(slot)
        self._ledger.leave(slot, place.shelf.partition)
        self._shelves.leave(place)
        table.expires_at[slot] = math.inf
        table.give(slot)
        if self.on_removed is not None:
            self.on_removed(label, place.shelf.partition.scope.tenant)
        return True

    def matching(self, tenant: TenantId, *, model: str = "", category: str = "") -> Iterator[Held]:
        """Yield a tenant's entries; an empty `model` or `category` means all."""
        for partition, members in self._ledger.partitions(tenant).items():
            if model in ("", partition.scope.model) and category in ("", partition.category):
                yield from [self._held(slot) for slot in members.slots]

    def tenants(self) -> tuple[TenantId, ...]:
        """Who has entries here."""
        return tuple(tenant for tenant, _ in self._ledger.tenancies())

    def holdings(self) -> Iterator[tuple[Partition, int, int]]:
        """Entries and bytes of every partition."""
        for _, tenancy in self._ledger.tenancies():
            for partition, members in tenancy.partitions.items():
                yield partition, len(members.slots), members.size_bytes

    def sweep(self, now: float) -> tuple[int, ...]:
        """Remove up to `SWEEP_MAX` entries whose time is over; return their labels."""
        removed: list[int] = []
        for slot in self._calendar.due(self._table.expires_at, now, SWEEP_MAX):
            label = int(self._table.label[slot])
            if self.remove(label):
                removed.append(label)
        if len(self._calendar) > 2 * len(self._slots) + 64:  # entries removed otherwise leave their date behind
            self._calendar.rewrite(self._slots.all(), self._table.expires_at)
        return tuple(removed)

    def take_crowded(self) -> tuple[Shelf, VectorIndex] | None:
        """Return a shelf that needs a new generation, each once; None when there is none."""
        return self._shelves.take_crowded()

    def adopt(self, shelf: Shelf, index: VectorIndex, rebuild: Rebuild, graph: Graph | None) -> bool:
        """Swap in a new generation; False when `index` has left its shelf meanwhile."""
        return self._shelves.adopt(shelf, index, rebuild, graph)

    def adopt_segment(self, shelf: Shelf, segment: Segment) -> None:
        """Take in a segment read from disk, over entries of `shelf` that were filed without their vectors."""
        place = self._shelves.find(shelf)
        if place is None:
            return
        slots = {label: self._slots.get(label) for label in segment.live(frozenset()).tolist()}
        mine = {
            label: slot
            for label, slot in slots.items()
            if slot is not None and self._place(slot) is place and not self._table.indexed[slot]
        }
        self._shelves.adopt_segment(place, segment, frozenset(slots.keys() - mine.keys()))
        for slot in mine.values():
            self._table.indexed[slot] = True

    def index_vector(self, label: int, vector: Vectors) -> None:
        """File the vector of an entry that was added without, at the start; one that is there stays as it is."""
        slot = self._slots.get(label)
        if slot is not None and not self._table.indexed[slot]:
            self._shelves.load(self._place(slot), label, vector)
            self._table.indexed[slot] = True

    def indexes(self) -> tuple[tuple[Shelf, VectorIndex], ...]:
        """Every shelf that has vectors."""
        return tuple((place.shelf, place.index) for place in self._shelves.places() if place.index is not None)

    def check(self) -> None:
        """Assert that all tables tell the same story."""
        table, slots = self._table, [slot for _, slot in self._slots.items()]
        assert len(slots) == len(set(slots))
        assert all(int(table.label[slot]) == label for label, slot in self._slots.items())
        assert all(int(table.exact[slot]) == key and slot in slots for key, slot in self._exact.items())
        self._ledger.check(slots)
        self._shelves.check()
        for place in self._shelves.places():
            here = [slot for slot in slots if self._place(slot) is place]
            labels = set(place.index.labels()) if place.index is not None else set()
            assert len(here) == place.entries
            assert labels == {int(table.label[slot]) for slot in here if table.indexed[slot]}
        assert len(self._calendar) >= len(slots)

    def _index(self, place: Place, label: int, vector: Vectors) -> list[int]:
        """Put a vector into its shelf in place of equal ones; an entry that only it could find goes with it."""
        gone: list[int] = []
        equal = place.index.search(vector, 2) if place.index is not None else []
        self._shelves.add(place, label, vector)
        for neighbour in equal:
            if neighbour.similarity >= SAME:
                twin = self._slots.get(neighbour.label)
                assert twin is not None
                self._unindex(twin)
                if not self._table.exact[twin]:
                    self.remove(neighbour.label)
                    gone.append(neighbour.label)
        return gone

    def _file(self, place: Place, document: Document, *, indexed: bool) -> int:
        table = self._table
        slot = table.take()
        table.label[slot] = document.label
        table.exact[slot] = document.exact_hash
        table.stored_at[slot] = table.used_at[slot] = document.stored_at
        table.expires_at[slot] = document.expires_at
        table.cost[slot] = 1.0 + document.completion_tokens
        table.size_bytes[slot] = document.size_bytes
        table.shelf[slot] = place.number
        table.indexed[slot] = indexed
        self._slots.put(document.label, slot)
        if document.exact_key:
            self._exact.put(document.exact_hash, slot)
        self._ledger.join(slot, place.shelf.partition)
        self._calendar.write(slot, document.expires_at)
        return slot

    def _unindex(self, slot: int) -> None:
        if self._table.indexed[slot]:
            self._table.indexed[slot] = False
            self._shelves.remove(self._place(slot), int(self._table.label[slot]))

    def _place(self, slot: int) -> Place:
        return self._shelves.numbered(int(self._table.shelf[slot]))

    def _held(self, slot: int) -> Held:
        table = self._table
        return Held(
            label=int(table.label[slot]),
            shelf=self._place(slot).shelf,
            stored_at=float(table.stored_at[slot]),
            expires_at=float(table.expires_at[slot]),
            size_bytes=int(table.size_bytes[slot]),
        )
