"""Turns the rows of a step into the arrays of one ragged forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .plan import Row
from .pool import KvPool

Ints = NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows that run through the same layers. Row r has the tokens `first[r] .. first[r + 1]`, the first of which stands
    at position `start[r]`; its block table is `tables[table_first[r] .. table_first[r + 1]]`.
    """

    rows: tuple[Row, ...]
    tokens: NDArray[np.int64]
    positions: NDArray[np.float32]
    row_of: Ints
    first: Ints
    start: Ints
    table_first: Ints
    tables: Ints

    def span(self, index: int) -> slice:
        """The tokens of a row."""
        return slice(int(self.first[index]), int(self.first[index + 1]))

    def table(self, index: int) -> Ints:
        """The blocks of a row."""
        return self.tables[self.table_first[index] : self.table_first[index + 1]]


def row_error(row: Row, *, pool: KvPool, context_limit: int, vocab_size: int) -> str | None:
    """What makes a row impossible to run, or None."""
    end, covered = row.start + len(row.tokens), row.base + len(row.blocks) * pool.geometry.block_size
    if not row.tokens or row.start < row.base:
        return "a row needs at least one token and a start of 0 or more"
    if end > context_limit:
        return f"position {end} is over the context limit of {context_limit}"
    if end > covered:
        return f"the block table covers {covered} positions, {end} are needed"
    if min(row.blocks) < 0 or max(row.blocks) >= pool.n_blocks:
        return "the block table names a block outside the pool"
    if min(row.tokens) < 0 or max(row.tokens) >= vocab_size:
        return "a token id is outside the vocabulary"
    if not 0 <= row.draft < len(row.tokens) or (row.draft and row.sample is None):
        return "a draft needs a token before it and a sample after it"
    return None


def fresh_block(row: Row, block_size: int) -> int | None:
    """The block that this row begins and leaves unfinished: its unused slots must hold nothing of a former owner."""
    start, end = row.start - row.base, row.start - row.base + len(row.tokens)
    last = (end - 1) // block_size
    return row.blocks[last] if end % block_size and last * block_size >= start else None


def build_batch(rows: Sequence[Row], block_size: int) -> Batch:
    """Lay the rows, which have been checked, one behind the other."""
    counts = np.array([len(r.tokens) for r in rows], dtype=np.int32)
    ends = np.array([r.start for r in rows], dtype=np.int32) + counts
    first = _offsets(counts)
    row_of = np.repeat(np.arange(len(rows), dtype=np.int32), counts)
    n_blocks = -(-(ends - np.array([r.base for r in rows], dtype=np.int32)) // block_size)
    start = ends - counts
    return Batch(
        rows=tuple(rows),
        tokens=np.concatenate([np.asarray(r.tokens, dtype=np.int64) for r in rows]),
        positions=(np.arange(first[-1]) - first[row_of] + start[row_of]).astype(np.float32),
        row_of=row_of,
        first=first,
        start=start,
        table_first=_offsets(n_blocks),
        tables=np.concatenate([np.asarray(r.blocks[:n], dtype=np.int32) for r, n in zip(rows, n_blocks, strict=True)]),
    )


def _offsets(counts: Ints) -> Ints:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
