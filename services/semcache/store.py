"""All entries in memory: tables by key, shelves of vectors, quotas, expiry and eviction."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from covey.policy.reuse import Candidate
from covey.types.ids import TenantId

from .entry import Entry, Partition, Scope, Shelf
from .vectors import Neighbour, VectorIndex, Vectors

SWEEP_MAX = 1000
"""Expired entries removed at a time, so that one sweep never holds up the event loop."""


@dataclass(slots=True)
class Tenancy:
    """A tenant's entries, the longest unused first, and what they weigh."""

    entries: OrderedDict[str, Entry] = field(default_factory=OrderedDict)
    size_bytes: int = 0


class Store:
    """Every entry of this process, bounded in number and bytes; owned by the event loop, never awaits.

    Memory only: a restart begins empty. When the store is full, the tenant that holds most gives up what it
    has not used for longest, so one tenant cannot push another one's entries out by volume; a partition over its
    quota gives up its own.
    """

    def __init__(self, *, entries_max: int, size_bytes_max: int, tail_max: int) -> None:
        self._entries_max = entries_max
        self._size_bytes_max = size_bytes_max
        self._tail_max = tail_max
        self._entries: dict[str, Entry] = {}
        self._labels: dict[int, Entry] = {}
        self._exact: dict[tuple[Scope, str, bytes], Entry] = {}
        self._texts: dict[tuple[Shelf, str], Entry] = {}
        self._shelves: dict[Shelf, VectorIndex] = {}
        self._partitions: dict[Partition, OrderedDict[str, Entry]] = {}
        self._tenants: dict[TenantId, Tenancy] = {}
        self._expiry: list[tuple[float, str]] = []
        self._size_bytes = 0
        self._crowded: dict[Shelf, None] = {}

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def size_bytes(self) -> int:
        """Bytes accounted to all entries."""
        return self._size_bytes

    def get(self, tenant: TenantId, entry: str) -> Entry | None:
        """Return a tenant's entry; another tenant's is as absent as one that never was."""
        found = self._entries.get(entry)
        return found if found is not None and found.scope.tenant == tenant else None

    def exact(self, scope: Scope, category: str, exact_key: bytes) -> Entry | None:
        """Return the entry of an equal request, stale or not; `category` is what the request names."""
        return self._exact.get((scope, category, exact_key))

    def shelf(self, shelf: Shelf) -> VectorIndex | None:
        """Return the vectors of a shelf, if it has any."""
        return self._shelves.get(shelf)

    def take_crowded(self) -> VectorIndex | None:
        """Return the vectors of a shelf that needs a new generation, each once; None when there is none."""
        while self._crowded:
            index = self._shelves.get(self._crowded.popitem()[0])
            if index is not None and index.crowded:
                return index
        return None

    def candidates(self, neighbours: list[Neighbour]) -> tuple[Candidate, ...]:
        """Turn labels into candidates; those that were removed since the search are left out."""
        return tuple(self._labels[n.label].candidate(n.similarity) for n in neighbours if n.label in self._labels)

    def add(self, entry: Entry, vector: Vectors | None, *, quota_entries: int) -> int:
        """Store an entry in place of any that answers the same; return how many others were evicted for it.

        The entry must fit: at most `size_bytes_max`, and `quota_entries` at least 1.
        """
        for twin in self._twins(entry, vector is not None):
            self.remove(twin)
        if vector is not None:
            self._shelve(entry, vector)
        self._entries[entry.id] = entry
        self._labels[entry.label] = entry
        if entry.exact_key:
            self._exact[self._exact_key(entry)] = entry
        self._partitions.setdefault(entry.shelf.partition, OrderedDict())[entry.id] = entry
        tenancy = self._tenants.setdefault(entry.scope.tenant, Tenancy())
        tenancy.entries[entry.id] = entry
        tenancy.size_bytes += entry.size_bytes
        self._size_bytes += entry.size_bytes
        heapq.heappush(self._expiry, (entry.expires_at, entry.id))
        return self._evict(entry, quota_entries)

    def touch(self, entry: Entry) -> None:
        """Note that an entry was used; its age does not change."""
        if entry.id in self._entries:
            self._partitions[entry.shelf.partition].move_to_end(entry.id)
            self._tenants[entry.scope.tenant].entries.move_to_end(entry.id)

    def remove(self, entry: Entry) -> None:
        """Remove an entry from every table."""
        if self._entries.pop(entry.id, None) is None:
            return
        del self._labels[entry.label]
        if self._exact.get(self._exact_key(entry)) is entry:
            del self._exact[self._exact_key(entry)]
        self._unshelve(entry)
        members = self._partitions[entry.shelf.partition]
        del members[entry.id]
        if not members:
            del self._partitions[entry.shelf.partition]
        tenancy = self._tenants[entry.scope.tenant]
        del tenancy.entries[entry.id]
        tenancy.size_bytes -= entry.size_bytes
        if not tenancy.entries:
            del self._tenants[entry.scope.tenant]
        self._size_bytes -= entry.size_bytes

    def matching(self, tenant: TenantId, *, model: str = "", category: str = "") -> tuple[Entry, ...]:
        """Return a tenant's entries; an empty `model` or `category` means all."""
        tenancy = self._tenants.get(tenant)
        return tuple(
            entry
            for entry in (tenancy.entries.values() if tenancy is not None else ())
            if model in ("", entry.scope.model) and category in ("", entry.shelf.partition.category)
        )

    def sweep(self, now: float) -> int:
        """Remove up to `SWEEP_MAX` entries whose time is over; return how many."""
        removed = 0
        while self._expiry and self._expiry[0][0] <= now and removed < SWEEP_MAX:
            _, entry_id = heapq.heappop(self._expiry)
            entry = self._entries.get(entry_id)
            if entry is not None:
                self.remove(entry)
                removed += 1
        if len(self._expiry) > 2 * len(self._entries) + 64:  # entries removed otherwise leave their date behind
            self._expiry = [(entry.expires_at, entry.id) for entry in self._entries.values()]
            heapq.heapify(self._expiry)
        return removed

    def check(self) -> None:
        """Assert that all tables tell the same story."""
        assert len(self._entries) <= self._entries_max
        assert self._size_bytes <= self._size_bytes_max
        assert self._size_bytes == sum(entry.size_bytes for entry in self._entries.values())
        assert self._size_bytes == sum(tenancy.size_bytes for tenancy in self._tenants.values())
        assert sum(map(len, self._partitions.values())) == len(self._entries) == len(self._labels)
        assert sum(len(tenancy.entries) for tenancy in self._tenants.values()) == len(self._entries)
        assert all(self._entries[entry.id] is entry for entry in self._exact.values())
        assert sum(map(len, self._shelves.values())) == len(self._texts) <= len(self._entries)
        assert all(entry.label in self._shelves[entry.shelf] for entry in self._texts.values())
        assert all(self._shelves.values())
        assert self._crowded.keys() <= self._shelves.keys()
        assert {entry_id for _, entry_id in self._expiry} >= self._entries.keys()

    def _twins(self, entry: Entry, has_vector: bool) -> Iterator[Entry]:
        if entry.exact_key and (twin := self._exact.get(self._exact_key(entry))) is not None:
            yield twin
        if has_vector and (twin := self._texts.get(self._text_key(entry))) is not None:
            yield twin

    def _shelve(self, entry: Entry, vector: Vectors) -> None:
        index = self._shelves.get(entry.shelf)
        if index is None:
            index = VectorIndex(len(vector), tail_max=self._tail_max)
        index.add(entry.label, vector)
        self._shelves[entry.shelf] = index
        self._texts[self._text_key(entry)] = entry
        self._note(entry.shelf, index)

    def _unshelve(self, entry: Entry) -> None:
        if self._texts.get(self._text_key(entry)) is not entry:
            return
        del self._texts[self._text_key(entry)]
        index = self._shelves[entry.shelf]
        index.remove(entry.label)
        if not index:
            del self._shelves[entry.shelf]
        self._note(entry.shelf, index)

    def _note(self, shelf: Shelf, index: VectorIndex) -> None:
        if index.crowded:
            self._crowded[shelf] = None
        else:
            self._crowded.pop(shelf, None)

    def _evict(self, newest: Entry, quota_entries: int) -> int:
        before = len(self._entries)
        members = self._partitions[newest.shelf.partition]
        while len(members) > quota_entries:
            self.remove(next(iter(members.values())))
        while len(self._entries) > self._entries_max or self._size_bytes > self._size_bytes_max:
            others = (tenancy for tenancy in self._tenants.values() if next(iter(tenancy.entries)) != newest.id)
            largest = max(others, key=lambda tenancy: tenancy.size_bytes)
            self.remove(next(iter(largest.entries.values())))
        return before - len(self._entries)

    @staticmethod
    def _exact_key(entry: Entry) -> tuple[Scope, str, bytes]:
        return entry.scope, entry.asked_category, entry.exact_key

    @staticmethod
    def _text_key(entry: Entry) -> tuple[Shelf, str]:
        # The encoder knows no case and no spacing, and equal vectors spoil an hnsw graph: one entry for all.
        return entry.shelf, " ".join(entry.text.casefold().split())
