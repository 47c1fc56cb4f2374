"""A child process: ready by its own word, its log shown when it ends early, killed when it says nothing."""

from __future__ import annotations

import signal
from pathlib import Path

import anyio
import psutil
import pytest

from covey.cli.child import LOG_TAIL_LINES, Child, ChildSpec
from covey.errors import DeadlineExceeded, Unavailable
from covey.testing import assert_eventually

PRELUDE = """
import argparse, json, os, signal, sys, time
parser = argparse.ArgumentParser()
parser.add_argument("--ready-fd", type=int)
parser.add_argument("--die-with-parent", action="store_true")
flags = parser.parse_args()
def ready(**said):
    os.write(flags.ready_fd, json.dumps(said).encode() + b"\\n")
"""
SERVING = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\nready(grpc='127.0.0.1:1', pid=str(os.getpid()))\n"
START_S = 20.0


def spec_of(folder: Path, body: str) -> ChildSpec:
    (folder / "fakeservice.py").write_text(PRELUDE + body)
    return ChildSpec(name="fake-0", module="fakeservice", environment={"PYTHONPATH": str(folder)})


def descriptors() -> int:
    return int(psutil.Process().num_fds())


async def test_addresses_are_what_it_said(tmp_path: Path) -> None:
    child = await Child.start(spec_of(tmp_path, SERVING + "time.sleep(60)"), tmp_path / "fake.log", timeout_s=START_S)
    assert child.addresses == {"grpc": "127.0.0.1:1", "pid": str(child.pid)}
    assert child.running
    assert await child.stop(grace_s=10.0) == 0
    assert not child.running


async def test_a_line_in_pieces_is_one_line(tmp_path: Path) -> None:
    body = """
os.write(flags.ready_fd, b'{"grpc": ')
time.sleep(0.05)
os.write(flags.ready_fd, b'"here"}\\n')
time.sleep(60)
"""
    child = await Child.start(spec_of(tmp_path, body), tmp_path / "fake.log", timeout_s=START_S)
    assert child.addresses == {"grpc": "here"}
    assert await child.kill() == -signal.SIGKILL


async def test_an_early_end_shows_the_code_and_the_end_of_the_log(tmp_path: Path) -> None:
    body = "for i in range(40): print('line', i, file=sys.stderr)\nsys.exit(3)\n"
    with pytest.raises(Unavailable, match="fake-0 ended at start with exit code 3") as caught:
        await Child.start(spec_of(tmp_path, body), tmp_path / "fake.log", timeout_s=START_S)
    lines = caught.value.message.splitlines()
    assert lines[-1] == "line 39"
    assert len(lines) == 1 + LOG_TAIL_LINES


async def test_silence_is_killed_and_names_the_log(tmp_path: Path) -> None:
    body = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)\n"
    log = tmp_path / "fake.log"
    spec = spec_of(tmp_path, body)
    with pytest.raises(DeadlineExceeded, match=rf"fake-0 was not ready within 2 s; its log: {log}"):
        await Child.start(spec, log, timeout_s=2.0)
    pid = int((tmp_path / "pid").read_text())
    assert not psutil.pid_exists(pid)


async def test_a_cancelled_start_leaves_no_process_and_no_descriptor(tmp_path: Path) -> None:
    body = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)\n"
    spec, before = spec_of(tmp_path, body), descriptors()
    async with anyio.create_task_group() as tasks:

        async def start() -> None:
            await Child.start(spec, tmp_path / "fake.log", timeout_s=START_S)

        tasks.start_soon(start)
        await assert_eventually(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "")
        tasks.cancel_scope.cancel()
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))
    await assert_eventually(lambda: descriptors() <= before)


async def test_what_does_not_drain_in_time_is_killed(tmp_path: Path) -> None:
    body = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nready(grpc='x')\ntime.sleep(60)\n"
    child = await Child.start(spec_of(tmp_path, body), tmp_path / "fake.log", timeout_s=START_S)
    assert await child.stop(grace_s=0.2) == -signal.SIGKILL


async def test_the_working_directory_is_not_imported_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec_of(tmp_path, SERVING)
    monkeypatch.chdir(tmp_path)
    spec = ChildSpec(name="fake-0", module="fakeservice")
    with pytest.raises(Unavailable, match="No module named fakeservice"):
        await Child.start(spec, tmp_path / "fake.log", timeout_s=START_S)
