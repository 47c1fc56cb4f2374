"""Who holds how much, what each may hold, and what goes first when it is too much."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random

import numpy as np

from covey.types.ids import TenantId

from .entry import Partition
from .table import SCAN_MAX, Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """The most that a group of entries may hold; 0 bytes is no limit."""

    entries: int
    size_bytes: int = 0

    def exceeded(self, entries: int, size_bytes: int) -> bool:
        return entries > self.entries or bool(self.size_bytes and size_bytes > self.size_bytes)


@dataclass(slots=True)
class Members:
    """A partition's slots, in no order, what they weigh, and the value that eviction has reached in it."""

    slots: array[int] = field(default_factory=lambda: array("I"))
    size_bytes: int = 0
    reached: float = 0.0


@dataclass(slots=True)
class Tenancy:
    partitions: dict[Partition, Members] = field(default_factory=dict)
    entries: int = 0
    size_bytes: int = 0


class Ledger:
    """The account of all entries by tenant and partition.

    A partition over its quota gives up its own entries, a tenant over its quota those of its heaviest partition, and
    a full store those of the tenant that holds most, so one tenant cannot push another one's entries out by volume.
    What goes first is what is worth least: tokens that it would cost again, times its uses, per byte, plus the value
    that eviction had reached when it was last used (GDSF: Cherkasova, "Improving WWW Proxies Performance with
    Greedy-Dual-Size-Frequency Caching Policy", 1998), the longest unused among equals.
    """

    def __init__(self, table: Table, whole: Quota, tenant: Quota | None, rng: Random) -> None:
        self._table = table
        self._whole = whole
        self._tenant = tenant
        self._rng = rng
        self._tenants: dict[TenantId, Tenancy] = {}
        self.entries = 0
        self.size_bytes = 0

    def tenancies(self) -> Iterator[tuple[TenantId, Tenancy]]:
        """Every tenant that holds something."""
        yield from self._tenants.items()

    def partitions(self, tenant: TenantId) -> dict[Partition, Members]:
        """Return what a tenant holds, by partition."""
        tenancy = self._tenants.get(tenant)
        return dict(tenancy.partitions) if tenancy is not None else {}

    def join(self, slot: int, partition: Partition) -> None:
        """Account for a slot whose columns are written; `value`, `uses` and `place` are written here."""
        table = self._table
        size_bytes = int(table.size_bytes[slot])
        tenancy = self._tenants.setdefault(partition.scope.tenant, Tenancy())
        members = tenancy.partitions.setdefault(partition, Members())
        table.place[slot] = len(members.slots)
        table.uses[slot] = 0
        table.value[slot] = members.reached + float(table.cost[slot]) / size_bytes
        members.slots.append(slot)
        members.size_bytes += size_bytes
        tenancy.entries += 1
        tenancy.size_bytes += size_bytes
        self.entries += 1
        self.size_bytes += size_bytes

    def use(self, slot: int, partition: Partition, now: float) -> None:
        """Note a use."""
        table = self._table
        members = self._tenants[partition.scope.tenant].partitions[partition]
        table.uses[slot] = min(int(table.uses[slot]) + 1, 1_000_000)
        table.value[slot] = members.reached + (1.0 + int(table.uses[slot])) * float(table.cost[slot]) / int(
            table.size_bytes[slot]
        )
        table.used_at[slot] = now

    def leave(self, slot: int, partition: Partition) -> None:
        """Take a slot out; the last one of its partition moves into the gap."""
        tenancy = self._tenants[partition.scope.tenant]
        members = tenancy.partitions[partition]
        last = members.slots.pop()
        if last != slot:
            at = int(self._table.place[slot])
            members.slots[at] = last
            self._table.place[last] = at
        size_bytes = int(self._table.size_bytes[slot])
        members.size_bytes -= size_bytes
        tenancy.size_bytes -= size_bytes
        tenancy.entries -= 1
        self.entries -= 1
        self.size_bytes -= size_bytes
        if not members.slots:
            del tenancy.partitions[partition]
        if not tenancy.entries:
            del self._tenants[partition.scope.tenant]

    def excess(self, newest: int, partition: Partition, quota: Quota) -> int | None:
        """Return the slot that goes next because some quota is exceeded; None when none is. Never the newest."""
        tenancy = self._tenants[partition.scope.tenant]
        members = tenancy.partitions[partition]
        if quota.exceeded(len(members.slots), members.size_bytes) and len(members.slots) > 1:
            return self._least(members, newest)
        is_over = self._tenant is not None and self._tenant.exceeded(tenancy.entries, tenancy.size_bytes)
        if is_over and tenancy.entries > 1:
            return self._least(_heaviest(tenancy, members), newest)
        if self._whole.exceeded(self.entries, self.size_bytes) and self.entries > 1:
            others = (t for t in self._tenants.values() if t is not tenancy or t.entries > 1)
            return self._least(_heaviest(max(others, key=lambda t: t.size_bytes), members), newest)
        return None

    def check(self, slots: list[int]) -> None:
        """Assert that the sums are those of `slots`, all that there are."""
        table = self._table
        held = [(m, slot) for t in self._tenants.values() for m in t.partitions.values() for slot in m.slots]
        assert sorted(slot for _, slot in held) == sorted(slots)
        assert all(m.slots[table.place[slot]] == slot for m, slot in held)
        assert self.entries == len(slots) == sum(tenancy.entries for tenancy in self._tenants.values())
        assert self.size_bytes == sum(tenancy.size_bytes for tenancy in self._tenants.values())
        assert self.size_bytes == int(table.size_bytes[slots].sum())
        assert not self._whole.exceeded(self.entries, self.size_bytes)

    def _least(self, members: Members, newest: int) -> int:
        """What is worth least of a partition; about 10 µs a thousand members."""
        chosen = np.frombuffer(members.slots, dtype=np.uint32)
        if len(chosen) > SCAN_MAX:
            # An even part from a random place on: slots stand in no order, and drawing each would take milliseconds.
            places = (np.arange(SCAN_MAX) * len(chosen)) // SCAN_MAX + self._rng.randrange(len(chosen))
            chosen = chosen[places % len(chosen)]
        chosen = chosen[chosen != newest]
        values = self._table.value[chosen]
        least = chosen[values <= values.min() * (1.0 + 1e-9)]
        slot = int(least[np.argmin(self._table.used_at[least])])
        members.reached = max(members.reached, float(self._table.value[slot]))
        return slot


def _heaviest(tenancy: Tenancy, newest: Members) -> Members:
    """The partition that gives something up: the heaviest that has more than the newest entry."""
    fit = (members for members in tenancy.partitions.values() if members is not newest or len(members.slots) > 1)
    return max(fit, key=lambda members: members.size_bytes)
