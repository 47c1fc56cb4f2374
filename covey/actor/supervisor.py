"""The owner of actors: starts, restarts, drains and stops them."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any, Protocol, TypeVar

import anyio
from anyio.abc import TaskGroup

from covey.actor.inbox import Inbox, InboxStats
from covey.actor.message import ActorCrashed, ActorStopped
from covey.actor.ref import Ref
from covey.retry import Backoff

M = TypeVar("M")


class Actor(Protocol[M]):
    """Anything that serves an inbox; returning means it has stopped for good."""

    async def run(self, inbox: Inbox[M]) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Restart:
    """At most `limit` restarts in `window_s` seconds, then the failure escalates."""

    limit: int = 5
    window_s: float = 30.0
    backoff: Backoff = field(default_factory=Backoff)

    def __post_init__(self) -> None:
        if self.limit < 0 or self.window_s <= 0:
            raise ValueError("a restart budget needs limit >= 0 and window_s > 0")


ESCALATE = Restart(limit=0)
"""The default: a crash ends the process, and whoever supervises the process restarts it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorStats:
    """What backpressure looks like from outside, for metrics by actor name."""

    name: str
    crashes: int
    inbox: InboxStats


@dataclass(slots=True, eq=False)
class _Child:
    name: str
    make: Callable[[], Actor[Any]]
    inbox: Inbox[Any]
    restart: Restart
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    ended: anyio.Event = field(default_factory=anyio.Event)
    crashed_at: deque[float] = field(default_factory=deque)
    crashes: int = 0

    def record_crash(self, now: float) -> bool:
        """Count a crash; return whether the budget still allows a restart."""
        self.crashes += 1
        self.crashed_at.append(now)
        while self.crashed_at[0] <= now - self.restart.window_s:
            self.crashed_at.popleft()
        return len(self.crashed_at) <= self.restart.limit


OnCrash = Callable[[str, Exception, bool], None]
"""Called with the actor's name, what it raised, and whether it will be restarted."""


class Supervisor:
    """Owns actors; leaving its `supervise` block drains them in reverse order."""

    def __init__(self, tg: TaskGroup, *, grace_s: float, rng: Random, on_crash: OnCrash | None) -> None:
        self._tg = tg
        self._grace_s = grace_s
        self._rng = rng
        self._on_crash = on_crash
        self._children: dict[_Child, None] = {}
        self._draining = False

    def start(
        self,
        make: Callable[[], Actor[M]],
        *,
        name: str,
        capacity: int = 64,
        restart: Restart = ESCALATE,
    ) -> Ref[M]:
        """Start what `make` builds; a restart calls `make` again. Raises `ActorStopped` once draining."""
        if self._draining:
            raise ActorStopped(f"cannot start {name}: its supervisor is stopping")
        child = _Child(name=name, make=make, inbox=Inbox[M](capacity), restart=restart)
        self._children[child] = None
        self._tg.start_soon(self._keep, child, name=f"actor {name}")
        return Ref(name, child.inbox)

    async def drain(self) -> None:
        """Stop all actors, the youngest first; each has the grace period, then it is cancelled."""
        self._draining = True
        for child in reversed(tuple(self._children)):
            child.inbox.drain()
            with anyio.move_on_after(self._grace_s):
                await child.ended.wait()
            child.scope.cancel()
            await child.ended.wait()

    def stats(self) -> tuple[ActorStats, ...]:
        """Return a snapshot of every running actor, oldest first."""
        return tuple(
            ActorStats(name=child.name, crashes=child.crashes, inbox=child.inbox.stats()) for child in self._children
        )

    async def _keep(self, child: _Child) -> None:
        try:
            with child.scope:
                while (delay_s := await self._run_once(child)) is not None:  # noqa: ASYNC110 - not polling
                    await anyio.sleep(delay_s)
        finally:
            child.inbox.stop()
            del self._children[child]
            child.ended.set()

    async def _run_once(self, child: _Child) -> float | None:
        """Run the actor to its end (None) or to a crash its budget covers (the pause in seconds)."""
        try:
            await child.make().run(child.inbox)
        except Exception as error:
            if isinstance(error, anyio.EndOfStream) and child.inbox.draining:
                return None
            child.inbox.fail_held(partial(_crash, child.name, error))
            restarting = child.record_crash(anyio.current_time())
            if self._on_crash is not None:
                self._on_crash(child.name, error, restarting)
            if not restarting:
                raise
            return child.restart.backoff.delay_s(len(child.crashed_at) - 1, self._rng)
        return None


def _crash(name: str, error: Exception) -> ActorCrashed:
    crash = ActorCrashed(f"{name} failed: {type(error).__name__}")
    crash.__cause__ = error
    return crash


@asynccontextmanager
async def supervise(
    *, grace_s: float = 10.0, seed: int | None = None, on_crash: OnCrash | None = None
) -> AsyncIterator[Supervisor]:
    """Own actors for the length of a block; on leaving it, drain them in reverse start order.

    `grace_s` is what each actor gets to finish; `seed` makes restart delays repeatable. An escalated crash
    leaves as part of an `ExceptionGroup`, after all siblings were cancelled and their asks failed.
    """
    rng = Random(seed)  # noqa: S311 - jitter, not a secret
    async with anyio.create_task_group() as tg:
        supervisor = Supervisor(tg, grace_s=grace_s, rng=rng, on_crash=on_crash)
        try:
            yield supervisor
        finally:
            with anyio.CancelScope(shield=True):
                await supervisor.drain()
