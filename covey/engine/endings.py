"""The terminal events of a request."""

from __future__ import annotations

from covey.errors import CoveyError
from covey.types.generate import Accepted, Failed, Finished, FinishReason, Refused, Tokens
from covey.types.ids import LeaseId, WorkerId

from .sequence import Sequence


def finished(seq: Sequence, now: float, lease: LeaseId | None = None) -> Finished | Failed:
    """The end of a sequence whose tokens are a whole answer, or that cannot go on."""
    if seq.failure is not None:
        return failed(seq.failure)
    reason = FinishReason.STOP if seq.is_stop else FinishReason.LENGTH
    return Finished(reason=reason, usage=seq.usage(), timings=seq.timings(now), lease=lease)


def cancelled(seq: Sequence, now: float) -> Finished:
    """The end that the caller asked for."""
    return Finished(reason=FinishReason.CANCELLED, usage=seq.usage(), timings=seq.timings(now))


def failed(error: CoveyError, *, retryable: bool | None = None) -> Failed:
    """A typed error as an event; `retryable` overrides what the error's table says."""
    return Failed(
        code=error.code,
        message=error.message,
        field=error.field or "",
        retryable=error.retryable if retryable is None else retryable,
    )


def refused(error: CoveyError) -> Refused:
    """No room: nothing was started."""
    return Refused(code=error.code, message=error.message, retry_after_ms=error.retry_after_ms or 0)


def answer_at_once(seq: Sequence, worker: WorkerId, now: float) -> None:
    """End a request that never ran: cancelled before it was taken, or resumed when its tokens were a whole answer."""
    seq.outbox.put(Accepted(worker=worker))
    if not seq.has_ended:
        seq.outbox.put(cancelled(seq, now))
        return
    if not seq.text.is_stopped:
        seq.text.finish()
    text, text_offset = seq.text.take()
    if text:
        attempt, offset = seq.request.attempt, seq.generated
        seq.outbox.put(Tokens(attempt=attempt, offset=offset, ids=(), text=text, text_offset=text_offset))
    seq.outbox.put(finished(seq, now))
