"""The table and the pools under the index, where keys collide and many are candidates."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from covey.policy.block_columns import NONE, BlockColumns
from covey.policy.block_table import BlockTable
from covey.policy.evictable import SAMPLE, Pool

CAPACITY = 64
KEYS = [(low, high) for low in (0, 1, 7 << 60) for high in range(24)]
"""Three values of the word that is hashed: nearly all keys collide."""


def enter(columns: BlockColumns, table: BlockTable, space: int, key: tuple[int, int]) -> int:
    row = columns.take()
    assert row != NONE
    columns.at_space[row] = space
    columns.at_low[row], columns.at_high[row] = key
    columns.at_state[row] = 1
    table.insert(row)
    return row


@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, len(KEYS) - 1), st.booleans()), max_size=200),
    st.integers(1, len(KEYS)),
)
def test_colliding_keys_are_found_one_by_one_and_all_at_once(steps: list[tuple[int, int, bool]], asked: int) -> None:
    columns = BlockColumns(CAPACITY)
    table = BlockTable(columns)
    model: dict[tuple[int, tuple[int, int]], int] = {}
    for space, which, goes in steps:
        key = (space, KEYS[which])
        if key in model and goes:
            row = model.pop(key)
            table.remove(row)
            columns.give_back(row)
        elif key not in model and len(model) < CAPACITY:
            model[key] = enter(columns, table, *key)
    wanted = np.array(KEYS[:asked], np.uint64)
    for space in (0, 1):
        expected = [model.get((space, key), NONE) for key in KEYS[:asked]]
        assert table.find(space, wanted).tolist() == expected
        assert [table.find_one(space, *key) for key in KEYS[:asked]] == expected
    table.check(np.array(list(model.values()), np.int32))


def test_rows_that_were_used_come_back_empty_and_bounded() -> None:
    columns = BlockColumns(3)
    rows = [columns.take() for _ in range(3)]
    assert columns.take() == NONE
    columns.at_held[rows[1]], columns.at_digest[rows[1]], columns.at_parent[rows[1]] = 5, 9, 0
    columns.give_back(rows[1])
    assert columns.used == 2
    again = columns.take()
    assert (columns.at_held[again], columns.at_digest[again], columns.at_parent[again]) == (0, 0, NONE)


@given(st.lists(st.integers(0, 99), unique=True, min_size=1), st.integers(1, 10))
def test_of_few_candidates_the_worst_go(rows: list[int], count: int) -> None:
    columns = BlockColumns(100)
    pool = Pool(columns.at_place)
    for row in rows:
        pool.add(row)
    worth = np.array([(row * 37) % 100 for row in range(100)], float)
    assert pool.worst(count, lambda some: worth[some]) == sorted(rows, key=lambda row: worth[row])[:count]
    for row in rows[::2]:
        pool.remove(row)
    assert sorted(pool.rows().tolist()) == sorted(rows[1::2])


def test_of_many_candidates_those_that_go_are_among_the_worst_percent() -> None:
    count = 50 * SAMPLE
    columns = BlockColumns(count)
    pool = Pool(columns.at_place)
    for row in np.random.default_rng(1).permutation(count).tolist():
        pool.add(row)
    gone: list[int] = []
    for _ in range(100):
        worst = pool.worst(8, lambda some: some.astype(float))
        gone += worst
        for row in worst:
            pool.remove(row)
    assert len(set(gone)) == 800
    assert np.quantile(gone, 0.95) < count * 0.03
