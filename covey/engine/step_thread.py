"""The one thread that may touch a runner: its OpenMP team, its core mask and its priority belong to it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class StepThread:
    """Runs one thing at a time, `niceness` below the rest of the process.

    On Linux niceness is a thread's own and is inherited by the OpenMP workers that it starts: while a model fills the
    cores, event loops, look-ups and streams still get theirs at once.
    """

    def __init__(self, niceness: int) -> None:
        self._executor = ThreadPoolExecutor(
            max_workers=1, thread_name_prefix="step", initializer=os.nice, initargs=(niceness,)
        )

    def start(self, function: Callable[[], T]) -> asyncio.Future[T]:
        """Run a function; the future belongs to the running event loop."""
        return asyncio.wrap_future(self._executor.submit(function))

    def close(self) -> None:
        """Let the thread end; what runs is not waited for."""
        self._executor.shutdown(wait=False, cancel_futures=True)
