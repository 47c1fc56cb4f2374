"""What other code holds of an actor."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import anyio

from covey.actor.inbox import Inbox
from covey.actor.message import Ask
from covey.errors import DeadlineExceeded, Overloaded

M_contra = TypeVar("M_contra", contravariant=True)
R = TypeVar("R")


class Ref(Generic[M_contra]):
    """The only thing other code holds of an actor."""

    __slots__ = ("_inbox", "name")

    def __init__(self, name: str, inbox: Inbox[Any]) -> None:
        self.name = name
        self._inbox = inbox

    async def tell(self, msg: M_contra) -> None:
        """Queue `msg`, waiting for room: backpressure.

        A cancelled `tell` may have queued the message already. Raises `ActorStopped`.
        """
        await self._inbox.send(msg)

    def offer(self, msg: M_contra) -> None:
        """Queue `msg` now: load shedding. Raises `Overloaded` when full, `ActorStopped` once draining."""
        if not self._inbox.offer(msg):
            raise Overloaded(f"the queue of {self.name} is full")

    def signal(self, msg: M_contra) -> bool:
        """Queue a control message ahead of all work; never waits, never raises: safe in `finally`.

        Arrives while the actor drains. Returns False, and counts a rejection, when the actor has stopped or
        `CONTROL_MAX` signals wait (it is stuck, and its leases will end what the signal would have ended).
        """
        return self._inbox.signal(msg)

    async def ask(self, msg: Ask[R], *, timeout_s: float | None) -> R:
        """Queue `msg` and wait for its answer; both share one deadline. Cancelling marks the reply abandoned.

        Raises:
            DeadlineExceeded: no answer within `timeout_s`.
            ActorStopped: the actor stopped before it answered.
            ActorCrashed: the actor failed while it held the message.
        """
        try:
            with anyio.move_on_after(timeout_s):
                await self._inbox.send(msg)
                return await msg.reply.wait()
        finally:
            msg.reply.abandon()
        raise DeadlineExceeded(f"{self.name} did not answer in time")
