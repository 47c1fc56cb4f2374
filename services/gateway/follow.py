"""One call to one worker, watched: its events until it ends, hands over, refuses, fails or falls silent."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NoReturn

import anyio

from covey.codec.methods import ServerStream
from covey.errors import Overloaded, Unavailable, from_code
from covey.net.rpc import Channel
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
    gap_s: Callable[[], float],
    on_accepted: Callable[[], None],
    on_tokens: Callable[[Tokens], Awaitable[None]],
) -> Finished | Handover:
    """Run `request` at a worker; leaving this function, however, cancels it there.

    `gap_s` says, after each event, how long the next one may take.

    Raises:
        Overloaded: the worker refused; nothing was started.
        Silent: the next event did not come in time.
        BrokenOff: the stream ended without an end.
        CoveyError: what the worker or the way to it failed with.
    """
    async with channel.stream(method, request, timeout_s=request.deadline_s) as events:
        with anyio.CancelScope(deadline=anyio.current_time() + gap_s()) as watchdog:
            async for event in events:
                end = await _take(event, on_accepted, on_tokens)
                if end is not None:
                    return end
                watchdog.deadline = anyio.current_time() + gap_s()
            raise BrokenOff("the worker's stream ended early")
    raise Silent("the worker fell silent")


async def _take(
    event: Event, on_accepted: Callable[[], None], on_tokens: Callable[[Tokens], Awaitable[None]]
) -> Finished | Handover | None:
    match event:
        case Accepted():
            on_accepted()
        case Progress():
            pass  # a sign of life is all it is here
        case Tokens():
            await on_tokens(event)
        case Handover():
            await on_tokens(event.first)
            return event
        case Finished():
            if event.reason is FinishReason.CANCELLED:
                raise BrokenOff("the worker gave the request up")
            return event
        case Refused() | Failed():
            _raise(event)
    return None


def _raise(event: Refused | Failed) -> NoReturn:
    if isinstance(event, Refused):
        raise Overloaded(event.message or "the worker has no room", retry_after_ms=event.retry_after_ms)
    error = from_code(event.code, event.message, field=event.field or None)
    if event.retryable:
        raise BrokenOff(f"the worker failed: {error.message}") from error
    raise error
