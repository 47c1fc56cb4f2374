"""Work of others is told apart from the work of what is measured."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from benchmarks.neighbours import CpuTime, cpu_time, is_disturbed, others_cores
from covey.clock import MonotonicClock
from covey.testing import assert_eventually


@contextmanager
def busy_process() -> Iterator[int]:
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


def test_others_are_the_machine_less_what_is_measured() -> None:
    before = CpuTime(at_s=100.0, machine_s=50.0, measured_s=7.0)
    after = CpuTime(at_s=110.0, machine_s=68.0, measured_s=20.0)
    assert others_cores(before, after) == pytest.approx(0.5)
    alone = CpuTime(at_s=110.0, machine_s=62.9, measured_s=20.0)
    assert others_cores(before, alone) == 0.0


async def test_the_time_of_a_measured_process_counts_as_its_own() -> None:
    clock = MonotonicClock()
    with busy_process() as pid:
        before = cpu_time([pid], clock)
        await assert_eventually(lambda: cpu_time([pid], clock).measured_s > before.measured_s + 0.2, timeout_s=30.0)
        after = cpu_time([pid], clock)
    assert after.machine_s - before.machine_s >= 0.15
    assert cpu_time([pid], clock).measured_s < after.measured_s


def test_a_share_of_the_cores_is_a_disturbance() -> None:
    cores = len(os.sched_getaffinity(0))
    assert not is_disturbed(0.05 * cores)
    assert is_disturbed(0.5 * cores)
