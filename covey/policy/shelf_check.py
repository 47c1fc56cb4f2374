"""The invariants of a shelf, which hold between any two calls."""

from __future__ import annotations

import numpy as np

from covey.policy.arena import PAGE_BYTES
from covey.policy.block_columns import BlockState, Rows
from covey.policy.shelf import Shelf


def check_shelf(shelf: Shelf) -> None:
    """Assert that tables, pools, lists and counts all say what the columns say. Walks everything: for tests."""
    columns = shelf.columns
    listed = columns.live(BlockState.RESERVED, BlockState.COMMITTED)
    every = np.concatenate((listed, columns.live(BlockState.DOOMED, BlockState.DRAFT)))
    assert len(every) == columns.used
    assert len(np.unique(columns.page[every])) == len(every), "two blocks share a slot"
    shelf.arena.check()
    shelf.table.check(listed)
    shelf.evictable.check(np.array([row for row in listed.tolist() if shelf.is_evictable(row)], np.int32))
    _check_counts(shelf, listed, every)
    _check_lineage(shelf, listed)
    numbers, counts = np.unique(columns.space[every], return_counts=True)
    assert {space.number: space.rows for space in shelf.spaces} == dict(zip(numbers, counts, strict=True))
    used: dict[int, int] = {}
    for row in every.tolist():
        tenant = columns.at_tenant[row]
        used[tenant] = used.get(tenant, 0) + columns.slot_bytes(row)
    shelf.tenants.check(used)


def _check_counts(shelf: Shelf, listed: Rows, every: Rows) -> None:
    columns, counts = shelf.columns, shelf.counts
    reserved, private = columns.state[listed] == BlockState.RESERVED, columns.private[listed] == 1
    assert (counts.blocks, counts.reserved, counts.private) == (len(listed), reserved.sum(), private.sum())
    assert (columns.held[listed[private & ~reserved]] > 0).all(), "a private block outlived its leases"
    assert (columns.held[columns.live(BlockState.DOOMED)] > 0).all(), "a block was not freed with its last lease"
    assert counts.held == np.count_nonzero(columns.held[every])
    assert ((columns.pins[every] >= 0) & (columns.pins[every] <= columns.held[every])).all()
    pinned = every[columns.pins[every] > 0]
    assert (counts.pinned, counts.pinned_bytes) == (len(pinned), columns.pages[pinned].sum() * PAGE_BYTES)


def _check_lineage(shelf: Shelf, listed: Rows) -> None:
    columns = shelf.columns
    children = 0
    for row in listed.tolist():
        parent = columns.at_parent[row]
        if parent >= 0:
            assert columns.at_depth[row] == columns.at_depth[parent] + 1
            assert columns.at_state[parent] in {BlockState.RESERVED, BlockState.COMMITTED}
            if columns.at_state[row] == BlockState.COMMITTED:
                assert columns.at_state[parent] == BlockState.COMMITTED, "visible without its parent"
        for child in shelf.lineage.children(row):
            assert columns.at_parent[child] == row
            children += 1
    assert children == np.count_nonzero(columns.parent[listed] >= 0)
