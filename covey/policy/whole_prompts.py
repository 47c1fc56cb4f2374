"""Whole prompts in order of urgency, stopped between layers when something matters more (FlowPrefill)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .batch_limits import BatchLimits
from .chunk import Chunk
from .cutting import chunk_of
from .ledger import Entry
from .pace import Pace
from .urgency import ByUrgency


class WholePrompts:
    """Batches the most urgent prompts for as long as none of them misses its deadline by it.

    A prompt is not cut: a more urgent arrival stops it at the next layer. So does the end of the step's time when other
    sequences decode, and then it goes on beside the next decode.
    """

    wakes_at: float | None = None

    def __init__(self, limits: BatchLimits, pace: Pace, order: ByUrgency, *, n_layers: int) -> None:
        self._limits = limits
        self._pace = pace
        self._order = order
        self._n_layers = n_layers
        self.interrupts_at: float | None = None

    def prefill(self, ready: Sequence[Entry], decoding: int, now: float) -> list[Chunk]:
        """The most urgent prompts; those that stopped at another layer than the first such one wait for their turn."""
        self.interrupts_at = now + self._limits.step_target_s if decoding else None
        chunks: list[Chunk] = []
        tokens, ends_at, ends_by, range_start = 0, now + self._pace.predict_s(decoding), math.inf, 0
        for entry in sorted(ready, key=lambda entry: self._order.rank(entry, now)):
            chunk = entry.suspended or chunk_of(entry, min(entry.left, self._limits.prompt_tokens_max))
            if chunk.first_layer and range_start not in {0, chunk.first_layer}:
                continue
            tokens += chunk.count
            ends_at += self._pace.predict_s(chunk.count * chunk.share(self._n_layers, until=None))
            is_hopeless = self._order.is_hopeless(entry, now)
            ends_by = min(ends_by, now + self._limits.step_target_s if is_hopeless else self._order.due(entry))
            if chunks and (tokens > self._limits.prompt_tokens_max or ends_at > ends_by):
                break
            chunks.append(chunk)
            range_start = range_start or chunk.first_layer
        return chunks
