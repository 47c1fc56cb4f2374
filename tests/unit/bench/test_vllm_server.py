"""The peer's server is started with equal means, waited for, and ended with its workers; a stand-in plays its part."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

import pytest

from benchmarks.vllm_server import Vllm
from covey.clock import MonotonicClock
from covey.errors import DeadlineExceeded, Unavailable
from covey.testing import assert_eventually

STAND_IN = """#!{python}
import http.server, os, signal, sys
if os.fork() == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    {worker}
    os._exit(0)
class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Healthy).serve_forever()
"""


STUBBORN = "signal.pause()"
TIDY = """parent = os.getppid()
    while os.getppid() == parent: signal.sigtimedwait([signal.SIGUSR1], 0.02)
    signal.sigtimedwait([signal.SIGUSR1], 0.3)
    open("tidied", "w").close()"""


def vllm(folder: Path, script: str, mode: str = "eager", worker: str = STUBBORN) -> Vllm:
    python = folder / "python"
    python.write_text(script.format(python=sys.executable, worker=worker))
    python.chmod(0o755)
    log = folder / "vllm.log"
    return Vllm(python=python, folder=folder / "model", model="m", log=log, clock=MonotonicClock(), mode=mode)


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


async def test_workers_have_time_to_tidy_up(tmp_path: Path) -> None:
    async with vllm(tmp_path, STAND_IN, worker=TIDY).serving() as serving:
        pass
    assert is_gone(serving.pids["worker_0"])
    assert (tmp_path / "tidied").exists()


async def test_it_is_ready_measured_and_ended_with_its_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.vllm_server.GRACE_S", 0.3)
    async with vllm(tmp_path, STAND_IN).serving() as serving:
        assert serving.ready_s > 0
        assert set(serving.pids) == {"server", "worker_0"}
        sizes = serving.memory_bytes()
        assert sizes["total"] == sizes["server"] + sizes["worker_0"] > 2**20
    for pid in serving.pids.values():
        await assert_eventually(partial(is_gone, pid))


async def test_it_is_ended_when_the_measurement_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.vllm_server.GRACE_S", 0.3)
    pids: list[int] = []
    with pytest.raises(RuntimeError, match="mid-way"):
        async with vllm(tmp_path, STAND_IN).serving() as serving:
            pids.extend(serving.pids.values())
            raise RuntimeError("mid-way")
    for pid in pids:
        await assert_eventually(partial(is_gone, pid))


async def test_a_server_that_ends_at_start_is_told_by_its_log(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="exit code 7:\nno such model"):
        async with vllm(tmp_path, "#!{python}\nprint('no such model')\nraise SystemExit(7)\n").serving():
            pass


async def test_a_server_that_is_never_ready_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.vllm_server.READY_LIMIT_S", {"eager": 0.3})
    with pytest.raises(DeadlineExceeded, match="not ready"):
        async with vllm(tmp_path, "#!{python}\nimport signal\nsignal.pause()\n").serving():
            pass


def test_it_gets_the_same_precision_and_all_of_our_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", "/ours")
    eager, compiled = vllm(tmp_path, STAND_IN), vllm(tmp_path, STAND_IN, "compiled")
    environment = eager.environment()
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == ",".join(map(str, sorted(os.sched_getaffinity(0))))
    assert not {"OMP_NUM_THREADS", "PYTHONPATH"} & set(environment)
    command = eager.command(1234)
    assert command[command.index("--dtype") + 1] == "float32"
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert "--enable-prefix-caching" in command
    assert set(command) - set(compiled.command(1234)) == {"--enforce-eager"}
