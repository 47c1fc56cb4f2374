"""A request under way as its client sees it: a bounded stream of events, and what is known so far."""

from __future__ import annotations

from typing import Self

from covey.types.ids import WorkerId
from covey.types.program import CacheOutcome, CompletionEvent, Started

from .job import Job
from .pipe import Pipe


class Completion:
    """A request under way: its events in order, and what is known of it so far."""

    def __init__(self, job: Job, model: str, created: int, capacity: int) -> None:
        self.job = job
        self.model = model
        self.created = created
        self.cache = CacheOutcome.BYPASS
        """What semcache did for the first choice; settled by the first event after `Started`."""
        self.worker = WorkerId("")
        """Who decoded the first choice; settled at the end."""
        self.pinned_blocks = 0
        """What stays pinned there for the tool call that follows; settled at the end."""
        self.pipe: Pipe[CompletionEvent] = Pipe(capacity)
        self._started = False

    def start(self) -> None:
        """A worker took the request, or the cache had it."""
        if not self._started:
            self._started = True
            self.pipe.put(Started(request_id=self.job.request_id, model=self.model))

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> CompletionEvent:
        event = await self.pipe.get()
        if event is None:
            raise StopAsyncIteration
        return event
