"""Failpoints do nothing unless armed, and then exactly what the spec says, where it says."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import anyio
import pytest

from covey import failpoint
from covey.errors import InvalidArgument, Unavailable
from covey.failpoint import Action, Fault
from covey.testing import virtual_time


def test_a_spec_is_read() -> None:
    assert failpoint.parse("decode.after_step=crash@7; kv.commit=sleep(0.5);a=error%0.25;b=stop;") == (
        Fault(point="decode.after_step", action=Action.CRASH, nth=7),
        Fault(point="kv.commit", action=Action.SLEEP, seconds=0.5),
        Fault(point="a", action=Action.ERROR, chance=0.25),
        Fault(point="b", action=Action.STOP),
    )
    assert failpoint.parse("") == ()


@pytest.mark.parametrize(
    "wrong", ["a", "a=", "a=explode", "a=sleep", "a=crash(3)", "a=crash@0", "A=crash", "a=error%2", "a=error@1%0.5"]
)
def test_a_wrong_spec_is_refused_by_name(wrong: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        failpoint.arm(f"ok=crash;{wrong}")
    assert wrong in str(caught.value)
    failpoint.hit("ok")  # nothing was armed


async def test_points_are_harmless_until_armed() -> None:
    failpoint.hit("a")
    await failpoint.hit_async("a")
    failpoint.arm("a=error")
    failpoint.hit("another")
    with pytest.raises(Unavailable):
        failpoint.hit("a")
    failpoint.disarm()
    failpoint.hit("a")


async def test_only_the_nth_hit_fails() -> None:
    armed = failpoint.arm("a=error@3")
    failpoint.hit("a")
    await failpoint.hit_async("a")
    with pytest.raises(Unavailable, match="failpoint a"):
        await failpoint.hit_async("a")
    failpoint.hit("a")
    assert armed.counts == {"a": 4}


def test_one_point_may_have_several_faults() -> None:
    failpoint.arm("a=error@1;a=error@3")
    strikes = []
    for n in range(1, 5):
        try:
            failpoint.hit("a")
        except Unavailable:
            strikes.append(n)
    assert strikes == [1, 3]


def test_chances_repeat_with_their_seed() -> None:
    def history(seed: int) -> list[bool]:
        armed = failpoint.arm("a=error%0.3", seed=seed)
        return [armed.due("a") is not None for _ in range(500)]

    assert history(1) == history(1)
    assert history(1) != history(2)
    assert 100 < sum(history(1)) < 200


@virtual_time
async def test_an_async_sleep_holds_up_only_its_task() -> None:
    failpoint.arm("a=sleep(30)")
    done: list[str] = []

    async def other() -> None:
        await anyio.sleep(10)
        done.append("other")

    async with anyio.create_task_group() as tg:
        tg.start_soon(other)
        await failpoint.hit_async("a")
        done.append("held up")
    assert done == ["other", "held up"]
    assert anyio.current_time() == 30


def test_a_sync_sleep_blocks_its_thread() -> None:
    failpoint.arm("a=sleep(0.05)")
    started = time.perf_counter()
    failpoint.hit("a")
    assert time.perf_counter() - started >= 0.05


def child(action: str) -> subprocess.Popen[bytes]:
    code = f"""
from covey import failpoint
failpoint.arm("a={action}@2")
try:
    failpoint.hit("a")
    print("once", flush=True)
    failpoint.hit("a")
    print("after", flush=True)
finally:
    print("finally", flush=True)
"""
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)


def test_a_crash_runs_no_cleanup() -> None:
    with child("crash") as process:
        out, _ = process.communicate(timeout=30)
    assert (process.returncode, out) == (failpoint.CRASH_EXIT_CODE, b"once\n")


def test_stop_freezes_the_process_until_continued() -> None:
    with child("stop") as process:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        assert os.WSTOPSIG(status) == signal.SIGSTOP
        os.kill(process.pid, signal.SIGCONT)
        out, _ = process.communicate(timeout=30)
    assert out == b"once\nafter\nfinally\n"
