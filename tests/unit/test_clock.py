"""The live clock is the event loop's clock, and the virtual one stands in for it."""

from __future__ import annotations

import asyncio

import anyio
import pytest

from covey.clock import Clock, MonotonicClock
from covey.testing import VirtualClock, virtual_time


def read_both(clock: Clock) -> tuple[float, float]:
    return clock.now(), clock.wall()


async def test_monotonic_clock_agrees_with_the_loop() -> None:
    loop = asyncio.get_running_loop()
    before = loop.time()
    now, wall = read_both(MonotonicClock())
    assert before <= now <= loop.time()
    assert wall > 1.6e9


def test_virtual_clock_moves_only_by_hand(clock: VirtualClock) -> None:
    start, wall = read_both(clock)
    assert clock.advance(2.5) == start + 2.5
    assert read_both(clock) == (start + 2.5, wall + 2.5)
    with pytest.raises(ValueError, match="backwards"):
        clock.advance(-1)


def test_wall_jumps_leave_monotonic_time_alone(clock: VirtualClock) -> None:
    now, wall = read_both(clock)
    clock.jump_wall(-3600)
    assert read_both(clock) == (now, wall - 3600)


@virtual_time
async def test_virtual_clock_follows_its_loop() -> None:
    clock = VirtualClock()
    start = clock.now()
    await anyio.sleep(7)
    assert clock.now() == pytest.approx(start + 7)
    assert clock.now() == anyio.current_time()
