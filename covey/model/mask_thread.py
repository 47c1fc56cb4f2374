"""The thread that fills token masks beside the forward pass; one that is stuck is left behind for a new one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.int32]

STUCK_MAX = 4
"""So many threads may be stuck at once."""


class MaskThread:
    """Runs one fill after the other. Threads cannot be ended: a stuck one keeps its core until its fill is through."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._executor = _new()
        self._stuck = 0

    @property
    def is_stuck(self) -> bool:
        """Whether no more threads shall be risked."""
        return self._stuck >= STUCK_MAX

    def submit(self, fill: Callable[[], Words]) -> Future[Words]:
        """Fill a mask, after those that were submitted before."""
        with self._lock:
            return self._executor.submit(fill)

    def wait(self, future: Future[Words], fill: Callable[[], Words], patience_s: float) -> Words | None:
        """What a submitted fill found, or None when it took longer than `patience_s` once it ran."""
        try:
            return future.result(timeout=patience_s)
        except TimeoutError:
            is_waiting = future.cancel()
            if not is_waiting and future.done():
                return future.result()
            self._leave_behind()
        if not is_waiting:
            return None
        try:
            return self.submit(fill).result(timeout=patience_s)  # it only stood behind a stuck one
        except TimeoutError:
            self._leave_behind()
            return None

    def close(self) -> None:
        """Let the thread end; what waits is still filled."""
        self._executor.shutdown(wait=False)

    def _leave_behind(self) -> None:
        """Go on with a new thread."""
        with self._lock:
            former, self._executor = self._executor, _new()
            self._stuck += 1
            former.submit(self._count_down)
        former.shutdown(wait=False)

    def _count_down(self) -> None:
        with self._lock:
            self._stuck -= 1


def _new() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="mask")
