"""How commands find a mesh: its endpoints, and clear words when it is not there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from covey.cli.state import http_client, ready_home, write_endpoints
from covey.client.endpoints import ENDPOINTS, Endpoints, running_mesh
from covey.errors import Unavailable


def endpoints_of(folder: Path, pid: int) -> Endpoints:
    key = folder / "api.key"
    key.write_text("ck-secret\n")
    return Endpoints(
        pid=pid,
        http="http://127.0.0.1:8000",
        grpc="127.0.0.1:1",
        flow="127.0.0.1:2",
        api_key_file=str(key),
        models=["smollm2"],
    )


def test_what_is_written_is_read_and_private(tmp_path: Path) -> None:
    written = endpoints_of(tmp_path, os.getpid())
    write_endpoints(tmp_path, written)

    assert running_mesh(tmp_path) == written
    assert (tmp_path / ENDPOINTS).stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["api.key", ENDPOINTS]


def test_no_mesh_says_how_to_start_one(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"no mesh runs from .*: start one with `covey up`"):
        running_mesh(tmp_path)


def test_a_launcher_that_is_gone_is_named_by_its_pid(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    write_endpoints(tmp_path, endpoints_of(tmp_path, ended.pid))
    with pytest.raises(Unavailable, match=rf"is gone \(pid {ended.pid}\): start one with `covey up`"):
        running_mesh(tmp_path)


def test_home_is_where_the_environment_says_and_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COVEY_HOME", str(tmp_path / "deep" / "home"))
    assert ready_home() == tmp_path / "deep" / "home"
    assert ready_home().stat().st_mode & 0o777 == 0o700


async def test_the_http_client_carries_the_key(tmp_path: Path) -> None:
    async with http_client(endpoints_of(tmp_path, 1)) as client:
        assert client.headers["authorization"] == "Bearer ck-secret"
        assert str(client.base_url).rstrip("/") == "http://127.0.0.1:8000"
