"""Turns the rows of a step into the index tensors of one ragged forward pass."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from .plan import Row, SampleSpec
from .pool import Geometry, KvPool

_Ids = NDArray[np.int64]

QUERY_TILE = 256
"""Queries of a chunk with a cached prefix that attend together; the work above the diagonal is at most half a
tile's.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeGroup:
    """Single-token rows `first .. first + n_rows` of similar context, padded to `n_blocks` blocks.

    `pages` indexes the pool in the order [K then V, row, kv head, block], for layer 0. `mask` is added to the scores.
    """

    first: int
    n_rows: int
    n_blocks: int
    pages: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """Queries `first .. last` of a chunk, relative to its start, over the first `context` positions."""

    first: int
    last: int
    context: int
    mask: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Rows `first .. first + length` of one sequence. Without a cached prefix `pages` is None and `tiles` empty."""

    first: int
    length: int
    n_blocks: int
    pages: torch.Tensor | None
    tiles: tuple[Tile, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One step. `slots` indexes the pool's slots in the order [token, K then V, kv head], for layer 0."""

    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    groups: tuple[DecodeGroup, ...]
    chunks: tuple[Chunk, ...]
    sample_rows: torch.Tensor
    samples: tuple[tuple[int, SampleSpec], ...]
    fresh_blocks: tuple[int, ...]


def row_error(row: Row, *, pool: KvPool, context_limit: int, vocab_size: int) -> str | None:
    """What makes a row impossible to run, or None."""
    end, covered = row.start + len(row.tokens), len(row.blocks) * pool.geometry.block_size
    if not row.tokens or row.start < 0:
        return "a row needs at least one token and a start of 0 or more"
    if end > context_limit:
        return f"position {end} is over the context limit of {context_limit}"
    if end > covered:
        return f"the block table covers {covered} positions, {end} are needed"
    if min(row.blocks) < 0 or max(row.blocks) >= pool.n_blocks:
        return "the block table names a block outside the pool"
    if min(row.tokens) < 0 or max(row.tokens) >= vocab_size:
        return "a token id is outside the vocabulary"
    return None


def build_batch(rows: Sequence[Row], pool: KvPool) -> Batch:
    """Order the rows (single tokens by context, then chunks) and index the pool for them; the rows have been
    checked.
    """
    block_size = pool.geometry.block_size
    singles = sorted((r for r in rows if len(r.tokens) == 1), key=lambda r: r.start)
    ordered = [*singles, *(r for r in rows if len(r.tokens) > 1)]
    firsts = np.cumsum([0, *(len(r.tokens) for r in ordered)])
    samples = [(i, r.seq, r.sample) for i, r in enumerate(ordered) if r.sample is not None]
    positions = np.concatenate([np.arange(r.start, r.start + len(r.tokens)) for r in ordered])
    return Batch(
        tokens=torch.from_numpy(np.concatenate([np.asarray(r.tokens, dtype=np.int64) for r in ordered])),
        positions=torch.from_numpy(positions.astype(np.float32)),
        slots=torch.from_numpy(_slot_index(ordered, positions, pool.geometry)),
        groups=tuple(_groups(singles, pool)),
        chunks=tuple(
            _chunk(r, int(firsts[i]), pool) for i, r in enumerate(ordered[len(singles) :], start=len(singles))
        ),
        sample_rows=torch.tensor([int(firsts[i + 1]) - 1 for i, _, _ in samples], dtype=torch.int64),
        samples=tuple((seq, spec) for _, seq, spec in samples),
        fresh_blocks=tuple(b for r in ordered if (b := _fresh_block(r, block_size)) is not None),
    )


def _fresh_block(row: Row, block_size: int) -> int | None:
    """The block that this row begins and leaves unfinished.

    Its unused slots are cleared, so that neither another tenant's values nor a NaN outlive their owner in a padded
    product.
    """
    end = row.start + len(row.tokens)
    last = (end - 1) // block_size
    return row.blocks[last] if end % block_size and last * block_size >= row.start else None


def _slot_index(rows: Sequence[Row], positions: _Ids, geometry: Geometry) -> _Ids:
    size = geometry.block_size
    blocks = np.concatenate(
        [np.asarray(r.blocks, dtype=np.int64)[np.arange(r.start, r.start + len(r.tokens)) // size] for r in rows]
    )
    first = blocks * (geometry.pages_per_block * size) + positions % size
    index: _Ids = (first[:, None] + np.arange(geometry.pages_per_layer) * size).reshape(-1)
    return index


def _page_index(tables: _Ids, geometry: Geometry) -> torch.Tensor:
    """Pages of layer 0 for block tables [row, block], in the order [K then V, row, kv head, block]."""
    heads = np.arange(geometry.kv_heads)[None, None, :, None]
    kinds = np.arange(2)[:, None, None, None] * geometry.kv_heads
    index = tables[None, :, None, :] * geometry.pages_per_block + kinds + heads
    return torch.from_numpy(index.reshape(-1))


def _groups(singles: Sequence[Row], pool: KvPool) -> list[DecodeGroup]:
    """Cut rows sorted by context wherever the number of blocks passes a power of two: padding at most doubles the
    reads.
    """
    size = pool.geometry.block_size
    counts = [r.start // size + 1 for r in singles]
    cuts = [i for i in range(1, len(counts)) if (counts[i] - 1).bit_length() != (counts[i - 1] - 1).bit_length()]
    edges = [0, *cuts, len(singles)] if singles else []
    groups = []
    for first, last in itertools.pairwise(edges):
        n_blocks = counts[last - 1]
        tables = np.full((last - first, n_blocks), pool.null_block, dtype=np.int64)
        for table, row, count in zip(tables, singles[first:last], counts[first:last], strict=True):
            table[:count] = row.blocks[:count]
        ends = np.array([r.start + 1 for r in singles[first:last]])
        hidden = np.arange(n_blocks * size)[None, :] >= ends[:, None]
        mask = np.where(hidden, np.float32("-inf"), np.float32(0.0))
        groups.append(
            DecodeGroup(
                first=first,
                n_rows=last - first,
                n_blocks=n_blocks,
                pages=_page_index(tables, pool.geometry),
                mask=torch.from_numpy(np.repeat(mask, pool.geometry.kv_heads, axis=0)[:, None, :]),
            )
        )
    return groups


def _chunk(row: Row, first: int, pool: KvPool) -> Chunk:
    length = len(row.tokens)
    if row.start == 0:
        return Chunk(first=first, length=length, n_blocks=0, pages=None, tiles=())
    n_blocks = -(-(row.start + length) // pool.geometry.block_size)
    table = np.asarray(row.blocks[:n_blocks], dtype=np.int64)[None, :]
    tiles = tuple(_tile(row.start, a, min(a + QUERY_TILE, length)) for a in range(0, length, QUERY_TILE))
    return Chunk(first=first, length=length, n_blocks=n_blocks, pages=_page_index(table, pool.geometry), tiles=tiles)


def _tile(start: int, first: int, last: int) -> Tile:
    context = start + last
    mask = torch.zeros(last - first, context)
    future = torch.full((last - first, last - first), float("-inf")).triu_(1)
    mask[:, start + first :] = future
    return Tile(first=first, last=last, context=context, mask=mask)
