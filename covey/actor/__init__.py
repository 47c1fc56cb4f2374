"""Supervised actors: one task, one bounded inbox, no shared state.

An actor is anything with `async def run(inbox)`; it owns its state and is restarted by building it again.
Other code holds only its `Ref`. The rules, each with a test:

- Delivery is at most once and in order per lane; control overtakes work.
- Expected errors are answers (`reply.fail`). Any other exception is a crash: asks the actor holds fail with
  `ActorCrashed`, the message in hand is gone (poison cannot loop), what is still queued survives.
- More than `Restart.limit` crashes within `Restart.window_s` escalate: the exception leaves `supervise`.
- Stopping drains: new work is refused, blocked senders are told, queued work is served within the grace
  period, control still arrives. Then the task is cancelled and all open asks fail. No ask hangs.
"""

from __future__ import annotations

from covey.actor.inbox import CONTROL_MAX, Inbox
from covey.actor.message import ActorCrashed, ActorStopped, Ask, Reply
from covey.actor.ref import Ref
from covey.actor.supervisor import ESCALATE, Actor, ActorStats, OnCrash, Restart, Supervisor, supervise
from covey.errors import Overloaded

__all__ = [
    "CONTROL_MAX",
    "ESCALATE",
    "Actor",
    "ActorCrashed",
    "ActorStats",
    "ActorStopped",
    "Ask",
    "Inbox",
    "OnCrash",
    "Overloaded",
    "Ref",
    "Reply",
    "Restart",
    "Supervisor",
    "supervise",
]
