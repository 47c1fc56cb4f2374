"""Virtual time passes at once, stands still for threads, and finds deadlocks."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import anyio
import pytest
from anyio import to_thread
from blockbuster import BlockingError

from covey.config import CommonConfig, load
from covey.testing import Deadlock, assert_eventually, free_port, virtual_time

YEAR_S = 365 * 86_400.0


@virtual_time
async def test_a_year_passes_at_once() -> None:
    started = time.perf_counter()
    await anyio.sleep(YEAR_S)
    assert anyio.current_time() >= YEAR_S
    assert time.perf_counter() - started < 2


@virtual_time
async def test_timers_fire_in_order_and_timeouts_count_virtual_seconds() -> None:
    order: list[tuple[str, float]] = []

    async def note(name: str, delay_s: float) -> None:
        await anyio.sleep(delay_s)
        order.append((name, anyio.current_time()))

    async with anyio.create_task_group() as tg:
        tg.start_soon(note, "late", 30)
        tg.start_soon(note, "early", 10)
        with anyio.move_on_after(20) as scope:
            await anyio.sleep_forever()
        assert scope.cancelled_caught
        order.append(("timeout", anyio.current_time()))
    assert [name for name, _ in order] == ["early", "timeout", "late"]
    assert [at for _, at in order] == [10, 20, 30]


@virtual_time
async def test_tiny_sleeps_end_when_time_is_large() -> None:
    await anyio.sleep(1e15)
    assert 1e15 <= anyio.current_time() < 1e15 + 1
    with anyio.fail_after(1e3):
        for _ in range(10):
            await anyio.sleep(1e-3)  # far below the spacing of floats here


def test_a_deadlock_raises_instead_of_hanging() -> None:
    @virtual_time
    async def main() -> None:
        await anyio.Event().wait()

    with pytest.raises(Deadlock):
        main()


@virtual_time
async def test_time_stands_still_while_a_thread_computes() -> None:
    release = threading.Event()

    async with anyio.create_task_group() as tg:
        tg.start_soon(to_thread.run_sync, lambda: release.wait(0.2))
        with anyio.fail_after(5):  # a virtual timeout must not overtake real work
            assert await to_thread.run_sync(lambda: release.wait(0.05)) is False
        assert anyio.current_time() < 5
        release.set()


def test_arguments_results_and_errors_pass_through() -> None:
    @virtual_time
    async def add(a: int, *, b: int) -> int:
        await anyio.sleep(1)
        if b < 0:
            raise ValueError("negative")
        return a + b

    assert add(1, b=2) == 3
    with pytest.raises(ValueError, match="negative"):
        add(1, b=-2)


@virtual_time
async def test_assert_eventually_returns_what_it_waited_for() -> None:
    values = iter([0, 0, 7])
    assert await assert_eventually(lambda: next(values)) == 7

    async def slowly_true() -> str:
        await anyio.sleep(1)
        return "yes"

    assert await assert_eventually(slowly_true) == "yes"


@virtual_time
async def test_assert_eventually_names_the_predicate_and_its_last_value() -> None:
    never_there: list[int] = []
    with pytest.raises(AssertionError, match=r"within 3 s.*never_there.*last value: \[\]"):
        await assert_eventually(lambda: never_there, 3)
    assert anyio.current_time() == pytest.approx(3, abs=0.1)


async def test_free_port_can_be_bound() -> None:
    port = free_port()
    async with await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=port) as listener:
        assert listener.extra(anyio.abc.SocketAttribute.local_port) == port


async def test_blocking_the_loop_in_our_code_fails_a_test(tmp_path: Path) -> None:
    file = tmp_path / "covey.toml"
    file.write_text("[common]\n")
    with pytest.raises(BlockingError):
        load(CommonConfig, file=file)
