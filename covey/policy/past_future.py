"""Admission by the predicted peak of memory instead of everybody's worst case (Past-Future scheduler, LightLLM)."""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """What a sequence holds, in tokens, and how far it may grow.

    `tokens` are all that have, or are about to get, a place in its blocks; whole blocks that another footprint of the
    same question counts may be left out.
    """

    tokens: int
    generated: int
    output_max: int
    """Tokens that it may generate in all."""


class PastFuture:
    """Predicts how long outputs become from how long they were, and what memory that takes at most at any time.

    Sequences peak at different times, so more fit than their sums say. The prediction may be wrong: a sequence is
    promised the blocks of its tokens only, and when a later one is missing, the batcher's `victim` is swapped out.
    """

    def __init__(self, *, block_size: int, window: int = 1000, quantile: float = 0.9, history_min: int = 16) -> None:
        """Of the last `window` lengths, those beyond a sequence's own tell its `quantile`, if there are `history_min`.

        Raises ValueError when a bound makes no sense.
        """
        if block_size < 1 or not 1 <= history_min <= window or not 0 < quantile <= 1:
            raise ValueError("block_size >= 1, 1 <= history_min <= window and 0 < quantile <= 1 are needed")
        self._block_size = block_size
        self._quantile = quantile
        self._history_min = history_min
        self._recent: deque[int] = deque(maxlen=window)
        self._sorted: list[int] = []

    def observe(self, length: int) -> None:
        """Note how many tokens a sequence had generated when it ended by itself. O(log window), and a short copy."""
        if len(self._recent) == self._recent.maxlen:
            del self._sorted[bisect_right(self._sorted, self._recent[0]) - 1]
        self._recent.append(length)
        insort(self._sorted, length)

    def left(self, footprint: Footprint) -> int:
        """Tokens that it will still generate: the quantile of the longer outputs; all that it may, if few were."""
        longest = max(0, footprint.output_max - footprint.generated)
        first = bisect_right(self._sorted, footprint.generated)
        longer = len(self._sorted) - first
        if longer < self._history_min:
            return longest
        expected = self._sorted[first + math.ceil(self._quantile * longer) - 1] - footprint.generated
        return min(longest, expected)

    def peak(self, footprints: Sequence[Footprint]) -> int:
        """The most blocks that they will hold at once, if each grows by a token a step, ends as predicted and lets go.

        Memory only shrinks when somebody ends, so the peak is at the end of one. In order of `left`, longest first, the
        first i are there when the i-th ends. Exact, in O(n (log n + block size)).
        """
        if not footprints:
            return 0
        left = np.array([self.left(footprint) for footprint in footprints], np.int64)
        order = np.argsort(-left, kind="stable")
        left = left[order]
        whole, rest = np.divmod(np.array([f.tokens for f in footprints], np.int64)[order], self._block_size)
        residues = np.arange(self._block_size)
        with_rest = np.cumsum(rest[:, None] == residues, axis=0)
        grown = -(-(left[:, None] + residues) // self._block_size)
        return int((np.cumsum(whole) + (with_rest * grown).sum(axis=1)).max())

    def admits(self, running: Sequence[Footprint], candidate: Footprint, capacity: int) -> bool:
        """Whether all of them fit into `capacity` blocks until the last one ends, as far as can be told."""
        return self.peak((*running, candidate)) <= capacity

    def promise(self, footprint: Footprint) -> int:
        """Blocks to promise at admission: those of its tokens and of the next one."""
        return -(-(footprint.tokens + 1) // self._block_size)

    def check(self) -> None:
        """Assert that the order statistics are those of the window."""
        assert self._sorted == sorted(self._recent)
