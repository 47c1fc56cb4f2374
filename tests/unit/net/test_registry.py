"""The registry over a real NATS server: records live while they are renewed, and survive outages of NATS."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from covey.clock import MonotonicClock
from covey.codec import encode
from covey.errors import DeadlineExceeded
from covey.net.bus import Bus, Change, KvChange
from covey.net.memory import MemoryBroker
from covey.net.nats import NatsBus
from covey.net.registry import TTL_S, Registry, announce
from covey.testing import VirtualClock, assert_eventually, virtual_time
from covey.types.event import LoadReport, WorkerRecord, WorkerState
from covey.types.generate import EngineLoad, Role
from covey.types.ids import WorkerId
from tests.support.nats import NatsServer


def record(name: str = "w1", *, role: Role = Role.DECODE, epoch: int = 1) -> WorkerRecord:
    return WorkerRecord(
        worker=WorkerId(name), role=role, address="127.0.0.1:1", epoch=epoch, state=WorkerState.READY, host="h", pid=1
    )


@asynccontextmanager
async def real_bus(server: NatsServer) -> AsyncIterator[Bus]:
    async with NatsBus.open(server.url, token=server.token) as bus:
        yield bus


async def test_announced_workers_appear_with_load_change_and_leave(tmp_path: Path) -> None:
    load = EngineLoad(running=3)
    async with NatsServer(tmp_path) as server, real_bus(server) as here, real_bus(server) as there:
        async with Registry.open(here, clock=MonotonicClock()) as registry:
            async with announce(there, record(), load=lambda: load) as announcement:
                await registry.until(lambda r: r.workers(Role.DECODE), timeout_s=5)
                assert registry.workers(Role.PREFILL) == ()
                await registry.until(lambda r: r.workers()[0].load.running == 3, timeout_s=5)
                announcement.update(state=WorkerState.DRAINING)
                await registry.until(lambda r: r.workers()[0].record.state is WorkerState.DRAINING, timeout_s=0.9)
                async with Registry.open(here, clock=MonotonicClock()) as late:
                    assert [view.record.worker for view in late.workers()] == ["w1"]
            await registry.until(lambda r: not r.workers(), timeout_s=1)


async def test_a_killed_worker_disappears_when_its_record_lapses(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(
        "import anyio, sys\n"
        "from covey.net.nats import NatsBus\n"
        "from covey.net.registry import announce\n"
        "from tests.unit.net.test_registry import record\n"
        "async def main():\n"
        "    async with NatsBus.open(sys.argv[1], token=sys.argv[2]) as bus, announce(bus, record()):\n"
        "        await anyio.sleep_forever()\n"
        "anyio.run(main)\n"
    )
    async with NatsServer(tmp_path) as server, real_bus(server) as bus:
        async with Registry.open(bus, clock=MonotonicClock()) as registry:
            process = await anyio.open_process(
                [sys.executable, str(script), server.url, server.token],
                env={**os.environ, "PYTHONPATH": str(Path.cwd())},
            )
            async with process:
                await registry.until(lambda r: r.workers(), timeout_s=20)
                process.send_signal(signal.SIGKILL)
                await process.wait()
                started = anyio.current_time()
                await registry.until(lambda r: not r.workers(), timeout_s=TTL_S + 2)
                assert anyio.current_time() - started > TTL_S - 1.5


async def test_a_nats_restart_changes_nothing_and_is_recovered_from(tmp_path: Path) -> None:
    load = EngineLoad(running=1)
    async with NatsServer(tmp_path) as server, real_bus(server) as here, real_bus(server) as there:
        async with (
            Registry.open(here, clock=MonotonicClock()) as registry,
            announce(there, record(), load=lambda: load),
        ):
            await registry.until(lambda r: r.workers(), timeout_s=5)
            await server.kill()
            await assert_eventually(lambda: not here.connected and not there.connected)
            with anyio.move_on_after(TTL_S + 1.5):
                while True:
                    assert registry.workers(), "an outage of NATS is nobody's silence"
                    await anyio.sleep(0.05)
            assert registry.workers()[0].age_s > TTL_S
            await server.start()
            load = EngineLoad(running=2)
            await registry.until(lambda r: r.workers()[0].load.running == 2, timeout_s=10)
            async with real_bus(server) as fresh, Registry.open(fresh, clock=MonotonicClock()) as late:
                await late.until(lambda r: r.workers(), timeout_s=3)
            with anyio.move_on_after(TTL_S + 1):
                while True:
                    assert registry.workers(), "a renewed record must not lapse"
                    await anyio.sleep(0.05)


async def test_who_died_with_nats_disappears_after_it_is_back(tmp_path: Path) -> None:
    async with NatsServer(tmp_path) as server, real_bus(server) as here:
        async with Registry.open(here, clock=MonotonicClock()) as registry:
            async with real_bus(server) as there, announce(there, record()):
                await registry.until(lambda r: r.workers(), timeout_s=5)
                await server.kill()
            assert registry.workers()
            await server.start()
            await registry.until(lambda r: not r.workers(), timeout_s=TTL_S + 5)


@virtual_time
async def test_heartbeats_come_once_a_second() -> None:
    broker = MemoryBroker()
    async with broker.bus() as bus, bus.subscribe("covey.v1.load.>") as loads, announce(bus, record()):
        await anyio.sleep(10.5)
        assert loads.dropped == 0
        seqs = []
        with anyio.move_on_after(0.1):
            async for message in loads:
                assert message.subject == "covey.v1.load.decode.w1"
                seqs.append(message)
        assert len(seqs) == 11


@virtual_time
async def test_until_gives_up_after_its_timeout() -> None:
    broker = MemoryBroker()
    async with broker.bus() as bus, Registry.open(bus, clock=VirtualClock()) as registry:
        with pytest.raises(DeadlineExceeded):
            await registry.until(lambda r: r.workers(), timeout_s=20)


@virtual_time
async def test_an_older_start_and_late_loads_are_ignored() -> None:
    broker = MemoryBroker()
    async with broker.bus() as bus, Registry.open(bus, clock=VirtualClock()) as registry:
        new, old = record(epoch=2), record(epoch=1)
        registry.apply(KvChange(key="decode.w1", change=Change.PUT, value=encode(new)))
        registry.apply(KvChange(key="decode.w1", change=Change.PUT, value=encode(replace(old, address="old:1"))))
        registry.apply(KvChange(key="decode.w2", change=Change.PUT, value=b"\xff\xff"))
        assert [view.record for view in registry.workers()] == [new]
        assert registry.rejected == 2
        report = LoadReport(epoch=2, seq=5, schema=1, worker=new.worker, role=new.role, load=EngineLoad(running=5))
        registry.apply_load(report)
        registry.apply_load(replace(report, seq=4, load=EngineLoad(running=4)))
        registry.apply_load(replace(report, epoch=1, seq=9, load=EngineLoad(running=9)))
        assert registry.workers()[0].load == EngineLoad(running=5)
