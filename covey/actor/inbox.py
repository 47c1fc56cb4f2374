"""The inbox of an actor: a bounded lane for work and a control lane that overtakes it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar
from weakref import WeakSet

import anyio

from covey.actor.message import ActorStopped, Ask, Reply
from covey.errors import Overloaded

CONTROL_MAX = 4096
"""Control messages that may wait: one per thing an actor can hold, with room to spare."""

M = TypeVar("M")


@dataclass(frozen=True, slots=True, kw_only=True)
class InboxStats:
    """What backpressure looks like from outside."""

    capacity: int
    queued: int
    blocked: int
    """Senders that wait for room."""
    control: int
    held: int
    """Asks that the actor has taken and not yet answered."""
    rejected: int
    """Messages refused because a lane was full, so far."""
    oldest_wait_s: float
    """How long the oldest queued work has waited."""


class _Sender(Generic[M]):
    """A blocked `tell`: its message is moved into the inbox for it, so a wake-up never loses the slot."""

    __slots__ = ("accepted", "msg", "wake")

    def __init__(self, msg: M) -> None:
        self.msg = msg
        self.wake = anyio.Event()
        self.accepted = False


class Inbox(Generic[M]):
    """The actor's side: a bounded lane for work, and one for control that overtakes it. One consumer."""

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError("capacity must be at least 1")
        self.capacity = capacity
        self._rejected = 0
        self._work: deque[tuple[float, M]] = deque()
        self._control: deque[M] = deque()
        self._senders: dict[_Sender[M], None] = {}
        self._wake = anyio.Event()
        # Weak: an ask that neither its asker nor the actor keeps has nobody left to fail.
        self._held: WeakSet[Reply[Any]] = WeakSet()
        self._draining = False
        self._stopped = False

    def __len__(self) -> int:
        """Return how much work waits; blocked senders and control are not counted."""
        return len(self._work)

    @property
    def draining(self) -> bool:
        """Whether no further work will be accepted."""
        return self._draining

    def stats(self) -> InboxStats:
        """Return a snapshot for metrics."""
        return InboxStats(
            capacity=self.capacity,
            queued=len(self._work),
            blocked=len(self._senders),
            control=len(self._control),
            held=sum(not reply.done for reply in self._held),
            rejected=self._rejected,
            oldest_wait_s=anyio.current_time() - self._work[0][0] if self._work else 0.0,
        )

    def next(self) -> M | None:
        """Take a message if one waits, control first; never blocks."""
        if self._control:
            msg = self._control.popleft()
        elif self._work:
            _, msg = self._work.popleft()
            self._admit_sender()
        else:
            return None
        if isinstance(msg, Ask):
            self._held.add(msg.reply)
        return msg

    async def get(self) -> M:
        """Take the next message, waiting for one; cancelling it never loses a message.

        Raises:
            anyio.EndOfStream: the actor is stopping and everything that was queued has been taken; it may
                leave `run`, which ends the actor cleanly.
        """
        await anyio.lowlevel.checkpoint()  # before taking: a cancellation here loses nothing
        while (msg := self.next()) is None:
            if self._draining:
                raise anyio.EndOfStream
            self._wake = anyio.Event()
            await self._wake.wait()
        return msg

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> M:
        try:
            return await self.get()
        except anyio.EndOfStream:
            raise StopAsyncIteration from None

    # -- the sending side ----------------------------------------------------

    def offer(self, msg: M) -> bool:
        """Queue work now; False, and a rejection counted, when full. Raises `ActorStopped` once draining."""
        queued = self._try_push(msg)
        self._rejected += not queued
        return queued

    async def send(self, msg: M) -> None:
        """Queue work, waiting for room in order of arrival. Raises `ActorStopped` once draining."""
        await anyio.lowlevel.checkpoint()
        if self._try_push(msg):
            return
        sender = _Sender(msg)
        self._senders[sender] = None
        try:
            await sender.wake.wait()
        finally:
            self._senders.pop(sender, None)
        if not sender.accepted:
            raise ActorStopped("the actor stopped before it had room")

    def signal(self, msg: M) -> bool:
        """Queue control now; False, with an ask in it failed, when the actor stopped or the lane is full."""
        if self._stopped or len(self._control) >= CONTROL_MAX:
            self._rejected += 1
            if isinstance(msg, Ask):
                full = Overloaded("the control lane is full")
                msg.reply.fail(ActorStopped("the actor stopped") if self._stopped else full)
            return False
        self._control.append(msg)
        self._wake.set()
        return True

    def _try_push(self, msg: M) -> bool:
        if self._draining:
            raise ActorStopped("the actor is stopping")
        if len(self._work) >= self.capacity or self._senders:  # nobody overtakes a blocked sender
            return False
        self._push(msg)
        return True

    def _push(self, msg: M) -> None:
        self._work.append((anyio.current_time(), msg))
        self._wake.set()

    def _admit_sender(self) -> None:
        if self._senders and not self._draining:
            sender = next(iter(self._senders))
            del self._senders[sender]
            sender.accepted = True
            self._push(sender.msg)
            sender.wake.set()

    # -- the supervisor's side -----------------------------------------------

    def drain(self) -> None:
        """Refuse new work and tell blocked senders; what is queued can still be taken."""
        self._draining = True
        for sender in self._senders:
            sender.wake.set()
        self._senders.clear()
        self._wake.set()

    def fail_held(self, make_error: Callable[[], BaseException]) -> None:
        """Fail every ask that was taken and not answered."""
        for reply in tuple(self._held):
            reply.fail(make_error())  # one exception each: a shared one would collect every asker's traceback
        self._held.clear()

    def stop(self) -> None:
        """Fail everything that is queued or held, and whatever comes later."""
        self.drain()
        self._stopped = True
        while self.next() is not None:
            pass
        self.fail_held(lambda: ActorStopped("the actor stopped before it answered"))
