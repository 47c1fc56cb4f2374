"""Admission as tasks see it: wait for a permit, hold it, give it back on every exit."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import anyio

from covey.clock import Clock
from covey.errors import DeadlineExceeded, Overloaded
from covey.policy.admission import Admission
from covey.policy.rates import Rates
from covey.types.ids import RequestId, TenantId

from .metrics import Metrics


class Gate:
    """The one queue of this gateway."""

    def __init__(
        self,
        admission: Admission,
        clock: Clock,
        metrics: Metrics,
        *,
        wait_s: float,
        weights: Mapping[TenantId, float],
        rates: Rates,
    ) -> None:
        self._admission = admission
        self._clock = clock
        self._metrics = metrics
        self._wait_s = wait_s
        self._weights = weights
        self._rates = rates
        self._turns: dict[RequestId, anyio.Event] = {}

    @asynccontextmanager
    async def permit(
        self, request_id: RequestId, tenant: TenantId, *, deadline_at: float, cost: float = 1.0
    ) -> AsyncIterator[float]:
        """Hold a permit for a block; yields how many seconds it was waited for.

        Raises:
            QuotaExceeded: the tenant's limits per minute are used up, or it fills the queue.
            Overloaded: the queue is full, or no permit came in time.
            DeadlineExceeded: the request's own deadline came first.
        """
        began = self._clock.now()
        until = min(deadline_at, began + self._wait_s)
        self._rates.admit(tenant, began)
        self._admission.submit(
            request_id,
            tenant=tenant,
            deadline_at=until,
            now=began,
            weight=self._weights.get(tenant, 1.0),
            cost=cost,
        )
        turn = self._turns[request_id] = anyio.Event()
        try:
            self._take_turns()
            with anyio.move_on_after(until - began):
                await turn.wait()
            if not turn.is_set():
                self._refuse(deadline_at)
            yield self._clock.now() - began
        finally:
            del self._turns[request_id]
            self._admission.cancel(request_id, tenant)
            self._admission.release(request_id, self._clock.now())
            self._take_turns()

    def spend(self, tenant: TenantId, tokens: int) -> None:
        """Count the tokens of a finished request against the tenant's limit."""
        self._rates.spend(tenant, tokens, self._clock.now())

    def _take_turns(self) -> None:
        for request_id in self._admission.plan(self._clock.now()).started:
            self._turns[request_id].set()
        self._metrics.running.set(self._admission.running)
        self._metrics.waiting.set(self._admission.waiting)

    def _refuse(self, deadline_at: float) -> None:
        if deadline_at <= self._clock.now():
            raise DeadlineExceeded("the deadline passed while the request waited for its turn")
        raise Overloaded("no capacity came free in time", retry_after_ms=self._admission.retry_after_ms())
