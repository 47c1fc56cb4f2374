"""The one thread that may touch a runner: its OpenMP team, its core mask and its priority belong to it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import anyio
from anyio.lowlevel import checkpoint_if_cancelled

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

    async def run(self, function: Callable[[], T]) -> T:
        """Run and wait, also when cancelled: nobody may free what the function works on."""
        with anyio.CancelScope(shield=True):
            result = await asyncio.wrap_future(self._executor.submit(function))
        await checkpoint_if_cancelled()
        return result

    def close(self) -> None:
        """Let the thread end; what runs is not waited for."""
        self._executor.shutdown(wait=False, cancel_futures=True)
