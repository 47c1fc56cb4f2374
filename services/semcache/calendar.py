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

    def rewrite(self, slots: npt.NDArray[np.uint32], dates: npt.NDArray[np.float64]) -> None:
        """Start anew with these slots."""
        numbers = np.floor(np.minimum(dates[slots], LATEST) / PAGE_S).astype(np.int64)
        order = np.argsort(numbers, kind="stable")
        pages, starts = np.unique(numbers[order], return_index=True)
        parts = np.split(slots[order], starts[1:])
        self._pages = {int(page): array("I", part.tobytes()) for page, part in zip(pages, parts, strict=False)}
        self._next = sorted(self._pages)
        self._written = len(slots)
