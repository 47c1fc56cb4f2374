"""Small pieces of work that outlive their request, for example offering an answer to semcache: bounded, best effort."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Self

import anyio
from anyio.abc import TaskGroup

from covey.errors import CoveyError
from covey.net.tasks import background_tasks

log = logging.getLogger(__name__)


class Errands:
    """Runs errands under one owner; when too many are under way a new one is dropped."""

    def __init__(self, tg: TaskGroup, *, errands_max: int, timeout_s: float) -> None:
        self._tg = tg
        self._max = errands_max
        self._timeout_s = timeout_s
        self._active = 0

    @classmethod
    @asynccontextmanager
    async def open(cls, *, errands_max: int = 64, timeout_s: float = 5.0) -> AsyncIterator[Self]:
        """Own errands for a block; what still runs when it is left is cancelled."""
        async with background_tasks() as tg:
            yield cls(tg, errands_max=errands_max, timeout_s=timeout_s)

    def run(self, errand: Callable[[], Awaitable[object]], name: str) -> bool:
        """Start an errand; False when it was dropped."""
        if self._active >= self._max:
            return False
        self._active += 1
        self._tg.start_soon(self._run, errand, name)
        return True

    async def _run(self, errand: Callable[[], Awaitable[object]], name: str) -> None:
        try:
            with anyio.fail_after(self._timeout_s):
                await errand()
        except (CoveyError, TimeoutError) as error:
            log.info("errand failed name=%s error=%s", name, type(error).__name__)
        finally:
            self._active -= 1
