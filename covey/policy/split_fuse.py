"""Prompts in chunks that fill the token budget of a step (Dynamic SplitFuse)."""

from __future__ import annotations

from collections.abc import Sequence

from .batch_limits import BatchLimits
from .chunk import Chunk
from .cutting import cut, resume
from .ledger import Entry
from .pace import Pace


class SplitFuse:
    """What decoding leaves of the budget goes to the oldest prompts; the forward pass stays of one size."""

    wakes_at: float | None = None
    interrupts_at: float | None = None

    def __init__(self, limits: BatchLimits, pace: Pace) -> None:
        self._limits = limits
        self._pace = pace

    def prefill(self, ready: Sequence[Entry], decoding: int, now: float) -> list[Chunk]:
        """What was suspended, then the oldest prompts."""
        chunks = resume(ready)
        budget = self._limits.prefill_budget(self._pace, decoding)
        return chunks + cut(ready, budget - sum(chunk.count for chunk in chunks))
