"""The runtime as real processes: readiness, draining, exit codes, signals, parent death."""

from __future__ import annotations

import json
import os
import signal
import stat
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from anyio.abc import Process
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from covey.auth import MeshToken
from covey.clock import MonotonicClock
from covey.codec.methods import Decode
from covey.errors import Unauthenticated, Unavailable
from covey.net.nats import NatsBus
from covey.net.registry import Registry
from covey.net.rpc import Channel
from covey.runtime import EXIT_CONFIG, EXIT_CRASHED, EXIT_DEPENDENCY, EXIT_DRAINED
from covey.secretfile import write_secret
from covey.testing import assert_eventually
from covey.types.common import Empty
from covey.types.generate import EngineLoad, Role
from tests.support.nats import NatsServer, is_alive

SECRET = "the-mesh-token-of-this-test"
TOKEN = MeshToken(SECRET)
SERVICE = [sys.executable, "-m", "tests.unit.net.probe_service"]


@dataclass(frozen=True, slots=True)
class Running:
    process: Process
    said: dict[str, Any]
    log: Path

    @property
    def address(self) -> str:
        return str(self.said["grpc"])

    async def exit_code(self) -> int:
        with anyio.fail_after(20):
            return await self.process.wait()


def settings(server: NatsServer, run_dir: Path, *sets: str) -> list[str]:
    values = [f"nats={server.url}", f"nats_token_file={server.token_file}", f"run_dir={run_dir / 'run'}", *sets]
    return [word for value in values for word in ("--set", value)]


@asynccontextmanager
async def running(
    server: NatsServer, tmp_path: Path, *sets: str, env: dict[str, str] | None = None
) -> AsyncIterator[Running]:
    token_file = tmp_path / "mesh.token"
    if not token_file.exists():
        await anyio.to_thread.run_sync(write_secret, token_file, SECRET)
    read_fd, write_fd = os.pipe()
    log = tmp_path / "service.log"
    with log.open("wb") as output:
        process = await anyio.open_process(
            [
                *SERVICE,
                "--ready-fd",
                str(write_fd),
                *settings(server, tmp_path, f"mesh_token_file={token_file}", *sets),
            ],
            stderr=output,
            pass_fds=(write_fd,),
            env={**os.environ, **(env or {})},
        )
    os.close(write_fd)
    try:
        with os.fdopen(read_fd) as pipe, anyio.fail_after(30):
            line = await anyio.to_thread.run_sync(pipe.readline)
        assert line, log.read_text()
        yield Running(process, json.loads(line), log)
    finally:
        if process.returncode is None:
            process.kill()
        with anyio.CancelScope(shield=True):
            await process.aclose()


async def test_sigterm_drains_not_serving_first_then_work_in_flight_then_exit_0(tmp_path: Path) -> None:
    replies: list[EngineLoad] = []
    async with NatsServer(tmp_path) as server, running(server, tmp_path, "slow_s=1.0") as service:
        async with (
            NatsBus.open(server.url, token=server.token) as bus,
            Registry.open(bus, clock=MonotonicClock()) as registry,
            Channel.open(service.address, token=TOKEN) as channel,
            aio.insecure_channel(service.address) as raw,
        ):
            await registry.until(lambda r: r.workers(Role.DECODE), timeout_s=5)
            view = registry.workers(Role.DECODE)[0]
            assert (view.record.address, view.record.pid) == (service.address, service.process.pid)
            assert view.record.worker.startswith("decode-")
            watch = health_pb2_grpc.HealthStub(raw).Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING

            async def call() -> None:
                replies.append(await channel.call(Decode.LOAD, Empty(), timeout_s=10))

            async with anyio.create_task_group() as tg:
                tg.start_soon(call)
                await anyio.sleep(0.2)  # let the call reach the handler
                started = anyio.current_time()
                service.process.send_signal(signal.SIGTERM)
                assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
                assert anyio.current_time() - started < 0.5
                assert not registry.workers(), "the record is withdrawn before calls are refused"
                async with Channel.open(service.address, token=TOKEN) as late:
                    with pytest.raises(Unavailable):
                        await late.call(Decode.LOAD, Empty(), timeout_s=5)
            assert replies == [EngineLoad(running=1)]
        assert await service.exit_code() == EXIT_DRAINED
    events = [json.loads(line)["event"] for line in service.log.read_text().splitlines()]
    assert events[0] == "starting"
    assert events[-1] == "stopped"


async def test_metrics_token_and_run_dir(tmp_path: Path) -> None:
    async with NatsServer(tmp_path) as server, running(server, tmp_path, "slow_s=0") as service:
        async with httpx.AsyncClient() as client:
            reply = await client.get(f"http://{service.said['metrics']}/metrics")
        assert "process_resident_memory_bytes" in reply.text
        assert service.said["metrics"].startswith("127.0.0.1:")
        async with Channel.open(service.address) as channel:
            with pytest.raises(Unauthenticated):
                await channel.call(Decode.LOAD, Empty(), timeout_s=5)
        assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o700
        service.process.send_signal(signal.SIGINT)
        assert await service.exit_code() == EXIT_DRAINED
    assert SECRET not in service.log.read_text()


async def test_the_same_signal_twice_ends_it_at_once(tmp_path: Path) -> None:
    async with NatsServer(tmp_path) as server, running(server, tmp_path, "slow_s=60") as service:
        async with Channel.open(service.address, token=TOKEN) as channel, anyio.create_task_group() as tg:

            async def call() -> None:
                with pytest.raises(Unavailable):
                    await channel.call(Decode.LOAD, Empty(), timeout_s=30)

            tg.start_soon(call)
            await anyio.sleep(0.2)  # let the call reach the handler
            service.process.send_signal(signal.SIGTERM)
            await assert_eventually(lambda: "stopping" in service.log.read_text())
            service.process.send_signal(signal.SIGINT)  # what a launcher adds to a terminal's Ctrl-C
            await anyio.sleep(0.3)
            assert service.process.returncode is None
            service.process.send_signal(signal.SIGTERM)
            assert await service.exit_code() == EXIT_CRASHED


async def test_nats_killed_and_restarted_on_the_same_port_brings_the_worker_back(tmp_path: Path) -> None:
    async with NatsServer(tmp_path) as server, running(server, tmp_path, "slow_s=0") as service:
        await server.kill()
        async with Channel.open(service.address, token=TOKEN) as channel:
            assert await channel.call(Decode.LOAD, Empty(), timeout_s=5)
        await server.start()
        async with (
            NatsBus.open(server.url, token=server.token) as bus,
            Registry.open(bus, clock=MonotonicClock()) as registry,
        ):
            await registry.until(lambda r: r.workers(Role.DECODE), timeout_s=10)
            assert registry.workers()[0].record.pid == service.process.pid
        service.process.send_signal(signal.SIGTERM)
        assert await service.exit_code() == EXIT_DRAINED


@pytest.mark.parametrize("how", ["dependency", "crash", "crash late"])
async def test_exit_codes_of_failures(tmp_path: Path, how: str) -> None:
    async with NatsServer(tmp_path) as server:
        done = await anyio.run_process([*SERVICE, *settings(server, tmp_path, f"misbehave={how}")], check=False)
    assert done.returncode == (EXIT_DEPENDENCY if how == "dependency" else EXIT_CRASHED)
    last = json.loads(done.stderr.splitlines()[-1])
    assert last["event"] == ("a dependency is missing" if how == "dependency" else "crashed")


async def test_no_nats_is_a_missing_dependency(tmp_path: Path) -> None:
    sets = ["--set", "nats=nats://127.0.0.1:1", "--set", f"run_dir={tmp_path}"]
    done = await anyio.run_process([*SERVICE, *sets], check=False)
    assert done.returncode == EXIT_DEPENDENCY


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--set", "listne=x"], "listne"),
        (["--set", "slow_s=often"], "slow_s"),
        (["--config", "missing.toml"], "missing.toml"),
        (["--set", "mesh_token_file=nowhere.token"], "nowhere.token"),
    ],
)
async def test_bad_configuration_exits_2_and_says_what(tmp_path: Path, flags: list[str], said: str) -> None:
    done = await anyio.run_process([*SERVICE, "--set", f"run_dir={tmp_path}", *flags], check=False)
    assert done.returncode == EXIT_CONFIG
    assert said in done.stderr.decode()


async def test_check_and_print_config_start_nothing(tmp_path: Path) -> None:
    config = tmp_path / "covey.toml"
    config.write_text('[common]\nlog_level = "debug"\n[decode]\nslow_s = 2.0\n')
    env = {**os.environ, "COVEY_DECODE__LISTEN": "127.0.0.1:7003"}
    done = await anyio.run_process([*SERVICE, "--config", str(config), "--print-config"], env=env)
    text = done.stdout.decode()
    assert "slow_s = 2.0" in text
    assert "COVEY_DECODE__LISTEN" in text
    done = await anyio.run_process([*SERVICE, "--config", str(config), "--check"], env=env)
    assert done.returncode == EXIT_DRAINED
    bad = await anyio.run_process(
        [*SERVICE, "--check"], env={**env, "COVEY_FAILPOINTS": "not a failpoint"}, check=False
    )
    assert bad.returncode == EXIT_CONFIG


async def test_failpoints_are_armed_from_the_environment(tmp_path: Path) -> None:
    env = {"COVEY_FAILPOINTS": "probe.load=crash@2"}
    async with NatsServer(tmp_path) as server, running(server, tmp_path, "slow_s=0", env=env) as service:
        async with Channel.open(service.address, token=TOKEN) as channel:
            await channel.call(Decode.LOAD, Empty(), timeout_s=5)
            with pytest.raises(Unavailable):
                await channel.call(Decode.LOAD, Empty(), timeout_s=5)
        assert await service.exit_code() == 137


async def test_it_drains_when_its_parent_is_killed(tmp_path: Path) -> None:
    launcher = (
        "import subprocess, sys, os\n"
        "env = {**os.environ, 'COVEY_DIE_WITH_PARENT': str(os.getpid())}\n"
        "child = subprocess.Popen(sys.argv[1:], stderr=subprocess.DEVNULL, env=env)\n"
        "print(child.pid, flush=True)\n"
        "child.wait()\n"
    )
    async with (
        NatsServer(tmp_path) as server,
        NatsBus.open(server.url, token=server.token) as bus,
        Registry.open(bus, clock=MonotonicClock()) as registry,
    ):
        command = [*SERVICE, *settings(server, tmp_path)]
        async with await anyio.open_process([sys.executable, "-c", launcher, *command]) as parent:
            assert parent.stdout is not None
            pid = int(await parent.stdout.receive())
            await registry.until(lambda r: r.workers(), timeout_s=20)
            assert is_alive(pid)
            parent.send_signal(signal.SIGKILL)
            await parent.wait()
            await assert_eventually(lambda: not is_alive(pid), timeout_s=10)
            await registry.until(lambda r: not r.workers(), timeout_s=5)
