"""The tables under random use: always consistent, always within bounds."""

from __future__ import annotations

from array import array

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from covey.types.generate import FinishReason
from covey.types.ids import TenantId
from services.semcache.entry import Document, Partition, Scope, Shelf
from services.semcache.quota import Quota
from services.semcache.store import Store

A, B = TenantId("a"), TenantId("b")
TENANTS = st.sampled_from([A, B])
ENTRIES_MAX, BYTES_MAX, QUOTA, TENANT = 8, 1000, 5, 6


def make(
    label: int,
    tenant: TenantId = A,
    *,
    text: str = "",
    key: bytes = b"",
    size: int = 10,
    expires_at: float = 100.0,
    tokens: int = 0,
) -> Document:
    return Document(
        label=label, shelf=Shelf(Partition(Scope(tenant, "m"), "faq"), b"c"), asked_category="faq",
        exact_key=key, text=text, answer="x", token_ids=array("I"), reason=FinishReason.STOP, prompt_tokens=0,
        completion_tokens=tokens, stored_at=float(label), expires_at=expires_at, size_bytes=size,
    )  # fmt: skip


def vector(seed: int) -> np.ndarray:
    value = np.random.default_rng(seed).standard_normal(4)
    return (value / np.linalg.norm(value)).astype(np.float32)


def held(store: Store, tenant: TenantId = A) -> list[int]:
    return sorted(entry.label for entry in store.matching(tenant))


class StoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.store = Store(entries_max=ENTRIES_MAX, size_bytes_max=BYTES_MAX, tail_max=2, tenant=Quota(entries=TENANT))
        self.label = 0
        self.now = 0.0

    @rule(
        tenant=TENANTS, key=st.integers(0, 4), size=st.integers(1, BYTES_MAX), ttl=st.integers(1, 9), like=st.booleans()
    )
    def add(self, tenant: TenantId, key: int, size: int, ttl: int, like: bool) -> None:
        document = make(self.label, tenant, key=bytes([key]), size=size, expires_at=self.now + ttl)
        before = len(self.store)
        gone = self.store.add(document, vector(self.label % 7) if like else None, quota_entries=QUOTA)
        self.label += 1
        assert self.store.get(tenant, document.id) is not None
        assert len(self.store) == before + 1 - len(gone)
        assert len(held(self.store, tenant)) <= QUOTA

    @rule(label=st.integers(0, 40))
    def use(self, label: int) -> None:
        self.store.touch(label, self.now)

    @rule(label=st.integers(0, 40))
    def remove(self, label: int) -> None:
        was = label in self.store
        assert self.store.remove(label) == was
        assert not self.store.remove(label)

    @rule()
    def build(self) -> None:
        while (due := self.store.take_crowded()) is not None:
            shelf, index = due
            rebuild = index.rebuild()
            self.store.adopt(shelf, index, rebuild, rebuild.build())

    @rule(seconds=st.integers(0, 5))
    def wait(self, seconds: int) -> None:
        self.now += seconds
        self.store.sweep(self.now)
        assert all(entry.expires_at > self.now for tenant in (A, B) for entry in self.store.matching(tenant))

    @invariant()
    def consistent(self) -> None:
        self.store.check()


StoreMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestStore = StoreMachine.TestCase


def test_the_longest_unused_goes_first() -> None:
    store = Store(entries_max=100, size_bytes_max=10_000, tail_max=10)
    for label in range(3):
        store.add(make(label, key=bytes([label])), None, quota_entries=3)
    store.touch(0, 10.0)
    assert store.add(make(3, key=b"n"), None, quota_entries=3) == (1,)
    assert held(store) == [0, 2, 3]


def test_what_was_dear_to_compute_outlives_what_was_cheap_but_not_for_ever() -> None:
    store = Store(entries_max=100, size_bytes_max=100_000, tail_max=10)
    store.add(make(0, tokens=20), None, quota_entries=3)
    for label in range(1, 100):
        store.add(make(label, tokens=1), None, quota_entries=3)
        if label == 10:
            assert 0 in store
    assert 0 not in store


def test_a_greedy_tenant_evicts_only_itself() -> None:
    store = Store(entries_max=10, size_bytes_max=10_000, tail_max=10)
    for label in range(3):
        store.add(make(label, A, key=bytes([label])), None, quota_entries=1000)
    for label in range(3, 200):
        store.add(make(label, B, key=str(label).encode()), None, quota_entries=1000)
    assert (len(held(store, A)), len(held(store, B))) == (3, 7)


def test_a_quota_in_bytes_counts_bytes() -> None:
    store = Store(entries_max=100, size_bytes_max=10_000, tail_max=10)
    for label in range(6):
        store.add(make(label, size=100), None, quota_entries=50, quota_bytes=350)
    assert held(store) == [3, 4, 5]


def test_equal_vectors_are_indexed_once_and_an_exact_key_outlives_its_vector() -> None:
    store = Store(entries_max=10, size_bytes_max=10_000, tail_max=10)
    store.add(make(1), vector(1), quota_entries=9)
    assert store.add(make(2, key=b"k"), vector(1), quota_entries=9) == (1,)
    assert store.add(make(3, key=b"n"), vector(1), quota_entries=9) == ()
    store.check()
    assert held(store) == [2, 3]
    ((_, index),) = store.indexes()
    assert list(index.labels()) == [3]
