"""One pass of a batch through the layers: rows join, stop for later, or are given up between two layers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from .batch import Batch, build_batch
from .config import ModelConfig
from .plan import Interrupt, Row
from .rotary import inverse_frequencies, rotary_phases
from .weights import Weights


class Layers(Protocol):
    """What computes: the native kernels or torch."""

    @property
    def name(self) -> str:
        """Which one it is."""

    def forward(self, hidden: torch.Tensor, phases: torch.Tensor, batch: Batch, first: int, last: int) -> None:
        """Run layers `first` up to, not including, `last` over `hidden` [token, hidden] in place; fills the pool."""

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [row, vocab] of the last layer's `hidden` [row, hidden]; valid until the next call."""


@dataclass(slots=True, kw_only=True)
class Pass:
    """What came out of a pass: the rows at the end with their hidden states, and the others."""

    batch: Batch | None = None
    hidden: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    suspended: list[tuple[int, int]] = field(default_factory=list)
    failed: list[tuple[int, str]] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Waiting:
    """A row between two layers."""

    start: int
    tokens: tuple[int, ...]
    layer: int
    hidden: torch.Tensor


class _Active:
    """The rows that run through the present layer."""

    def __init__(self, hidden_size: int, block_size: int, frequencies: torch.Tensor) -> None:
        self._block_size = block_size
        self._frequencies = frequencies
        self.rows: list[Row] = []
        self.hidden = torch.empty(0, hidden_size)
        self.batch: Batch | None = None
        self.phases = torch.empty(0)

    def join(self, rows: Sequence[Row], hidden: Sequence[torch.Tensor]) -> None:
        self.rows += rows
        self.hidden = torch.cat([self.hidden, *hidden])
        self._rebuild()

    def leave(self, leaves: Callable[[Row], bool]) -> list[tuple[Row, torch.Tensor]]:
        """Take rows out; returns them with copies of their hidden states."""
        assert self.batch is not None
        spans = {row.seq: self.batch.span(i) for i, row in enumerate(self.rows)}
        left = [(row, self.hidden[spans[row.seq]].clone()) for row in self.rows if leaves(row)]
        if left:
            self.rows = [row for row in self.rows if not leaves(row)]
            kept = [self.hidden[spans[row.seq]] for row in self.rows]
            self.hidden = torch.cat(kept) if kept else self.hidden[:0]
            self._rebuild()
        return left

    def _rebuild(self) -> None:
        self.batch = build_batch(self.rows, self._block_size) if self.rows else None
        if self.batch is not None:
            self.phases = rotary_phases(torch.from_numpy(self.batch.positions), self._frequencies)


class Decoder:
    """Embeds tokens and leads rows through the layers."""

    def __init__(self, config: ModelConfig, weights: Weights, layers: Layers, block_size: int) -> None:
        self._config = config
        self._embed = weights.embed
        self._block_size = block_size
        self._frequencies = inverse_frequencies(config)
        self._waiting: dict[int, _Waiting] = {}
        self.layers = layers

    def run(self, rows: Sequence[Row], interrupt: Interrupt | None) -> Pass:
        """Lead checked rows through their layers; see `plan.Runner.step` for what an interrupt does."""
        depth = self._config.n_layers
        found = Pass()
        whole = [row for row in rows if _is_whole(row, depth)]
        partial = self._resumable([row for row in rows if not _is_whole(row, depth)], found)
        first, last = (partial[0].first_layer, partial[0].last_layer or depth) if partial else (depth, depth)
        active = _Active(self._config.hidden, self._block_size, self._frequencies)
        active.join(whole, [self._embedded(row) for row in whole])
        if interrupt is None and not partial and active.batch is not None:
            self.layers.forward(active.hidden, active.phases, active.batch, 0, depth)
        else:
            for layer in range(depth):
                if layer == first:
                    active.join(partial, [self._entry(row) for row in partial])
                if layer == last:
                    self._suspend(active, lambda row: not _is_whole(row, depth), layer, found)
                self._layer(active, layer, interrupt, found)
        found.batch, found.hidden = active.batch, active.hidden
        return found

    def drop(self, seq: int) -> None:
        """Forget what a sequence left between two layers."""
        self._waiting.pop(seq, None)

    def _layer(self, active: _Active, layer: int, interrupt: Interrupt | None, found: Pass) -> None:
        if active.batch is None:
            return
        self.layers.forward(active.hidden, active.phases, active.batch, layer, layer + 1)
        if interrupt is None:
            return
        if gone := interrupt.cancelled():
            self._give_up(active, gone)
        if layer + 1 < self._config.n_layers and active.batch is not None and interrupt.is_preempted():
            self._suspend(active, lambda row: len(row.tokens) > 1 and not row.draft, layer + 1, found)

    def _give_up(self, active: _Active, gone: Collection[int]) -> None:
        for row, _ in active.leave(lambda row: row.seq in gone):
            self.drop(row.seq)

    def _suspend(self, active: _Active, leaves: Callable[[Row], bool], layer: int, found: Pass) -> None:
        if active.batch is None:
            return
        for row, hidden in active.leave(leaves):
            self._waiting[row.seq] = _Waiting(start=row.start, tokens=row.tokens, layer=layer, hidden=hidden)
            found.suspended.append((row.seq, layer))

    def _resumable(self, rows: Sequence[Row], found: Pass) -> list[Row]:
        good = []
        for row in rows:
            left = self._waiting.get(row.seq)
            here = (left.start, left.tokens, left.layer) if left is not None else None
            if row.first_layer and here != (row.start, row.tokens, row.first_layer):
                found.failed.append((row.seq, f"nothing waits at layer {row.first_layer}"))
            else:
                good.append(row)
        return good

    def _entry(self, row: Row) -> torch.Tensor:
        return self._waiting.pop(row.seq).hidden if row.first_layer else self._embedded(row)

    def _embedded(self, row: Row) -> torch.Tensor:
        return self._embed[torch.tensor(row.tokens)]


def _is_whole(row: Row, depth: int) -> bool:
    return row.first_layer == 0 and row.last_layer in (None, depth)
