"""First come, first served: prompts are cut to fill the token budget of a step (Dynamic SplitFuse)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .batch_limits import BatchLimits
from .chunk import Chunk
from .discipline import cut, in_order, resume
from .ledger import Entry
from .pace import Pace


class FirstCome:
    """Nobody is overtaken, nobody is preempted; the rest of the budget after decoding goes to the oldest prompts."""

    def __init__(self, limits: BatchLimits, pace: Pace) -> None:
        self._limits = limits
        self._pace = pace

    def arrived(self, entry: Entry) -> None:
        """Nothing to note."""

    def line(self, waiting: Iterable[Entry], room: int, now: float) -> Iterable[Entry]:
        """In order of arrival."""
        return in_order(waiting, room)

    def prefill(self, ready: Sequence[Entry], decoding: int, now: float) -> list[Chunk]:
        """What was suspended, then the oldest prompts."""
        chunks = resume(ready)
        budget = self._limits.prefill_budget(self._pace, decoding)
        return chunks + cut(ready, budget - sum(chunk.count for chunk in chunks))

    def wakes_at(self) -> float | None:
        """Nothing is held back."""
        return None

    def interrupts_at(self) -> float | None:
        """Never: chunks are as long as a step may last."""
        return None

    def outranks(self, waiting: Iterable[Entry], running: Iterable[Entry], step: Sequence[Entry], now: float) -> bool:
        """Never."""
        return False

    def makes_way(self, head: Entry, running: Iterable[Entry], now: float) -> Entry | None:
        """Nobody."""
        return None
