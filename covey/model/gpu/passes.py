"""Takes the rows of a step through the layers: some join late, some leave early, some are stopped between two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from covey.model.plan import Interrupt, Row, RunnerInfo

from .batch import GpuBatch, build_batch, drawing_places, upload
from .decoder import GpuDecoder, Stream


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """What a row left between two layers: its residual stream before `layer`."""

    start: int
    tokens: tuple[int, ...]
    layer: int
    hidden: torch.Tensor

    def fits(self, row: Row) -> bool:
        """Whether the row goes on from here."""
        return (self.start, self.tokens, self.layer) == (row.start, row.tokens, row.first_layer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Passed:
    """The rows that came through and draw, with their logits, `draft + 1` rows each; the sequences that came through
    but are not made of finite numbers; and what the others left.
    """

    drawing: tuple[Row, ...]
    logits: torch.Tensor
    broken: tuple[int, ...] = ()
    left: dict[int, Left] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class _Wave:
    """Rows that go through the same layer together."""

    batch: GpuBatch
    phases: tuple[torch.Tensor, torch.Tensor]
    stream: Stream

    def parts(self) -> dict[int, torch.Tensor]:
        """Each row's own residual stream, by sequence."""
        hidden, firsts = self.stream.settled(), self.batch.firsts
        return {row.seq: hidden[firsts[i] : firsts[i + 1]] for i, row in enumerate(self.batch.rows)}


class LayerPass:
    """One step of checked rows; `resumed` is where those begin that do not begin at layer 0."""

    def __init__(self, decoder: GpuDecoder, info: RunnerInfo, device: torch.device, resumed: dict[int, Left]) -> None:
        self._decoder = decoder
        self._info = info
        self._device = device
        self._resumed = resumed
        self._left: dict[int, Left] = {}

    def run(self, rows: Sequence[Row], interrupt: Interrupt | None) -> Passed:
        """Run every row through its layers, but for what the interrupt stops."""
        n_layers = self._info.n_layers
        waiting, wave = list(rows), None
        first = min(row.first_layer for row in rows)
        for layer in range(first, n_layers):
            live: Sequence[Row] = wave.batch.rows if wave is not None else ()
            if layer > first and interrupt is not None:
                live, waiting = self._stopped(interrupt, layer, live, waiting, wave)
            staying = self._staying(live, layer, wave)
            joining = [row for row in waiting if row.first_layer == layer]
            waiting = [row for row in waiting if row.first_layer > layer]
            if joining or wave is None or len(staying) < len(wave.batch.rows):
                wave = self._regrouped(wave, [*staying, *joining])
            if wave is None and not waiting:
                break
            if wave is not None and layer < n_layers - 1:
                wave.stream = self._decoder.layer(layer, wave.stream, wave.batch, wave.phases)
        return self._finished(wave)

    def _stopped(
        self, interrupt: Interrupt, layer: int, live: Sequence[Row], waiting: Sequence[Row], wave: _Wave | None
    ) -> tuple[list[Row], list[Row]]:
        """What the interrupt leaves of the rows that run and of those that have yet to join."""
        unwanted = interrupt.cancelled()
        live = [row for row in live if row.seq not in unwanted]
        waiting = [row for row in waiting if row.seq not in unwanted]
        if not interrupt.is_preempted():
            return live, waiting
        for row in live:
            if _is_long(row):
                self._leave(row, layer, wave)
        for row in waiting:
            if _is_long(row):
                self._left[row.seq] = self._resumed[row.seq]
        return [row for row in live if not _is_long(row)], [row for row in waiting if not _is_long(row)]

    def _staying(self, live: Sequence[Row], layer: int, wave: _Wave | None) -> list[Row]:
        """The rows whose range does not end before this layer; the others leave."""
        for row in live:
            if row.last_layer == layer:
                self._leave(row, layer, wave)
        return [row for row in live if row.last_layer != layer]

    def _leave(self, row: Row, layer: int, wave: _Wave | None) -> None:
        assert wave is not None
        hidden = wave.parts()[row.seq].clone()
        self._left[row.seq] = Left(start=row.start, tokens=row.tokens, layer=layer, hidden=hidden)

    def _regrouped(self, wave: _Wave | None, rows: Sequence[Row]) -> _Wave | None:
        """The rows as a new wave, with the streams that they have."""
        if not rows:
            return None
        batch = build_batch(rows, self._info.block_size, self._device)
        parts = wave.parts() if wave is not None else {}
        parts |= {row.seq: self._resumed[row.seq].hidden for row in rows if row.seq not in parts and row.first_layer}
        if parts:
            spans = zip(batch.rows, batch.firsts, batch.firsts[1:], strict=False)
            streams = [
                parts[row.seq] if row.seq in parts else self._decoder.embed(batch.tokens[first:last])
                for row, first, last in spans
            ]
            hidden = torch.cat(streams)
        else:
            hidden = self._decoder.embed(batch.tokens)
        return _Wave(batch=batch, phases=self._decoder.phases(batch.positions), stream=Stream(hidden=hidden))

    def _finished(self, wave: _Wave | None) -> Passed:
        """Run the last layer with the rows that are left."""
        if wave is None:
            return Passed(drawing=(), logits=torch.empty(0), left=self._left)
        (keep,) = upload([drawing_places(wave.batch)], self._device)
        logits, is_finite = self._decoder.last_layer(wave.stream, wave.batch, wave.phases, keep)
        rows, fine = wave.batch.rows, is_finite.cpu().numpy()
        bad = np.flatnonzero(~np.logical_and.reduceat(fine, wave.batch.firsts[:-1]))
        broken = tuple(rows[i].seq for i in bad)
        drawing = tuple(row for row in rows if row.sample is not None)
        return Passed(drawing=drawing, logits=logits, broken=broken, left=self._left)


def _is_long(row: Row) -> bool:
    """Whether a row is more than a decode step: guesses do not count."""
    return len(row.tokens) - row.draft > 1
