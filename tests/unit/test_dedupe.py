"""The idempotency window: once done, always answered the same; never more than its capacity."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from covey.dedupe import DedupeWindow, Done, Fresh, InFlight
from covey.errors import AlreadyExists, Overloaded


def window(capacity: int = 4, ttl_s: float = 60) -> DedupeWindow[str]:
    return DedupeWindow(capacity=capacity, ttl_s=ttl_s)


def test_a_request_is_fresh_then_in_flight_then_done() -> None:
    seen = window()
    assert seen.begin("k", b"body", now=0) == Fresh()
    assert seen.begin("k", b"body", now=1) == InFlight(since=0)
    seen.finish("k", "answer", now=2)
    assert seen.begin("k", b"body", now=3) == Done("answer")


def test_a_result_may_be_none() -> None:
    seen: DedupeWindow[None] = DedupeWindow(capacity=1, ttl_s=1)
    seen.begin("k", b"", now=0)
    seen.finish("k", None, now=0)
    assert seen.begin("k", b"", now=0) == Done(None)


@pytest.mark.parametrize("finished", [False, True])
def test_a_key_cannot_be_reused_for_another_body(finished: bool) -> None:
    seen = window()
    seen.begin("k", b"body", now=0)
    if finished:
        seen.finish("k", "answer", now=0)
    with pytest.raises(AlreadyExists) as caught:
        seen.begin("k", b"other", now=1)
    assert caught.value.field == "idempotency_key"


def test_an_abandoned_request_can_be_tried_again() -> None:
    seen = window()
    seen.begin("k", b"body", now=0)
    seen.abandon("k")
    assert seen.begin("k", b"body", now=1) == Fresh()
    seen.finish("k", "answer", now=2)
    seen.abandon("k")
    assert seen.begin("k", b"body", now=3) == Done("answer"), "a result is not abandoned"


def test_results_age_out_and_work_in_flight_does_not() -> None:
    seen = window(ttl_s=10)
    seen.begin("done", b"", now=0)
    seen.begin("running", b"", now=0)
    seen.finish("done", "answer", now=5)
    assert seen.begin("done", b"", now=14.9) == Done("answer")
    assert seen.begin("done", b"", now=15) == Fresh()
    assert seen.begin("running", b"", now=1e9) == InFlight(since=0)


def test_the_oldest_result_makes_room() -> None:
    seen = window(capacity=2)
    for key in ("a", "b"):
        seen.begin(key, b"", now=0)
    seen.finish("b", "first", now=1)
    seen.begin("c", b"", now=2)
    assert seen.begin("a", b"", now=2) == InFlight(since=0)
    with pytest.raises(Overloaded):
        seen.begin("d", b"", now=2)


def test_finishing_what_is_not_in_flight_is_a_bug() -> None:
    with pytest.raises(KeyError):
        window().finish("k", "answer", now=0)


class WindowMachine(RuleBasedStateMachine):
    """Random requests: work runs again only after it was abandoned, aged out or made room for others."""

    keys = st.sampled_from("abcdef")

    def __init__(self) -> None:
        super().__init__()
        self.window = window(capacity=3, ttl_s=10)
        self.now = 0.0
        self.running: dict[str, float] = {}
        self.results: dict[str, tuple[str, float]] = {}
        self.count = 0

    @rule(key=keys)
    def begin(self, key: str) -> None:
        try:
            answer = self.window.begin(key, key.encode(), now=self.now)
        except Overloaded:
            assert len(self.running) == 3
            assert key not in self.running
            return
        match answer:
            case Fresh():
                assert key not in self.running
                room_needed = len(self.results) + len(self.running) >= 3
                assert key not in self.results or room_needed or self.now >= self.results[key][1] + 10
                self.running[key] = self.now
            case InFlight(since=since):
                assert self.running[key] == since
            case Done(result=result):
                assert self.results[key][0] == result
                assert self.now < self.results[key][1] + 10

    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        if self.running:
            key = data.draw(st.sampled_from(sorted(self.running)))
            del self.running[key]
            self.count += 1
            self.results[key] = (f"{key}{self.count}", self.now)
            self.window.finish(key, self.results[key][0], now=self.now)

    @rule(key=keys)
    def abandon(self, key: str) -> None:
        self.running.pop(key, None)
        self.window.abandon(key)

    @rule(seconds=st.floats(0, 6))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def holds_together(self) -> None:
        self.window.check()


WindowMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40)
TestWindowMachine = WindowMachine.TestCase
