"""Background tasks behind a context manager, without wrapping what its body raises."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
from anyio.abc import TaskGroup

from covey.net.call import sole


@asynccontextmanager
async def background_tasks() -> AsyncIterator[TaskGroup]:
    """Own tasks for a block and cancel them on leaving it; a single failure leaves as itself, not as a group."""
    try:
        async with anyio.create_task_group() as tg:
            try:
                yield tg
            finally:
                tg.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        only = sole(group)
        if only is group:
            raise
        raise only from only.__cause__
