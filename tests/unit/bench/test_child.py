"""A driver behind its lines: answers, errors, an end at any time, and a group that stands still between questions."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.child import ROOT, START, Child, driver_command, plain_environment
from covey.clock import MonotonicClock
from covey.errors import DeadlineExceeded, Unavailable

DRIVER = """
import os, signal, sys
from benchmarks.drivers.lines import private_output, serve
lines = private_output()
print("a library talks")
def fail(): raise KeyError("what was asked for")
serve("9.9", {"add": lambda a, b: a + b, "fail": fail, "hang": signal.pause, "die": lambda: os._exit(3)}, lines)
"""


@contextmanager
def driver(tmp_path: Path, code: str = DRIVER) -> Iterator[Child]:
    path = [sys.executable, "-S", "-P", "-c", "import sys; sys.path.append(sys.argv[1])\n" + code, str(ROOT)]
    child = Child(path, environment=plain_environment(), log=tmp_path / "log", clock=MonotonicClock())
    try:
        yield child
    finally:
        child.close()


def comes_to_stand(pid: int) -> bool:
    """Whether a process is stopped, now or within the moment that a signal takes."""
    clock = MonotonicClock()
    until = clock.now() + 5.0
    while clock.now() < until:
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T":
            return True
    return False


def test_it_answers_and_stands_still_in_between(tmp_path: Path) -> None:
    with driver(tmp_path) as child:
        assert child.until_ready(30.0) == "9.9"
        assert comes_to_stand(child.pid)
        assert child.ask("add", 10.0, a=2, b=3) == 5
        assert child.ask("add", 10.0, a="x", b="y") == "xy"
        assert comes_to_stand(child.pid)
    assert "a library talks" in child.tail()
    assert not Path(f"/proc/{child.pid}").exists()


def test_an_operation_that_fails_is_told_and_the_next_one_works(tmp_path: Path) -> None:
    with driver(tmp_path) as child:
        child.until_ready(30.0)
        with pytest.raises(Unavailable, match="fail failed: KeyError: 'what was asked for'"):
            child.ask("fail", 10.0)
        with pytest.raises(Unavailable, match="no such operation"):
            child.ask("fly", 10.0)
        assert child.ask("add", 10.0, a=1, b=1) == 2


def test_one_that_hangs_misses_its_deadline_and_is_ended(tmp_path: Path) -> None:
    with driver(tmp_path) as child:
        child.until_ready(30.0)
        with pytest.raises(DeadlineExceeded, match=r"no answer within 0\.2 s"):
            child.ask("hang", 0.2)
    assert not Path(f"/proc/{child.pid}").exists()


def test_one_that_dies_says_so_now_and_later(tmp_path: Path) -> None:
    with driver(tmp_path) as child:
        child.until_ready(30.0)
        with pytest.raises(Unavailable, match="ended without an answer"):
            child.ask("die", 10.0)
        with pytest.raises(Unavailable):
            child.ask("add", 10.0, a=1, b=1)


def test_one_that_never_loads_shows_its_last_words(tmp_path: Path) -> None:
    with driver(tmp_path, "raise SystemExit('no such model')") as child:
        with pytest.raises(Unavailable, match="no such model"):
            child.until_ready(30.0)


def test_a_program_that_is_not_there_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="cannot start"):
        Child([str(tmp_path / "nothing")], environment={}, log=tmp_path / "log", clock=MonotonicClock())


def test_a_driver_gets_neither_our_python_nor_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = plain_environment()
    assert not {"PYTHONPATH", "OMP_NUM_THREADS", "VIRTUAL_ENV"} & set(found)
    assert found["HF_HUB_OFFLINE"] == "1"
    assert found["PATH"] == os.environ["PATH"]


def test_a_module_runs_as_the_main_program_with_its_own_arguments() -> None:
    command = driver_command("python", "machine", "smollm2")
    assert command == ["python", "-P", "-c", START, str(ROOT), "benchmarks.drivers.machine", "smollm2"]
