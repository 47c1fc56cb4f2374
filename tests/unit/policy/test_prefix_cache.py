"""What the cache keeps and drops first, what it hands out to look at, and what goes with a bad block."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey.policy.blocks import BlockPool
from covey.policy.prefix_cache import CacheKey
from covey.policy.reuse_value import ReuseValue
from covey.types.ids import BlockHash, NamespaceId


def keys(*path: int) -> list[CacheKey]:
    return [(NamespaceId(b"n"), BlockHash(bytes(path[: i + 1]))) for i in range(len(path))]


def use(pool: BlockPool, *path: int) -> list[int]:
    """Run a sequence of these blocks to its end."""
    names = keys(*path)
    blocks = list(pool.match(names))
    missing = len(path) - len(blocks)
    pool.reserve(missing)
    blocks += pool.take(missing, after=blocks[-1] if blocks else None)
    for index, name in enumerate(names):
        blocks[index] = pool.name(blocks[index], name, names[index - 1] if index else None)
    pool.release(blocks)
    return blocks


def squeeze(pool: BlockPool, count: int) -> None:
    """Make the pool evict until `count` blocks are free."""
    pool.reserve(count)
    pool.release(pool.take(count))


@given(
    heat=st.floats(1, 50),
    other_heat=st.floats(1, 50),
    used=st.integers(0, 500),
    other_used=st.integers(0, 500),
    later=st.integers(0, 500),
)
def test_the_order_of_two_blocks_is_that_of_their_faded_uses_at_any_time(
    heat: float, other_heat: float, used: int, other_used: int, later: int
) -> None:
    value = ReuseValue(half_life=64, depth_scale=128)
    now = max(used, other_used) + later
    faded = heat * 2 ** (-(now - used) / 64)
    other_faded = other_heat * 2 ** (-(now - other_used) / 64)
    if faded > other_faded * (1 + 1e-9):
        assert value.worth(heat=heat, used=used, depth=3) > value.worth(heat=other_heat, used=other_used, depth=3)


def test_what_is_hit_often_outlives_what_is_only_younger() -> None:
    pool = BlockPool(n_blocks=6)
    for _ in range(5):
        use(pool, 1, 2)
    use(pool, 3, 4)
    use(pool, 5, 6)
    squeeze(pool, 4)
    assert pool.keys() == tuple(keys(1, 2))


def test_hits_fade() -> None:
    pool = BlockPool(n_blocks=4, value=ReuseValue(half_life=4))
    for _ in range(5):
        use(pool, 1, 2)
    for _ in range(30):
        use(pool, 3)
    use(pool, 4)
    squeeze(pool, 2)
    assert set(pool.keys()) == {*keys(3), *keys(4)}


def test_of_equals_the_deeper_block_is_dearer() -> None:
    pool = BlockPool(n_blocks=11, value=ReuseValue(half_life=1e9, depth_scale=8))
    use(pool, *range(10))
    use(pool, 77)
    squeeze(pool, 1)
    assert pool.keys() == tuple(keys(*range(10)))


def test_asking_without_using_changes_no_order() -> None:
    pool = BlockPool(n_blocks=2)
    use(pool, 1)
    use(pool, 2)
    for _ in range(50):
        pool.unmatch(pool.match(keys(1)))
    pool.check()
    squeeze(pool, 1)
    assert pool.keys() == tuple(keys(2))


def test_idle_checks_go_round_over_what_nobody_holds() -> None:
    pool = BlockPool(n_blocks=12)
    assert pool.next_idle_check() is None
    idle = {*use(pool, 1, 2, 3), *use(pool, 4)}
    held = pool.match(keys(4))
    seen = [pool.next_idle_check() for _ in range(6)]
    assert set(seen[:3]) == set(seen[3:]) == idle - set(held)
    pool.release(held)
    assert {pool.next_idle_check() for _ in range(4)} == idle


def test_a_bad_block_goes_with_all_that_grows_from_it_and_nothing_else() -> None:
    pool = BlockPool(n_blocks=12)
    trunk = use(pool, 1, 2, 3)
    use(pool, 1, 2, 4, 5)
    use(pool, 1, 6)
    pool.take_changes()
    gone = pool.discard(trunk[1])
    assert set(gone) == {*keys(1, 2, 3)[1:], *keys(1, 2, 4, 5)[2:]}
    assert set(pool.take_changes().evicted) == set(gone)
    assert set(pool.keys()) == set(keys(1, 6))
    assert (pool.free, pool.cached) == (10, 2)
    pool.check()
    squeeze(pool, 12)
    assert pool.keys() == ()
    pool.check()


def test_only_what_nobody_holds_is_discarded() -> None:
    pool = BlockPool(n_blocks=4)
    blocks = use(pool, 1, 2)
    pool.match(keys(1))
    with pytest.raises(AssertionError, match="nobody holds"):
        pool.discard(blocks[0])
