"""Work beside the steps: transfers and demotions, counted, in the actor's own task group."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVarTuple, Unpack

from anyio.abc import TaskGroup

Ts = TypeVarTuple("Ts")


class Background:
    """Starts tasks and says, through `on_end`, when one has ended or come further: what waits may go on now."""

    def __init__(self, tasks: TaskGroup, on_end: Callable[[], object]) -> None:
        self._tasks = tasks
        self._on_end = on_end
        self.running = 0
        """Tasks that have not ended."""

    def wake(self) -> None:
        """Say that something has changed."""
        self._on_end()

    def spawn(self, work: Callable[[Unpack[Ts]], Awaitable[None]], *args: *Ts) -> None:
        """Run `work` with its arguments."""
        self.running += 1
        self._tasks.start_soon(self._run, work, args)

    async def _run(self, work: Callable[..., Awaitable[None]], args: tuple[object, ...]) -> None:
        try:
            await work(*args)
        finally:
            self.running -= 1
            self._on_end()
