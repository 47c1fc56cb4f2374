"""The tables under random use: always consistent, always within bounds."""

from __future__ import annotations

from array import array

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from covey.types.generate import FinishReason
from covey.types.ids import TenantId
from services.semcache.entry import Entry, Partition, Scope, Shelf
from services.semcache.store import Store

TENANTS = st.sampled_from([TenantId("a"), TenantId("b")])
ENTRIES_MAX, BYTES_MAX, QUOTA = 8, 1000, 5
SIZES = st.integers(1, BYTES_MAX)


def make(
    label: int, tenant: TenantId, *, text: str = "", key: bytes = b"", size: int = 10, expires_at: float = 100.0
) -> Entry:
    return Entry(
        id=f"e{label}", label=label, shelf=Shelf(Partition(Scope(tenant, "m"), "faq"), b"c"), asked_category="faq",
        exact_key=key, text=text, answer="x", token_ids=array("I"), reason=FinishReason.STOP, prompt_tokens=0,
        completion_tokens=0, stored_at=0.0, expires_at=expires_at, size_bytes=size,
    )  # fmt: skip


def vector(seed: int) -> np.ndarray:
    value = np.random.default_rng(seed).standard_normal(4)
    return (value / np.linalg.norm(value)).astype(np.float32)


class StoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.store = Store(entries_max=ENTRIES_MAX, size_bytes_max=BYTES_MAX, tail_max=2)
        self.label = 0
        self.now = 0.0

    @rule(
        tenant=TENANTS, key=st.integers(0, 4), size=st.integers(1, BYTES_MAX), ttl=st.integers(1, 9), like=st.booleans()
    )
    def add(self, tenant: TenantId, key: int, size: int, ttl: int, like: bool) -> None:
        entry = make(self.label, tenant, text=f"Text {key % 3}", key=bytes([key]), size=size, expires_at=self.now + ttl)
        before = len(self.store)
        evicted = self.store.add(entry, vector(self.label) if like else None, quota_entries=QUOTA)
        self.label += 1
        assert self.store.get(tenant, entry.id) is entry
        assert len(self.store) <= before + 1 - evicted
        assert len(self.store.matching(tenant)) <= QUOTA

    @rule(tenant=TENANTS, label=st.integers(0, 40))
    def use(self, tenant: TenantId, label: int) -> None:
        if (entry := self.store.get(tenant, f"e{label}")) is not None:
            self.store.touch(entry)

    @rule(tenant=TENANTS, label=st.integers(0, 40))
    def remove(self, tenant: TenantId, label: int) -> None:
        if (entry := self.store.get(tenant, f"e{label}")) is not None:
            self.store.remove(entry)
            self.store.remove(entry)
            assert self.store.get(tenant, f"e{label}") is None

    @rule()
    def build(self) -> None:
        while (index := self.store.take_crowded()) is not None:
            rebuild = index.rebuild()
            index.adopt(rebuild, rebuild.build())

    @rule(seconds=st.integers(0, 5))
    def wait(self, seconds: int) -> None:
        self.now += seconds
        self.store.sweep(self.now)
        assert all(e.expires_at > self.now for t in "ab" for e in self.store.matching(TenantId(t)))

    @invariant()
    def consistent(self) -> None:
        self.store.check()


StoreMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestStore = StoreMachine.TestCase


def test_the_longest_unused_goes_first() -> None:
    store = Store(entries_max=100, size_bytes_max=10_000, tail_max=10)
    entries = [make(label, TenantId("a"), key=bytes([label])) for label in range(3)]
    for entry in entries:
        store.add(entry, None, quota_entries=3)
    store.touch(entries[0])
    assert store.add(make(3, TenantId("a"), key=b"n"), None, quota_entries=3) == 1
    assert [store.get(TenantId("a"), f"e{i}") is not None for i in range(4)] == [True, False, True, True]


def test_a_greedy_tenant_evicts_only_itself() -> None:
    store = Store(entries_max=10, size_bytes_max=10_000, tail_max=10)
    for label in range(3):
        store.add(make(label, TenantId("quiet"), key=bytes([label])), None, quota_entries=1000)
    for label in range(3, 200):
        store.add(make(label, TenantId("greedy"), key=str(label).encode()), None, quota_entries=1000)
    assert len(store.matching(TenantId("quiet"))) == 3
    assert len(store.matching(TenantId("greedy"))) == 7


def test_the_last_answer_to_the_same_text_replaces_the_earlier() -> None:
    store = Store(entries_max=10, size_bytes_max=10_000, tail_max=10)
    store.add(make(1, TenantId("a"), text="What  time is it"), vector(1), quota_entries=9)
    store.add(make(2, TenantId("a"), text="what time is it"), vector(1), quota_entries=9)
    assert [entry.id for entry in store.matching(TenantId("a"))] == ["e2"]
