"""What a request has produced and its reader has not taken yet: bounded, closed by the one terminal event."""

from __future__ import annotations

from collections import deque
from typing import TypeGuard

import anyio

from covey.types.generate import Event, Failed, Finished, Handover, Progress, Refused, Stage, Tokens

Terminal = Refused | Handover | Finished | Failed


def is_terminal(event: Event) -> TypeGuard[Terminal]:
    """Whether a stream ends with this event."""
    return isinstance(event, Refused | Handover | Finished | Failed)


class Outbox:
    """One writer (the engine's actor, which never waits) and one reader (`Engine.generate`).

    The writer looks at `is_full` and pauses the request; at most one step's tokens come after that.
    """

    def __init__(self, tokens_max: int) -> None:
        self._events: deque[Event] = deque()
        self._arrived = anyio.Event()
        self._tokens_max = tokens_max
        self._tokens = 0
        self.progress = Progress(stage=Stage.QUEUE)
        """What to show when there is nothing else."""
        self.is_paused = False
        """Whether the request waits for the reader; the actor writes it."""
        self.is_unwanted = False
        """Whether the reader left or cancelled, perhaps before the actor saw the request; the reader writes it."""
        self.is_closed = False
        """Whether the terminal event is in; nothing is accepted after it."""

    @property
    def is_full(self) -> bool:
        """Whether the reader is too far behind."""
        return self._tokens >= self._tokens_max

    @property
    def is_drained(self) -> bool:
        """Whether a paused request may go on."""
        return self._tokens <= self._tokens_max // 2

    def put(self, event: Event) -> None:
        """Add an event; without effect after the terminal one."""
        if self.is_closed:
            return
        self.is_closed = is_terminal(event)
        self._events.append(event)
        self._tokens += len(event.ids) if isinstance(event, Tokens) else 0
        self._arrived.set()

    def show(self, stage: Stage, *, done: int, total: int) -> None:
        """Set what to show when there is nothing else."""
        self.progress = Progress(stage=stage, done=done, total=total)

    async def get(self) -> Event:
        """Take the next event, waiting for one; cancelling it loses nothing."""
        while not self._events:
            self._arrived = anyio.Event()
            await self._arrived.wait()
        event = self._events.popleft()
        self._tokens -= len(event.ids) if isinstance(event, Tokens) else 0
        return event
