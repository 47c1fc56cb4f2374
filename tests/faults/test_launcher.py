"""kill -9 of `covey up` leaves no child, port or shared-memory segment that the next start does not clear."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from covey.testing import assert_eventually
from tests.support.meshes import LEAN
from tests.support.tiny_llama import write_tiny_llama

pytestmark = [pytest.mark.faults, pytest.mark.timeout(180)]

SHARED = Path("/dev/shm")


class Launcher:
    """A `covey up --json` of its own, with what it said about its endpoints."""

    def __init__(self, folder: Path) -> None:
        model = folder / "model"
        if not model.exists():
            write_tiny_llama(model)
        flags = ["--json", "--port", "0", "--run-dir", str(folder / "run"), "--model", f"tiny={model}"]
        flags += ["--set", *LEAN]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "covey", "up", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "COVEY_HOME": str(folder / "home")},
        )
        self.endpoints = self._endpoints()
        self.children = psutil.Process(self.process.pid).children(recursive=True)

    def _endpoints(self) -> dict[str, Any]:
        said = []
        assert self.process.stdout is not None
        for line in self.process.stdout:
            said.append(line)
            if line.startswith("{") and "endpoints" in json.loads(line):
                endpoints: dict[str, Any] = json.loads(line)["endpoints"]
                return endpoints
        raise AssertionError(f"covey up ended before it was up:\n{''.join(said)}")

    def chat(self) -> httpx.Response:
        key = Path(self.endpoints["api_key_file"]).read_text()
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
        headers = {"Authorization": f"Bearer {key}"}
        url = f"{self.endpoints['http']}/v1/chat/completions"
        return httpx.post(url, json=body, headers=headers, timeout=60, trust_env=False)

    def end(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        return self.wait()

    def kill(self) -> int:
        self.process.kill()
        return self.wait()

    def wait(self) -> int:
        code = self.process.wait(60)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    before = set(SHARED.glob("covey*"))
    yield tmp_path
    assert set(SHARED.glob("covey*")) <= before, "shared memory was left behind"


async def test_a_killed_launcher_leaves_nothing_that_the_next_start_does_not_clear(folder: Path) -> None:
    first = Launcher(folder)
    assert len(first.children) >= 7
    assert first.chat().status_code == httpx.codes.OK
    first.kill()
    await assert_eventually(lambda: not any(_alive(child) for child in first.children), timeout_s=30)
    second = Launcher(folder)
    try:
        assert second.chat().status_code == httpx.codes.OK
    finally:
        assert second.end() == 0
    assert not any(_alive(child) for child in second.children)


async def test_ctrl_c_drains_and_exits_well(folder: Path) -> None:
    launcher = Launcher(folder)
    assert launcher.end() == 0
    assert not any(_alive(child) for child in launcher.children)
    assert not (folder / "run" / "endpoints.json").exists()


def _alive(child: psutil.Process) -> bool:
    return bool(child.is_running() and child.status() != psutil.STATUS_ZOMBIE)
