"""When entries expire: slots by the quarter minute of their date, and a heap of those quarter minutes."""

from __future__ import annotations

import heapq
import math
from array import array

import numpy as np
import numpy.typing as npt

PAGE_S = 16.0
LATEST = 2.0**40
"""Later dates are all one."""


class Calendar:
    """Dates of slots, four bytes each: entries of one category that were stored together expire together.

    A slot that was freed, or belongs to another entry by now, stays on its page until the page is read.
    """

    def __init__(self) -> None:
        self._pages: dict[int, array[int]] = {}
        self._next: list[int] = []
        self._written = 0

    def __len__(self) -> int:
        return self._written

    def write(self, slot: int, expires_at: float) -> None:
        """Note a slot's date."""
        number = math.floor(min(expires_at, LATEST) / PAGE_S)
        page = self._pages.get(number)
        if page is None:
            page = self._pages[number] = array("I")
            heapq.heappush(self._next, number)
        page.append(slot)
        self._written += 1

    def due(self, dates: npt.NDArray[np.float64], now: float, limit: int) -> list[int]:
        """Take off up to `limit` slots whose date in `dates` has come; stale ones of those pages go too."""
        due: list[int] = []
        while self._next and self._next[0] * PAGE_S <= now and len(due) < limit:
            number = self._next[0]
            page = np.frombuffer(self._pages[number], dtype=np.uint32)
            over = dates[page] <= now
            taken = np.unique(page[over])[: limit - len(due)]
            due.extend(taken.tolist())
            is_rest = ~np.isin(page, taken) & (np.floor(np.minimum(dates[page], LATEST) / PAGE_S) == number)
            rest = array("I", page[is_rest].tobytes())
            del page
            self._written -= len(self._pages[number]) - len(rest)
            if rest:
                self._pages[number] = rest
                break
            del self._pages[number]
            heapq.heappop(self._next)
        return due

    def rewrite(self, slots: list[int], dates: npt.NDArray[np.float64]) -> None:
        """Start anew with these slots."""
        self._pages, self._next, self._written = {}, [], 0
        for slot in slots:
            self.write(slot, float(dates[slot]))
