"""Time as a value that is passed in: the only module that imports `time`."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Where live code reads the time; policies get `now` as an argument instead."""

    def now(self) -> float:
        """Return monotonic seconds: for leases, deadlines, rates and durations."""
        ...

    def wall(self) -> float:
        """Return Unix seconds: for records that people read and for token expiry, nothing else."""
        ...


class MonotonicClock:
    """The machine's clock; `now` agrees with the event loop's time."""

    __slots__ = ()

    def now(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()
