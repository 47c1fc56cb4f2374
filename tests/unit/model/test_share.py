"""Engines on one host divide its cores while they are busy together, and only then."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey.errors import Overloaded
from covey.model.share import LINGER_S, STUCK_S, CoreShare, fair_cores, thread_environment
from covey.testing import VirtualClock

HOLD = """
import sys
from pathlib import Path
from covey.clock import MonotonicClock
from covey.model.share import CoreShare
share = CoreShare(Path(sys.argv[1]), clock=MonotonicClock(), cores=(0, 1))
share.begin(lambda n: None)
print("busy", flush=True); sys.stdin.readline()
"""


@pytest.fixture(autouse=True)
def _affinity() -> Iterator[None]:
    before = os.sched_getaffinity(0)
    yield
    os.sched_setaffinity(0, before)


@given(st.integers(1, 64), st.integers(1, 70))
def test_shares_are_fair(n_cores: int, busy: int) -> None:
    cores = tuple(range(100, 100 + n_cores))
    shares = [fair_cores(cores, rank, busy) for rank in range(busy)]
    sizes = [len(s) for s in shares]
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1
    taken = [c for s in shares for c in s]
    if busy <= n_cores:
        assert sorted(taken) == list(cores)
    else:
        counts = [taken.count(c) for c in cores]
        assert max(counts) - min(counts) <= 1


def test_alone_all_together_a_share_each(tmp_path: Path, clock: VirtualClock) -> None:
    threads: list[int] = []
    cores = tuple(sorted(os.sched_getaffinity(0)))[:2]
    one, two = (CoreShare(tmp_path / "engines.share", clock=clock, cores=cores) for _ in range(2))
    clock.advance(10.0)
    assert one.begin(threads.append) == cores
    if len(cores) == 2:
        assert two.begin(threads.append) == cores[1:]
        assert os.sched_getaffinity(0) == {cores[1]}
        one.end()
        two.end()
        assert one.begin(threads.append) == cores[:1], "the gap between two steps is no idleness"
        one.end()
        clock.advance(LINGER_S + 0.001)
        assert one.begin(threads.append) == cores
        assert os.sched_getaffinity(0) == set(cores)
        assert threads == [2, 1, 1, 2]
        clock.advance(STUCK_S + 0.001)
        assert two.begin(threads.append) == cores, "a stuck engine holds nothing back"
    one.close()
    two.close()


def test_a_killed_engine_counts_no_more(tmp_path: Path) -> None:
    from covey.clock import MonotonicClock

    path = tmp_path / "engines.share"
    mine = CoreShare(path, clock=MonotonicClock(), cores=(0, 1))
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdin is not None
    assert child.stdout.readline() == "busy\n"
    assert len(mine.begin(lambda _n: None)) == 1
    child.send_signal(signal.SIGKILL)
    child.wait(timeout=10)
    child.stdout.close()
    child.stdin.close()
    assert len(mine.begin(lambda _n: None)) == 2
    mine.close()


def test_seats_are_bounded_and_given_back(tmp_path: Path, clock: VirtualClock) -> None:
    seats = [CoreShare(tmp_path / "s", clock=clock) for _ in range(64)]
    with pytest.raises(Overloaded):
        CoreShare(tmp_path / "s", clock=clock)
    seats[13].close()
    CoreShare(tmp_path / "s", clock=clock).close()
    for i, seat in enumerate(seats):
        if i != 13:
            seat.close()


def test_waiting_is_passive() -> None:
    assert thread_environment()["OMP_WAIT_POLICY"] == "passive"
