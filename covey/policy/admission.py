"""Who may run now and who waits: permits, a bounded queue, deadlines, and fair turns for tenants by weight."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

from covey.errors import AlreadyExists, DeadlineExceeded, Overloaded, QuotaExceeded
from covey.types.ids import RequestId, TenantId


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionConfig:
    """`permits` run at once; `queue_max` wait, of which one tenant may hold `tenant_share` while others wait too."""

    permits: int = 256
    queue_max: int = 1024
    tenant_share: float = 0.5

    def __post_init__(self) -> None:
        if self.permits < 1 or self.queue_max < 0 or not 0 < self.tenant_share <= 1:
            raise ValueError("admission needs permits >= 1, queue_max >= 0 and 0 < tenant_share <= 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What `plan` decided: who starts, and whose deadline passed while waiting."""

    started: tuple[RequestId, ...] = ()
    expired: tuple[RequestId, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """A queued request. `start` is its virtual start time."""

    request_id: RequestId
    tenant: TenantId
    start: float
    deadline_at: float


@dataclass(slots=True)
class _Tenant:
    finish: float = 0.0
    queue: list[Waiting] = field(default_factory=list)


class Admission:
    """Start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996) over tenants, first come first served within one.

    The virtual time of a tenant moves by `cost / weight` with each of its requests; the smallest start goes first,
    so that a tenant that floods delays itself and not the others.
    """

    def __init__(self, config: AdmissionConfig) -> None:
        self._config = config
        self._tenants: dict[TenantId, _Tenant] = {}
        self._running: dict[RequestId, float] = {}
        self._virtual = 0.0
        self._waiting = 0
        self._service_s = 1.0

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return self._waiting

    def submit(
        self,
        request_id: RequestId,
        *,
        tenant: TenantId,
        deadline_at: float,
        now: float,
        weight: float = 1.0,
        cost: float = 1.0,
    ) -> None:
        """Queue a request; `plan` starts it.

        Raises:
            DeadlineExceeded: the deadline has passed.
            Overloaded: the queue is full (`QuotaExceeded` when this tenant fills more than its share).
            AlreadyExists: the id is queued or running.
        """
        if deadline_at <= now:
            raise DeadlineExceeded("the deadline has passed before the request began")
        state = self._tenants.setdefault(tenant, _Tenant())
        if request_id in self._running or any(w.request_id == request_id for w in state.queue):
            raise AlreadyExists(f"request {request_id} is already here")
        try:
            self._check_room(state, now)
        except Overloaded:
            self._forget_idle(tenant)
            raise
        start = max(self._virtual, state.finish)
        state.finish = start + cost / max(weight, 1e-6)
        state.queue.append(Waiting(request_id=request_id, tenant=tenant, start=start, deadline_at=deadline_at))
        self._waiting += 1

    def plan(self, now: float) -> Turn:
        """Expire what is too late, then start requests while there are permits."""
        expired = self._expire(now)
        started: list[RequestId] = []
        while self._waiting and len(self._running) < self._config.permits:
            head = min((t.queue[0] for t in self._tenants.values() if t.queue), key=lambda w: (w.start, w.tenant))
            self._tenants[head.tenant].queue.pop(0)
            self._waiting -= 1
            self._virtual = max(self._virtual, head.start)
            self._running[head.request_id] = now
            started.append(head.request_id)
            self._forget_idle(head.tenant)
        return Turn(started=tuple(started), expired=expired)

    def release(self, request_id: RequestId, now: float) -> None:
        """A running request ended, well or badly; unknown ids are ignored, so that release may come twice."""
        began = self._running.pop(request_id, None)
        if began is not None:
            self._service_s += 0.1 * (max(0.0, now - began) - self._service_s)

    def cancel(self, request_id: RequestId, tenant: TenantId) -> None:
        """Take a waiting request out of the queue; unknown ids are ignored."""
        state = self._tenants.get(tenant)
        if state is None:
            return
        kept = [w for w in state.queue if w.request_id != request_id]
        self._waiting -= len(state.queue) - len(kept)
        state.queue = kept
        self._forget_idle(tenant)

    def retry_after_ms(self) -> int:
        """When a permit is likely to be free for a newcomer: the queue times the mean service time, 0.1 to 30 s."""
        ahead_s = (self._waiting + 1) * self._service_s / self._config.permits
        return round(1000 * min(30.0, max(0.1, ahead_s)))

    def next_expiry(self) -> float | None:
        """When `plan` should run again even if nothing else happens."""
        return min((w.deadline_at for t in self._tenants.values() for w in t.queue), default=None)

    def check(self) -> None:
        """Invariants; raises AssertionError."""
        assert len(self._running) <= self._config.permits
        assert self._waiting == sum(len(t.queue) for t in self._tenants.values())
        assert self._waiting <= self._config.queue_max + self._config.permits
        queued = [w.request_id for t in self._tenants.values() for w in t.queue]
        assert len(set(queued)) == len(queued)
        assert not set(queued) & set(self._running)
        for tenant in self._tenants.values():
            assert all(a.start <= b.start for a, b in pairwise(tenant.queue))

    def _check_room(self, state: _Tenant, now: float) -> None:
        free = max(0, self._config.permits - len(self._running))
        room = self._config.queue_max + free
        if self._waiting >= room:
            raise Overloaded("too many requests are waiting; try again later", retry_after_ms=self.retry_after_ms())
        others = self._waiting - len(state.queue)
        if others and len(state.queue) >= max(1, self._config.tenant_share * room):
            raise QuotaExceeded("this tenant has too many requests waiting", retry_after_ms=self.retry_after_ms())

    def _expire(self, now: float) -> tuple[RequestId, ...]:
        late: list[RequestId] = []
        for tenant in list(self._tenants):
            state = self._tenants[tenant]
            gone = [w.request_id for w in state.queue if w.deadline_at <= now]
            if gone:
                late += gone
                state.queue = [w for w in state.queue if w.deadline_at > now]
                self._forget_idle(tenant)
        self._waiting -= len(late)
        return tuple(late)

    def _forget_idle(self, tenant: TenantId) -> None:
        """Drop a tenant that neither waits nor owes virtual time, so that the table is bounded by the queue."""
        state = self._tenants.get(tenant)
        if state is not None and not state.queue and state.finish <= self._virtual:
            del self._tenants[tenant]
