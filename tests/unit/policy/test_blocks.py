"""The block pool as a state machine, and the rules that machine cannot see."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from covey.errors import NoSpace
from covey.policy.blocks import BlockPool
from covey.policy.prefix_cache import CacheKey
from covey.types.ids import BlockHash, NamespaceId

NAMESPACE = NamespaceId(b"n")


def key(*path: int) -> CacheKey:
    return NAMESPACE, BlockHash(bytes(path))


def keys(*path: int) -> list[CacheKey]:
    return [key(*path[: i + 1]) for i in range(len(path))]


def fill(pool: BlockPool, *path: int) -> list[int]:
    """Hold a named chain of blocks, as a sequence that computed it does."""
    blocks = list(pool.match(keys(*path)))
    pool.reserve(len(path) - len(blocks))
    blocks += pool.take(len(path) - len(blocks))
    for index, name in enumerate(keys(*path)):
        blocks[index] = pool.name(blocks[index], name, keys(*path)[index - 1] if index else None)
    return blocks


def test_released_prefixes_are_hit_and_shared() -> None:
    pool = BlockPool(n_blocks=8)
    first = fill(pool, 1, 2, 3)
    assert fill(pool, 1, 2, 4)[:2] == first[:2]
    pool.release(first)
    assert pool.match(keys(1, 2, 3)) == tuple(first)
    assert pool.match(keys(9)) == ()
    pool.check()


def test_two_that_compute_the_same_block_end_with_one() -> None:
    pool = BlockPool(n_blocks=4)
    pool.reserve(2)
    (one, two) = pool.take(2)
    assert pool.name(one, key(1), None) == one
    assert pool.name(two, key(1), None) == one
    assert pool.free == 3
    pool.release((one, one))
    pool.check()


def test_eviction_takes_the_oldest_leaf_first() -> None:
    pool = BlockPool(n_blocks=5)
    old, young = fill(pool, 1, 2), fill(pool, 3, 4)
    pool.release(old)
    pool.release(young)
    pool.reserve(3)
    pool.take(3)
    assert pool.keys() == tuple(keys(3, 4))
    pool.reserve(1)
    pool.take(1)
    assert pool.keys() == (key(3),)
    pool.check()


def test_reservations_are_kept_and_not_exceeded() -> None:
    pool = BlockPool(n_blocks=4)
    held = fill(pool, 1, 2)
    pool.reserve(2)
    with pytest.raises(NoSpace):
        pool.reserve(1)
    pool.release(held)
    pool.reserve(2)
    assert len(pool.take(4)) == 4
    assert pool.keys() == ()
    pool.check()


def test_pins_outlive_their_holder_until_unpinned() -> None:
    pool = BlockPool(n_blocks=4)
    held = fill(pool, 1, 2, 3)
    pin = pool.pin(held, expires_at=5.0)
    pool.release(held)
    assert pool.available == 1
    assert pool.due_pins(4.9) == ()
    assert pool.due_pins(5.0) == (pin,)
    longer = pool.repin(pin.id, keep=2, expires_at=9.0)
    assert longer is not None
    assert (pool.pinned, pool.available, pool.next_pin_expiry()) == (2, 2, 9.0)
    pool.unpin(pin.id)
    pool.unpin(pin.id)
    assert (pool.pinned, pool.available) == (0, 4)
    assert pool.repin(pin.id, keep=1, expires_at=10.0) is None
    pool.check()


def test_changes_that_cancel_out_are_not_reported() -> None:
    pool = BlockPool(n_blocks=1)
    pool.release(fill(pool, 1))
    assert pool.take_changes().stored == (key(1),)
    pool.release(fill(pool, 2))
    pool.release(fill(pool, 3))
    changes = pool.take_changes()
    assert (changes.stored, changes.evicted) == ((key(3),), (key(1),))


class PoolMachine(RuleBasedStateMachine):
    """Sequences come, grow, pin and go in any order; a mirror of the prefix cache is fed by changes alone."""

    @initialize(n=st.integers(1, 12))
    def make(self, n: int) -> None:
        self.pool = BlockPool(n_blocks=n)
        self.sequences: list[list[int]] = []
        self.promised = 0
        self.pins: list[str] = []
        self.mirror: set[CacheKey] = set()
        self.now = 0.0

    @rule(path=st.lists(st.integers(0, 2), min_size=1, max_size=5))
    def run(self, path: list[int]) -> None:
        names = keys(*path)
        matched = list(self.pool.match(names))
        assert [self.pool.key_of(block) for block in matched] == names[: len(matched)]
        available = self.pool.available
        missing = len(path) - len(matched)
        try:
            self.pool.reserve(missing)
        except NoSpace:
            assert missing > available
            self.pool.release(matched)
            return
        blocks = matched + list(self.pool.take(missing))
        assert len(set(blocks)) == len(blocks)
        for index, name in enumerate(names):
            blocks[index] = self.pool.name(blocks[index], name, names[index - 1] if index else None)
        self.sequences.append(blocks)

    @rule(count=st.integers(1, 4))
    def promise(self, count: int) -> None:
        if count <= self.pool.available:
            self.pool.reserve(count)
            self.promised += count

    @precondition(lambda self: self.promised)
    @rule()
    def take_unnamed(self) -> None:
        self.sequences.append(list(self.pool.take(1)))
        self.promised -= 1

    @precondition(lambda self: self.promised)
    @rule()
    def give_back(self) -> None:
        self.pool.unreserve(1)
        self.promised -= 1

    @precondition(lambda self: self.sequences)
    @rule(index=st.integers(0, 100))
    def end(self, index: int) -> None:
        self.pool.release(self.sequences.pop(index % len(self.sequences)))

    @rule(path=st.lists(st.integers(0, 2), min_size=1, max_size=5))
    def ask(self, path: list[int]) -> None:
        self.pool.unmatch(self.pool.match(keys(*path)))

    @rule()
    def find_a_bad_one(self) -> None:
        block = self.pool.next_idle_check()
        assert (block is None) == (self.pool.cached == 0)
        if block is not None:
            name, cached = self.pool.key_of(block), self.pool.cached
            gone = self.pool.discard(block)
            assert gone[0] == name
            assert not set(gone) & set(self.pool.keys())
            assert self.pool.cached == cached - len(gone)

    @precondition(lambda self: self.sequences)
    @rule(index=st.integers(0, 100), count=st.integers(1, 3), room=st.integers(0, 9))
    def grow(self, index: int, count: int, room: int) -> None:
        blocks = self.sequences[index % len(self.sequences)]
        if count <= self.pool.available:
            self.pool.reserve(count)
            blocks += self.pool.take(count, after=blocks[-1], room=room)

    @precondition(lambda self: self.sequences)
    @rule(index=st.integers(0, 100), ttl=st.floats(0, 5))
    def pin(self, index: int, ttl: float) -> None:
        blocks = self.sequences[index % len(self.sequences)]
        self.pool.pin(blocks, expires_at=self.now + ttl)

    @rule(seconds=st.floats(0, 5))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        for pin in self.pool.due_pins(self.now):
            assert pin.expires_at <= self.now
            self.pool.unpin(pin.id)

    @invariant()
    def holds(self) -> None:
        self.pool.check()
        assert self.pool.reserved == self.promised
        changes = self.pool.take_changes()
        assert not self.mirror & set(changes.stored)
        assert self.mirror >= set(changes.evicted)
        self.mirror = (self.mirror | set(changes.stored)) - set(changes.evicted)
        assert self.mirror == set(self.pool.keys())

    def teardown(self) -> None:
        for blocks in self.sequences:
            self.pool.release(blocks)
        for pin in self.pool.due_pins(float("inf")):
            self.pool.unpin(pin.id)
        self.pool.unreserve(self.promised)
        assert self.pool.available == self.pool.capacity
        self.pool.check()


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase
