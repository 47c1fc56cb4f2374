"""Slots of several sizes: no overlap, bounded waste, extents that change their size."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from covey.policy.arena import PAGE_BYTES, Arena

SIZES = [PAGE_BYTES, 3 * PAGE_BYTES, 5 * PAGE_BYTES, 40 * PAGE_BYTES]


@given(st.lists(st.tuples(st.sampled_from(SIZES), st.booleans(), st.integers(0, 1000)), max_size=200))
def test_slots_never_overlap_and_all_bytes_come_back(steps: list[tuple[int, bool, int]]) -> None:
    arena = Arena(64 * 16 * PAGE_BYTES, extent_bytes=16 * PAGE_BYTES)
    held: list[int] = []
    for size, give_back, pick in steps:
        if give_back and held:
            arena.free(held.pop(pick % len(held)))
        elif (offset := arena.allocate(size)) is not None:
            held.append(offset)
        arena.check()
    for offset in held:
        arena.free(offset)
    arena.check()
    assert arena.used_bytes == 0
    assert arena.allocate(arena.capacity_bytes) is not None, "an empty arena is whole again"


def test_a_size_takes_over_extents_that_another_has_emptied() -> None:
    arena = Arena(4 * 16 * PAGE_BYTES, extent_bytes=16 * PAGE_BYTES)
    small = [arena.allocate(PAGE_BYTES) for _ in range(64)]
    assert arena.allocate(5 * PAGE_BYTES) is None
    for offset in small[:16]:
        assert offset is not None
        arena.free(offset)
    assert [arena.allocate(5 * PAGE_BYTES) is not None for _ in range(4)] == [True, True, True, False]


def test_a_retired_slot_is_never_given_out_again() -> None:
    arena = Arena(16 * PAGE_BYTES, extent_bytes=16 * PAGE_BYTES)
    bad = arena.allocate(PAGE_BYTES)
    assert bad is not None
    arena.retire(bad)
    rest = [arena.allocate(PAGE_BYTES) for _ in range(16)]
    assert rest[-1] is None
    assert bad not in rest


def test_default_extents_waste_little_on_the_default_model() -> None:
    arena = Arena(1 << 30)
    slot = 385 * PAGE_BYTES  # 1.5 MiB and a header
    count = 0
    while arena.allocate(slot) is not None:
        count += 1
    assert count * slot >= 0.9 * (1 << 30)


def test_sizes_that_are_not_pages_are_refused() -> None:
    with pytest.raises(ValueError, match="pages"):
        Arena(1 << 20).allocate(100)
