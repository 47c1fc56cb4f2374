"""Turns the rows of a step into the index tensors of the kernels, in one copy to the device."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from covey.model.plan import Row, RunnerInfo

from .kernels.decode_attention import SPLIT_TOKENS
from .kernels.prefill_attention import TILE_QUERIES, Chunks

_Ids = NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuBatch:
    """Rows in order, first those of one token. All index tensors are int32 on the device.

    `tables` and `contexts` are those of the first `n_singles` rows; `n_splits` stretches cover the longest of their
    contexts. `firsts` is where each row's tokens begin, and where the last one's end.
    """

    rows: tuple[Row, ...]
    firsts: tuple[int, ...]
    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    n_singles: int
    tables: torch.Tensor
    contexts: torch.Tensor
    n_splits: int
    chunks: Chunks | None


def row_error(row: Row, info: RunnerInfo) -> str | None:
    """What makes a row impossible to run, or None."""
    end, covered = row.start + len(row.tokens), len(row.blocks) * info.block_size
    last_layer = info.n_layers if row.last_layer is None else row.last_layer
    if not row.tokens or row.start < 0:
        return "a row needs at least one token and a start of 0 or more"
    if end > info.context_limit:
        return f"position {end} is over the context limit of {info.context_limit}"
    if end > covered:
        return f"the block table covers {covered} positions, {end} are needed"
    if min(row.blocks) < 0 or max(row.blocks) >= info.n_blocks:
        return "the block table names a block outside the pool"
    if min(row.tokens) < 0 or max(row.tokens) >= info.vocab_size:
        return "a token id is outside the vocabulary"
    if not 0 <= row.first_layer < last_layer <= info.n_layers:
        return f"layers {row.first_layer} to {last_layer} are not a range of {info.n_layers} layers"
    if row.draft and (row.sample is None or row.first_layer or last_layer < info.n_layers):
        return "only a row that draws and runs through all layers has a draft"
    if not 0 <= row.draft < len(row.tokens):
        return f"a row of {len(row.tokens)} tokens cannot have a draft of {row.draft}"
    return None


def build_batch(rows: Sequence[Row], block_size: int, device: torch.device) -> GpuBatch:
    """Index the pool for rows that have been checked."""
    singles = [row for row in rows if len(row.tokens) == 1]
    longer = [row for row in rows if len(row.tokens) > 1]
    ordered = (*singles, *longer)
    contexts = np.array([row.start + 1 for row in singles], dtype=np.int32)
    positions = [np.arange(row.start, row.start + len(row.tokens), dtype=np.int32) for row in ordered]
    firsts = np.cumsum([0, *(len(row.tokens) for row in ordered)])
    arrays = [
        np.concatenate([np.asarray(row.tokens, dtype=np.int32) for row in ordered]),
        np.concatenate(positions),
        np.concatenate([_slots(row, at, block_size) for row, at in zip(ordered, positions, strict=True)]),
        _tables(singles, block_size),
        contexts,
        firsts[len(singles) : -1].astype(np.int32),
        np.array([len(row.tokens) for row in longer], dtype=np.int32),
        np.array([row.start for row in longer], dtype=np.int32),
        _tables(longer, block_size),
        _tiles(longer),
    ]
    tokens, places, slots, tables, ends, chunk_firsts, lengths, starts, chunk_tables, tiles = upload(arrays, device)
    chunks = Chunks(firsts=chunk_firsts, lengths=lengths, starts=starts, tables=chunk_tables, tiles=tiles)
    return GpuBatch(
        rows=ordered,
        firsts=tuple(firsts.tolist()),
        tokens=tokens,
        positions=places,
        slots=slots,
        n_singles=len(singles),
        tables=tables,
        contexts=ends,
        n_splits=splits_of(int(contexts.max(initial=0))),
        chunks=chunks if longer else None,
    )


def splits_of(context: int) -> int:
    """Stretches of decode attention that cover a context; at least one."""
    return max(1, -(-context // SPLIT_TOKENS))


def written_blocks(row: Row, block_size: int) -> tuple[int, ...]:
    """The blocks that a row's new tokens lie in."""
    return row.blocks[row.start // block_size : (row.start + len(row.tokens) - 1) // block_size + 1]


def fresh_block(row: Row, block_size: int) -> int | None:
    """The block that this row begins and leaves unfinished: it is cleared, so that nothing outlives its owner in it."""
    end = row.start + len(row.tokens)
    last = (end - 1) // block_size
    return row.blocks[last] if end % block_size and last * block_size >= row.start else None


def upload(arrays: Sequence[_Ids], device: torch.device) -> list[torch.Tensor]:
    """Copies of int32 arrays on the device, in one transfer."""
    flat = torch.from_numpy(np.concatenate([array.reshape(-1) for array in arrays]))
    if device.type == "cuda":
        flat = flat.pin_memory().to(device, non_blocking=True)
    ends = itertools.accumulate(array.size for array in arrays)
    return [flat[end - array.size : end].view(array.shape) for end, array in zip(ends, arrays, strict=True)]


def _slots(row: Row, positions: _Ids, block_size: int) -> _Ids:
    blocks = np.asarray(row.blocks, dtype=np.int32)
    slots: _Ids = blocks[positions // block_size] * block_size + positions % block_size
    return slots


def _tables(rows: Sequence[Row], block_size: int) -> _Ids:
    counts = [-(-(row.start + len(row.tokens)) // block_size) for row in rows]
    tables = np.zeros((len(rows), max(counts, default=0)), dtype=np.int32)
    for table, row, count in zip(tables, rows, counts, strict=True):
        table[:count] = row.blocks[:count]
    return tables


def _tiles(rows: Sequence[Row]) -> _Ids:
    tiles = [(i, first) for i, row in enumerate(rows) for first in range(0, len(row.tokens), TILE_QUERIES)]
    return np.array(tiles, dtype=np.int32).reshape(-1, 2)


def drawing_places(batch: GpuBatch) -> _Ids:
    """The tokens of a batch after which one is drawn: for each row that draws the last `draft + 1`."""
    ends = batch.firsts[1:]
    places = [
        np.arange(end - row.draft - 1, end, dtype=np.int32)
        for row, end in zip(batch.rows, ends, strict=True)
        if row.sample is not None
    ]
    return np.concatenate(places) if places else np.zeros(0, dtype=np.int32)
