"""One sequence over however many workers it takes: placed, watched, handed over, resumed (design §5)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

import anyio

from covey.clock import Clock
from covey.codec.methods import Decode, Prefill
from covey.errors import (
    CoveyError,
    DataCorrupt,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    Miss,
    Overloaded,
    Unavailable,
)
from covey.net.rpc import Channels
from covey.retry import RetryBudget
from covey.types.generate import (
    CancelRequest,
    Finished,
    GenerateRequest,
    Handover,
    HandoverTicket,
    Role,
    Timings,
    Tokens,
    Usage,
)
from covey.types.program import Delta

from .config import DispatchSettings
from .errands import Errands
from .fleet import Fleet, Incarnation, Placement, Target
from .follow import BrokenOff, Silent, follow
from .job import Job, add_timings
from .metrics import Metrics
from .pipe import ClientTooSlow
from .relay import BrokenStream, Relay

ROOM_WAIT_S = 0.1
"""Between looks for room when no worker said how long it will take."""
LOOK_S = 1.0
"""How often a stream looks whether its worker could be replaced."""
LONE_GAPS = 5
"""A worker that nobody could replace may be silent for so many gaps: a frozen one may thaw."""

_TRANSIENT = (Unavailable, Internal, DataCorrupt, FailedPrecondition, Miss)
"""What says something of a worker or of blocks, not of the request: another worker may do better."""
_STALE_TICKET = (DataCorrupt, FailedPrecondition, Miss)
RELEASE_TIMEOUT_S = 2.0
AVOID_S = 5.0
"""How long a sequence stays away from a worker that it lost."""


@dataclass(slots=True, kw_only=True)
class Sequence:
    """One sequence under way. `request` is what a fresh worker would get; placement fills in the rest."""

    job: Job
    request: GenerateRequest
    tokenizer_hash: str
    relay: Relay
    on_delta: Callable[[Delta], Awaitable[None]]
    on_accepted: Callable[[], None]
    ticket: HandoverTicket | None = None
    source: Target | None = None
    """The prefill worker that keeps the leases of `ticket` until it hears that nobody needs them."""
    usage: Usage | None = None
    timings: Timings = field(default_factory=Timings)
    blocks_moved: int = 0
    split: bool = False
    migrations: int = 0
    accepted: bool = False
    avoid: dict[Incarnation, float] = field(default_factory=dict)
    refusal: Overloaded | None = None


class Dispatcher:
    """Takes sequences to their one end. Shared by all requests of this gateway."""

    def __init__(
        self,
        channels: Channels,
        fleet: Fleet,
        clock: Clock,
        metrics: Metrics,
        settings: DispatchSettings,
        errands: Errands,
        *,
        waiting_max: int,
        retries_burst: int,
    ) -> None:
        self._channels = channels
        self._fleet = fleet
        self._clock = clock
        self._metrics = metrics
        self._settings = settings
        self._errands = errands
        self._waiting_max = waiting_max
        self._waiting = 0
        # Losing a worker takes all of its streams at once: the burst must cover what can run.
        self._budget = RetryBudget(burst=float(retries_burst))

    async def run(self, seq: Sequence) -> tuple[Finished, Target]:
        """Generate one sequence; each of its tokens reaches `seq.on_delta` once.

        Raises:
            Overloaded: no worker had room in time.
            Unavailable: no worker is there, or too many were lost.
            ClientTooSlow: `on_delta` could not pass a delta on.
            DeadlineExceeded: the request's time ran out.
            CoveyError: what a worker refused for good.
        """
        self._budget.record_request()
        try:
            return await self._run(seq)
        finally:
            self._let_go(seq)

    async def _run(self, seq: Sequence) -> tuple[Finished, Target]:
        give_up_at = min(self._clock.now() + self._settings.queue_wait_s, seq.job.deadline_at)
        while True:
            placement = self._place(seq)
            if placement is None:
                await self._wait_for_room(seq, give_up_at)
                continue
            try:
                return await self._attempt(seq, placement)
            except _Refusal as refusal:
                pause_s = max((refusal.error.retry_after_ms or 0) / 1000, ROOM_WAIT_S)
                seq.avoid[refusal.target.incarnation] = self._clock.now() + pause_s
                seq.refusal = refusal.error
            except _Loss as loss:
                self._survive(seq, loss)
                give_up_at = min(self._clock.now() + self._settings.queue_wait_s, seq.job.deadline_at)

    def _place(self, seq: Sequence) -> Placement | None:
        now = self._clock.now()
        if now >= seq.job.deadline_at:
            raise DeadlineExceeded("the request's time ran out")
        placement = self._fleet.place(
            model=seq.request.model,
            tokenizer_hash=seq.tokenizer_hash,
            tenant=seq.job.tenant,
            token_ids=seq.request.token_ids,
            avoid={worker for worker, until in seq.avoid.items() if until > now},
            sticky=seq.job.sticky,
            decode_only=seq.ticket is not None or seq.relay.tokens > 0,
        )
        there = placement is not None or seq.migrations or seq.refusal
        if not there and not self._fleet.engines(seq.request.model, Role.DECODE, seq.tokenizer_hash):
            raise Unavailable(f"no worker serves {seq.request.model!r} now", field="model", retry_after_ms=2000)
        return placement

    async def _wait_for_room(self, seq: Sequence, give_up_at: float) -> None:
        """Stand in the gateway's own queue: workers have none that is hidden."""
        refusal = seq.refusal or Unavailable("the workers were lost and no other took over", retry_after_ms=2000)
        now = self._clock.now()
        if self._waiting >= self._waiting_max or now + ROOM_WAIT_S > give_up_at:
            raise refusal
        wake_at = min((until for until in seq.avoid.values() if until > now), default=now + ROOM_WAIT_S)
        self._waiting += 1
        try:
            await anyio.sleep(min(max(wake_at - now, 0.005), ROOM_WAIT_S))
        finally:
            self._waiting -= 1

    async def _attempt(self, seq: Sequence, placement: Placement) -> tuple[Finished, Target]:
        """Prefill and hand over, where the placement says so, then decode."""
        if placement.prefill is not None:
            end = await self._leg(seq, placement.prefill)
            if isinstance(end, Finished):
                return end, placement.prefill
            self._take_over(seq, end, placement.prefill)
        end = await self._leg(seq, placement.decode)
        if isinstance(end, Handover):
            raise _Loss(placement.decode, BrokenStream("a decode worker handed over"))
        return end, placement.decode

    async def _leg(self, seq: Sequence, target: Target) -> Finished | Handover:
        """One worker's part. Raises `_Refusal`, `_Loss`, or what is wrong with the request itself."""
        method = Prefill.GENERATE if target.role is Role.PREFILL else Decode.GENERATE
        began = self._clock.now()

        def accepted() -> None:
            if not seq.accepted:
                seq.accepted = True
                waited_s = self._clock.now() - began
                seq.timings = add_timings(seq.timings, Timings(queue_s=waited_s))
                seq.on_accepted()

        async def tokens(event: Tokens) -> None:
            if target.role is Role.DECODE:
                self._let_go(seq)  # it has the blocks
            delta = seq.relay.accept(event)
            if delta is not None:
                await seq.on_delta(delta)

        try:
            with self._fleet.using(target):
                end = await follow(
                    self._channels.to(target.address),
                    method,
                    self._request(seq, target),
                    gap_s=self._patience(seq, target),
                    on_accepted=accepted,
                    on_tokens=tokens,
                )
        except ClientTooSlow:
            raise
        except Overloaded as error:
            raise _Refusal(target, error) from error
        except _TRANSIENT as error:
            raise _Loss(target, error) from error
        self._account(seq, target, end)
        return end

    def _patience(self, seq: Sequence, target: Target) -> Callable[[], float]:
        """How long `target` may be silent: as configured, or longer while nobody could take over from it."""
        looked_at, gap_s = float("-inf"), 0.0

        def ask() -> float:
            nonlocal looked_at, gap_s
            now = self._clock.now()
            if now - looked_at >= LOOK_S:
                looked_at = now
                others = self._fleet.engines(seq.request.model, Role.DECODE, seq.tokenizer_hash)
                is_alone = all(view.record.worker == target.worker for view, _ in others)
                gap_s = self._settings.event_gap_s * (LONE_GAPS if is_alone else 1)
            return gap_s

        return ask

    def _request(self, seq: Sequence, target: Target) -> GenerateRequest:
        scope = self._fleet.scope(target.info, seq.job.tenant)
        ticket = seq.ticket if target.role is Role.DECODE else None
        if ticket is not None and ticket.scopes[0].namespace != scope.namespace:
            ticket = None  # another kind of blocks: this worker computes the prompt itself
        has_all = ticket is not None and len(ticket.emitted) == seq.relay.tokens
        return replace(
            seq.request,
            attempt=seq.relay.attempt,
            scopes=(scope,),
            deadline_s=max(0.001, seq.job.deadline_at - self._clock.now()),
            resume=None if has_all else seq.relay.resume(),
            ticket=ticket,
        )

    def _take_over(self, seq: Sequence, handover: Handover, source: Target) -> None:
        self._let_go(seq)  # of an earlier hand-over that came to nothing
        seq.ticket = handover.ticket
        seq.source = source
        seq.split = True

    def _let_go(self, seq: Sequence) -> None:
        """End the leases of a hand-over that nobody needs any more, in the background; unsaid, they end by time."""
        source, seq.source = seq.source, None
        if source is not None:
            request = CancelRequest(request_id=seq.request.request_id)
            self._errands.run(
                lambda: self._channels.to(source.address).call(Prefill.CANCEL, request, timeout_s=RELEASE_TIMEOUT_S),
                "release of a hand-over",
            )

    def _account(self, seq: Sequence, target: Target, end: Finished | Handover) -> None:
        seq.timings = add_timings(seq.timings, end.timings)
        seq.blocks_moved += end.usage.blocks_moved
        if seq.usage is None:  # the first leg is the one that looked for the prompt's prefix
            seq.usage = end.usage
        self._fleet.observe(end.usage, end.timings)
        self._fleet.remember(target, seq.job.tenant, seq.request.token_ids)

    def _survive(self, seq: Sequence, loss: _Loss) -> None:
        """Prepare for another worker, or raise when enough were lost."""
        reason = _reason(loss.error)
        if isinstance(loss.error, Unavailable):
            self._fleet.lost(loss.target)
        if isinstance(loss.error, _STALE_TICKET):
            seq.ticket = None
        seq.migrations += 1
        seq.relay.attempt += 1
        seq.avoid[loss.target.incarnation] = self._clock.now() + AVOID_S
        if seq.migrations > self._settings.migrations_max or not self._budget.retry():
            raise Unavailable(
                "the workers of this request were lost and it was given up", retry_after_ms=1000
            ) from loss.error
        self._metrics.migrations.labels(reason).inc()


class _Refusal(Exception):
    def __init__(self, target: Target, error: Overloaded) -> None:
        super().__init__(str(error))
        self.target = target
        self.error = error


class _Loss(Exception):
    def __init__(self, target: Target, error: CoveyError) -> None:
        super().__init__(str(error))
        self.target = target
        self.error = error


def _reason(error: CoveyError) -> str:
    match error:
        case Silent():
            return "silent"
        case BrokenStream():
            return "broken"
        case BrokenOff():
            return "failed"
        case Unavailable():
            return "gone"
        case _:
            return "blocks" if isinstance(error, _STALE_TICKET) else "failed"
