"""One call to one worker, watched: its events until it ends, hands over, refuses, fails or falls silent."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NoReturn

import anyio

from covey.codec.methods import ServerStream
from covey.errors import Overloaded, Unavailable, from_code
from covey.net.rpc import Channel, Replies
from covey.types.generate import (
    Accepted,
    Event,
    Failed,
    Finished,
    FinishReason,
    GenerateRequest,
    Handover,
    Progress,
    Refused,
    Tokens,
)


class Silent(Unavailable):
    """A worker sent no event for longer than the watchdog allows."""


class BrokenOff(Unavailable):
    """A worker's stream ended without a terminal event, or it gave the request up."""


async def follow(
    channel: Channel,
    method: ServerStream[GenerateRequest, Event],
    request: GenerateRequest,
    *,
    gap_s: float,
    on_accepted: Callable[[], None],
    on_tokens: Callable[[Tokens], Awaitable[None]],
) -> Finished | Handover:
    """Run `request` at a worker; leaving this function, however, cancels it there.

    Raises:
        Overloaded: the worker refused; nothing was started.
        Silent: no event for `gap_s`.
        BrokenOff: the stream ended without an end.
        CoveyError: what the worker or the way to it failed with.
    """
    async with channel.stream(method, request, timeout_s=request.deadline_s) as events:
        while True:
            match await _next(events, gap_s):
                case Accepted():
                    on_accepted()
                case Progress():
                    pass  # a sign of life is all it is here
                case Tokens() as tokens:
                    await on_tokens(tokens)
                case Handover() as handover:
                    await on_tokens(handover.first)
                    return handover
                case Finished() as finished:
                    if finished.reason is FinishReason.CANCELLED:
                        raise BrokenOff("the worker gave the request up")
                    return finished
                case Refused() | Failed() as refusal:
                    _raise(refusal)


def _raise(event: Refused | Failed) -> NoReturn:
    if isinstance(event, Refused):
        raise Overloaded(event.message or "the worker has no room", retry_after_ms=event.retry_after_ms)
    error = from_code(event.code, event.message, field=event.field or None)
    if event.retryable:
        raise BrokenOff(f"the worker failed: {error.message}") from error
    raise error


async def _next(events: Replies[Event], gap_s: float) -> Event:
    try:
        with anyio.fail_after(gap_s):
            return await anext(events)
    except TimeoutError as error:
        raise Silent(f"the worker sent nothing for {gap_s:g} s") from error
    except StopAsyncIteration as error:
        raise BrokenOff("the worker's stream ended early") from error
