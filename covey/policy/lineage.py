"""Which block grows from which: lists of children, kept in the columns."""

from __future__ import annotations

from collections.abc import Iterator

from covey.policy.block_columns import LOST, NONE, BlockColumns


class Lineage:
    """Parents and children. A row whose parent is `LOST` hangs from nothing."""

    def __init__(self, columns: BlockColumns) -> None:
        self._columns = columns

    def link(self, row: int, parent: int) -> None:
        """Let a fresh row grow from `parent`, or be the first of a chain (`NONE`)."""
        columns = self._columns
        columns.at_parent[row] = parent
        if parent == NONE:
            return
        columns.at_depth[row] = columns.at_depth[parent] + 1
        self._push(row, parent)

    def unlink(self, row: int) -> int:
        """Cut a row off its parent and return that, or `NONE`; the row's own children stay as they are."""
        columns = self._columns
        parent = columns.at_parent[row]
        if parent < 0:
            return NONE
        before, after = columns.at_prev_sibling[row], columns.at_next_sibling[row]
        if before == NONE:
            columns.at_first_child[parent] = after
        else:
            columns.at_next_sibling[before] = after
        if after != NONE:
            columns.at_prev_sibling[after] = before
        columns.at_prev_sibling[row] = columns.at_next_sibling[row] = NONE
        columns.at_parent[row] = NONE
        return parent

    def lose(self, row: int) -> None:
        """Cut a row off a parent that went."""
        self.unlink(row)
        self._columns.at_parent[row] = LOST

    def children(self, row: int) -> Iterator[int]:
        """Yield the rows that grow from a row; the one yielded may be cut off meanwhile."""
        child = self._columns.at_first_child[row]
        while child != NONE:
            after = self._columns.at_next_sibling[child]
            yield child
            child = after

    def take_place(self, old: int, new: int) -> None:
        """Put a row where another is: under its parent, over its children."""
        columns = self._columns
        columns.at_depth[new] = columns.at_depth[old]
        children = list(self.children(old))
        parent = self.unlink(old)
        columns.at_parent[new] = parent
        if parent != NONE:
            self._push(new, parent)
        columns.at_first_child[new], columns.at_first_child[old] = columns.at_first_child[old], NONE
        for child in children:
            columns.at_parent[child] = new

    def _push(self, row: int, parent: int) -> None:
        columns = self._columns
        first = columns.at_first_child[parent]
        columns.at_next_sibling[row] = first
        if first != NONE:
            columns.at_prev_sibling[first] = row
        columns.at_first_child[parent] = row
