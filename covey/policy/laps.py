"""Short and long prompts apart: short ones gather for a moment and go together, long ones in chunks (LAPS §4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .batch_limits import BatchLimits
from .chunk import Chunk
from .cutting import cut, resume
from .ledger import Entry
from .pace import Pace


@dataclass(frozen=True, slots=True, kw_only=True)
class LapsLimits:
    """When short prompts go."""

    short_max: int = 256
    """Up to this many tokens to compute a prompt is short: below, moving memory takes longer than computing.

    With times fitted as `alpha L (L + 2 H) + beta L` and `gamma L + delta H`, H being the tokens before, that is
    (gamma - beta) / alpha.
    """
    depth_max: int = 16
    """Short prompts never wait for more than this many of them."""
    wait_min_s: float = 0.0
    wait_max_s: float = 0.02
    guard_s: float = 0.005
    """Left over, by the prediction, between the end of a batch and its nearest deadline."""
    hurry_s: float = 0.01
    """A prompt with less slack than this makes the batch go at once."""
    turns_max: int = 4
    """Batches of short prompts in a row while a long one waits."""


class ShortAndLong:
    """A window opens with the first short prompt. Its batch goes when it is deep enough, when the window closes, or
    when a deadline comes near; depth and window follow how fast they came. Meanwhile decoding and long prompts go on.
    """

    interrupts_at: float | None = None

    def __init__(self, limits: BatchLimits, pace: Pace, settings: LapsLimits) -> None:
        self._limits = limits
        self._pace = pace
        self._settings = settings
        self.wakes_at: float | None = None
        self._depth = settings.depth_max
        self._wait_s = settings.wait_max_s
        self._closes_at: float | None = None
        self._gap_s = math.inf
        self._newest: Entry | None = None
        self._turns = 0

    def prefill(self, ready: Sequence[Entry], decoding: int, now: float) -> list[Chunk]:
        """A batch of short prompts that is due, or else chunks of the long ones."""
        self.wakes_at = None
        if resumed := resume(ready):
            return resumed
        short = [entry for entry in ready if entry.left <= self._settings.short_max]
        long = [entry for entry in ready if entry.left > self._settings.short_max]
        self._note_arrivals(short)
        budget = self._limits.prefill_budget(self._pace, decoding)
        if short and not (long and self._turns >= self._settings.turns_max) and self._is_due(short, now):
            self._turns += 1
            chunks = cut(short, budget)
            if chunks[-1].seq == short[-1].seq and chunks[-1].is_last:  # or the rest goes at once
                self._adapt(len(short))
            return chunks
        self._turns = 0
        return cut(long, budget)

    def _is_due(self, short: Sequence[Entry], now: float) -> bool:
        settings = self._settings
        served_s = self._pace.predict_s(sum(entry.left for entry in short)) + settings.guard_s
        due = (entry.demand.first_token_by for entry in short if not entry.drawn)
        slack_s = min((by for by in due if by is not None), default=math.inf) - now - served_s
        if self._closes_at is None:
            missing = self._depth - len(short)
            fill_s = missing * self._gap_s if missing > 0 else 0.0
            self._closes_at = now + min(max(min(slack_s, fill_s), settings.wait_min_s), self._wait_s)
        goes_at = min(self._closes_at, now + slack_s - settings.hurry_s)
        if len(short) >= self._depth or goes_at <= now:
            return True
        self.wakes_at = goes_at
        return False

    def _adapt(self, depth: int) -> None:
        """A full batch closes the window earlier and may be deeper; one that time cut short lowers the aim."""
        settings = self._settings
        if depth >= self._depth:
            self._wait_s = min(max(self._depth * self._gap_s, settings.wait_min_s), settings.wait_max_s)
            self._depth = min(depth + 1, settings.depth_max)
        else:
            self._depth = depth
        self._closes_at = None

    def _note_arrivals(self, short: Sequence[Entry]) -> None:
        for entry in short:
            if self._newest is None or entry.order > self._newest.order:
                if self._newest is not None:
                    gap_s = max(0.0, entry.demand.arrived_at - self._newest.demand.arrived_at)
                    self._gap_s = gap_s if self._gap_s == math.inf else 0.7 * self._gap_s + 0.3 * gap_s
                self._newest = entry
