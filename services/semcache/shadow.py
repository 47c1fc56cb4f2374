"""Judging a sample of the served semantic hits in the background, so that their error is known and not guessed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from structlog.typing import FilteringBoundLogger

from covey.actor import ActorStopped, Inbox, Ref
from covey.errors import CoveyError, Overloaded
from covey.types.ids import TenantId


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """A semantic hit that was served: `answer`, given to `stored`, went to `asked`."""

    category: str
    entry: str
    asked: str
    stored: str
    answer: str
    tenant: TenantId = TenantId("")


Sample = Callable[[Sampled], object]
"""Takes a hit to be judged; never waits, and may drop it."""


def dropping(shadow: Ref[Sampled]) -> Sample:
    """Hand hits to the actor; what it has no room for is not judged."""

    def sample(sampled: Sampled) -> None:
        with suppress(Overloaded, ActorStopped):
            shadow.offer(sampled)

    return sample


class Judge(Protocol):
    """Whoever can tell whether an answer fits another question."""

    async def judge(self, sampled: Sampled) -> bool | None:
        """Whether the answer is right for what was asked; None when this cannot be told. Raises `CoveyError`."""
        ...


class Shadow:
    """An actor that has hits judged, one at a time, off the path of requests; its inbox is the bound."""

    def __init__(self, judge: Judge, verdict: Callable[[Sampled, bool], None], log: FilteringBoundLogger) -> None:
        self._judge = judge
        self._verdict = verdict
        self._log = log

    async def run(self, inbox: Inbox[Sampled]) -> None:
        async for sampled in inbox:
            try:
                right = await self._judge.judge(sampled)
            except CoveyError as error:  # a judge that fails costs a verdict, never an answer
                self._log.warning("hit not judged", category=sampled.category, code=error.code)
                continue
            if right is not None:
                self._verdict(sampled, right)
