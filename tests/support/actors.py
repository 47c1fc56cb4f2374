"""Small actors and messages that the tests of the actor kit share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import anyio

from covey.actor import (
    Actor,
    Ask,
    Inbox,
    Ref,
)
from covey.errors import CoveyError, Miss


@dataclass(frozen=True, slots=True)
class Add(Ask[int]):
    n: int


@dataclass(frozen=True, slots=True)
class Work(Ask[str]):
    seconds: float


@dataclass(frozen=True, slots=True)
class Refuse(Ask[None]):
    pass


@dataclass(frozen=True, slots=True)
class Boom:
    pass


Command = Add | Work | Refuse | Boom | str | int


class Counter:
    """Adds, works for a while, refuses and crashes on demand; records what it saw."""

    def __init__(self, seen: list[object] | None = None) -> None:
        self.total = 0
        self.seen = [] if seen is None else seen

    async def run(self, inbox: Inbox[Command]) -> None:
        async for msg in inbox:
            self.seen.append(msg)
            match msg:
                case Add(n=n, reply=reply):
                    self.total += n
                    reply.set(self.total)
                case Work(seconds=seconds, reply=reply):
                    await anyio.sleep(seconds)
                    reply.set("done")
                case Refuse(reply=reply):
                    reply.fail(Miss("not here"))
                case Boom():
                    raise KeyError("boom")


class Stuck:
    """Takes one message and never answers."""

    async def run(self, inbox: Inbox[Any]) -> None:
        await inbox.get()
        await anyio.sleep_forever()


def starting_after(delay_s: float, seen: list[object]) -> Callable[[], Actor[Command]]:
    class Late(Counter):
        async def run(self, inbox: Inbox[Command]) -> None:
            await anyio.sleep(delay_s)
            await super().run(inbox)

    return lambda: Late(seen)


async def outcome(ref: Ref[Any], msg: Ask[Any], into: list[object]) -> None:
    try:
        into.append(await ref.ask(msg, timeout_s=None))
    except CoveyError as error:
        into.append(type(error))
