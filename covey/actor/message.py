"""Questions and answers between actors and their callers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, TypeVar

import anyio

from covey.errors import Internal, Unavailable

R = TypeVar("R")


class ActorStopped(Unavailable):
    """The actor stopped, or is draining, and did not take the message."""


class ActorCrashed(Internal):
    """The actor failed while it held the message; `__cause__` says why."""


class Reply(Generic[R]):
    """A single-use answer slot that knows when nobody waits for it any more."""

    __slots__ = ("__weakref__", "_arrived", "_done", "_error", "_value", "abandoned")

    def __init__(self) -> None:
        self._done = False
        self._arrived: anyio.Event | None = None  # made by the waiter: most asks outside a wait need none
        self._value: R
        self._error: BaseException | None = None
        self.abandoned = False
        """True once the asker gave up; check it before starting expensive work."""

    @property
    def done(self) -> bool:
        """Whether an answer was set; later ones are ignored."""
        return self._done

    def set(self, value: R) -> None:
        """Answer with `value`; without effect when an answer is already there."""
        if not self._done:
            self._value = value
            self._finish()

    def fail(self, error: BaseException) -> None:
        """Answer by raising `error` in the asker; without effect when an answer is already there."""
        if not self._done:
            self._error = error
            self._finish()

    async def wait(self) -> R:
        """Return the answer or raise what `fail` was given; one waiter at a time."""
        try:
            if not self._done:
                self._arrived = anyio.Event()
                await self._arrived.wait()
        finally:
            self.abandon()
        if self._error is not None:
            raise self._error
        return self._value

    def _finish(self) -> None:
        self._done = True
        if self._arrived is not None:
            self._arrived.set()

    def abandon(self) -> None:
        """Say that nobody waits any more; without effect when an answer is already there."""
        self.abandoned = not self._done


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask(Generic[R]):
    """A message that expects an `R`; subclass it with the question's fields."""

    reply: Reply[R] = field(default_factory=Reply, repr=False, compare=False)
