"""A stuck engine ends its process; a busy or an idle one does not."""

from __future__ import annotations

import threading

import pytest

from covey.clock import MonotonicClock
from covey.engine.board import Board
from covey.engine.watchdog import EXIT_CODE, watchdog


@pytest.mark.parametrize("what", ["busy_since", "seen_at"])
def test_a_stuck_step_or_loop_ends_the_process(what: str) -> None:
    board, clock, ended = Board(), MonotonicClock(), threading.Event()
    codes = []

    def end(code: int) -> None:
        codes.append(code)
        ended.set()

    setattr(board, what, clock.now())
    with watchdog(board, clock, stuck_s=0.1, end=end):
        assert ended.wait(5)
    assert codes == [EXIT_CODE]


def test_a_live_engine_is_left_alone() -> None:
    board, clock = Board(), MonotonicClock()
    codes: list[int] = []
    looked = threading.Event()

    class Looking(MonotonicClock):
        def now(self) -> float:
            looked.set()
            return super().now()

    with watchdog(board, Looking(), stuck_s=0.1, end=codes.append):
        for _ in range(5):
            looked.clear()
            board.busy_since = board.seen_at = clock.now()
            assert looked.wait(5)
    assert not codes
