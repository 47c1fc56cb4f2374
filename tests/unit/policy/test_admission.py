"""Admission: bounds, deadlines, fairness between tenants, conservation under random operations."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from covey.errors import AlreadyExists, DeadlineExceeded, Overloaded, QuotaExceeded
from covey.policy.admission import Admission, AdmissionConfig
from covey.types.ids import RequestId, TenantId

A, B = TenantId("a"), TenantId("b")


def submit(
    admission: Admission, name: str, tenant: TenantId = A, *, weight: float = 1.0, deadline_at: float = 1e9
) -> None:
    admission.submit(RequestId(name), tenant=tenant, deadline_at=deadline_at, now=0.0, weight=weight)


def test_permits_bound_what_runs_and_the_queue_what_waits() -> None:
    admission = Admission(AdmissionConfig(permits=2, queue_max=1))
    for name in "xyz":
        submit(admission, name)
    with pytest.raises(Overloaded) as caught:
        submit(admission, "w")
    assert caught.value.retry_after_ms is not None
    assert caught.value.retry_after_ms >= 100
    assert admission.plan(0.0).started == ("x", "y")
    admission.release(RequestId("x"), 1.0)
    assert admission.plan(1.0).started == ("z",)


def test_late_requests_expire_and_past_deadlines_are_refused() -> None:
    admission = Admission(AdmissionConfig(permits=1))
    submit(admission, "x")
    submit(admission, "y", deadline_at=5.0)
    admission.plan(0.0)
    assert admission.next_expiry() == 5.0
    assert admission.plan(5.0).expired == ("y",)
    with pytest.raises(DeadlineExceeded):
        submit(admission, "z", deadline_at=0.0)


def test_an_id_is_used_once() -> None:
    admission = Admission(AdmissionConfig())
    submit(admission, "x")
    with pytest.raises(AlreadyExists):
        submit(admission, "x")


def test_a_flood_delays_itself_and_not_the_other_tenant() -> None:
    admission = Admission(AdmissionConfig(permits=1, queue_max=100))
    for i in range(20):
        submit(admission, f"a{i}", A)
    admission.plan(0.0)
    submit(admission, "b0", B)
    admission.release(RequestId("a0"), 1.0)
    order = []
    for _ in range(3):
        (started,) = admission.plan(1.0).started
        order.append(started)
        admission.release(started, 1.0)
    assert "b0" in order[:2]


def test_a_tenant_cannot_fill_the_queue_while_another_waits() -> None:
    admission = Admission(AdmissionConfig(permits=1, queue_max=9, tenant_share=0.5))
    submit(admission, "b", B)
    with pytest.raises(QuotaExceeded):
        for i in range(9):
            submit(admission, f"a{i}", A)
    assert admission.waiting == 6


def test_weights_share_the_turns() -> None:
    admission = Admission(AdmissionConfig(permits=1, queue_max=200, tenant_share=1.0))
    for i in range(60):
        submit(admission, f"a{i}", A, weight=3.0)
        submit(admission, f"b{i}", B, weight=1.0)
    first = []
    for _ in range(40):
        (started,) = admission.plan(0.0).started
        first.append(started[0])
        admission.release(started, 0.0)
    assert 28 <= first.count("a") <= 32


class Machine(RuleBasedStateMachine):
    """Every submitted request is started, expired or cancelled, once."""

    def __init__(self) -> None:
        super().__init__()
        self.admission = Admission(AdmissionConfig(permits=3, queue_max=4))
        self.now = 0.0
        self.waiting: dict[str, str] = {}
        self.running: set[str] = set()
        self.count = 0

    @rule(tenant=st.sampled_from("abc"), ttl=st.floats(0.1, 5), weight=st.floats(0.1, 4))
    def submit(self, tenant: str, ttl: float, weight: float) -> None:
        self.count += 1
        name = f"r{self.count}"
        try:
            self.admission.submit(
                RequestId(name), tenant=TenantId(tenant), deadline_at=self.now + ttl, now=self.now, weight=weight
            )
        except Overloaded:
            return
        self.waiting[name] = tenant

    @rule(step=st.floats(0, 2))
    def plan(self, step: float) -> None:
        self.now += step
        turn = self.admission.plan(self.now)
        for name in turn.started + turn.expired:
            del self.waiting[name]
        self.running |= set(turn.started)
        assert not self.waiting or len(self.running) == 3  # work conserving

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.running)))
        self.running.remove(name)
        self.admission.release(RequestId(name), self.now)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.waiting)))
        self.admission.cancel(RequestId(name), TenantId(self.waiting.pop(name)))

    @invariant()
    def holds(self) -> None:
        self.admission.check()
        assert self.admission.running == len(self.running)
        assert self.admission.waiting == len(self.waiting)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=50, deadline=None)
