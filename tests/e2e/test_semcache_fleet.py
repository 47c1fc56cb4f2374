"""Three semcache processes as one cache: a writer for each tenant, replicas that follow it, its death and return."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import anyio
import pytest
from anyio.abc import Process

from covey.clock import MonotonicClock
from covey.codec.methods import SemCache
from covey.net.channels import Channel
from covey.net.embedded import EmbeddedNats
from covey.net.nats import NatsBus
from covey.net.registry import Registry
from covey.testing import assert_eventually
from covey.types.common import Empty
from covey.types.generate import Role
from covey.types.ids import TenantId, WorkerId
from covey.types.program import CacheOutcome
from covey.types.semcache import CacheQuery, CacheReply, InvalidateRequest
from services.semcache.peers import Peers
from tests.support.semcache import ACME, RIVAL, offer, query
from tests.unit.semcache.test_process import running_service

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.timeout(120)]

NAMES = ("a", "b", "c")


@pytest.fixture(autouse=True)
def _no_blocking() -> None:
    """Off: this process only watches."""


class Mesh:
    """The processes by name, and channels to them."""

    def __init__(self, folder: Path, nats: EmbeddedNats, registry: Registry, stack: AsyncExitStack) -> None:
        self._folder, self._nats, self._registry, self._stack = folder, nats, registry, stack
        self.processes: dict[str, Process] = {}
        self.channels: dict[str, Channel] = {}

    async def start(self, name: str) -> None:
        flags = ("--set", f"worker={name}", "--set", "preload=false", "--set", "drain_s=1")
        self.processes[name] = await self._stack.enter_async_context(running_service(self._folder, self._nats, *flags))
        process = self.processes[name]
        await self._registry.until(lambda r: self._pid(name) == process.pid, timeout_s=10)
        view = self._registry.worker(WorkerId(name))
        assert view is not None
        self.channels[name] = await self._stack.enter_async_context(Channel.open(view.record.address))

    async def kill(self, name: str) -> None:
        self.processes[name].kill()
        await self._registry.until(lambda r: r.worker(WorkerId(name)) is None, timeout_s=10)

    def rank(self, tenant: TenantId) -> list[str]:
        """Names by preference for a tenant."""
        records = tuple(view.record for view in self._registry.workers(Role.SEMCACHE))
        peers = Peers(lambda: records, WorkerId("nobody"))
        return [record.worker for record in peers.rank(tenant) if record is not None]

    async def ask(self, name: str, asked: CacheQuery) -> CacheReply:
        return await self.channels[name].call(SemCache.LOOKUP, asked, timeout_s=5 + asked.wait_s)

    async def outcome(self, name: str, asked: CacheQuery) -> CacheOutcome:
        return (await self.ask(name, asked)).outcome

    async def keep(self, name: str, asked: CacheQuery, answer: str = "an answer") -> None:
        await assert_eventually(lambda: self._kept(name, asked, answer), timeout_s=10)

    async def _kept(self, name: str, asked: CacheQuery, answer: str) -> bool:
        return (await self.channels[name].call(SemCache.OFFER, offer(asked, answer), timeout_s=5)).stored

    def _pid(self, name: str) -> int:
        view = self._registry.worker(WorkerId(name))
        return view.record.pid if view is not None else 0


@asynccontextmanager
async def fleet(folder: Path) -> AsyncIterator[Mesh]:
    async with (
        EmbeddedNats.start(folder) as nats,
        NatsBus.open(nats.url, token=nats.token) as bus,
        Registry.open(bus, clock=MonotonicClock()) as registry,
        AsyncExitStack() as stack,
    ):
        mesh = Mesh(folder, nats, registry, stack)
        for name in NAMES:
            await mesh.start(name)
        yield mesh


def asked(key: bytes, tenant: TenantId = ACME) -> CacheQuery:
    return query(exact=key, tenant=tenant, category="")


async def hits(mesh: Mesh, name: str, one: CacheQuery) -> bool:
    return await mesh.outcome(name, one) is CacheOutcome.EXACT


async def misses(mesh: Mesh, name: str, one: CacheQuery) -> bool:
    return await mesh.outcome(name, one) is CacheOutcome.MISS


async def test_a_fleet_is_one_cache_through_death_and_return(tmp_path: Path) -> None:
    async with fleet(tmp_path) as mesh:
        writer, *others = mesh.rank(ACME)
        await mesh.keep(others[0], asked(b"old"), "old")
        await mesh.keep(others[1], asked(b"kept"), "kept")
        for name in NAMES:
            reply = await mesh.ask(name, asked(b"old"))
            assert reply.answer is not None, name
            assert reply.answer.text == "old"
            assert await mesh.outcome(name, asked(b"old", RIVAL)) is CacheOutcome.MISS
        for name in others:  # they follow the writer from their first look-up on: copies, not forwarded answers
            await assert_eventually(partial(_entries, mesh, name, 2), timeout_s=10)

        await mesh.kill(writer)
        for name in others:
            await assert_eventually(partial(hits, mesh, name, asked(b"kept")), timeout_s=10)
        heir = mesh.rank(ACME)[0]
        assert heir == others[0]
        await mesh.keep(others[1], asked(b"new"), "new")

        request = InvalidateRequest(tenant=ACME, entry=(await _entry(mesh, heir, b"old")))
        done = await mesh.channels[others[1]].call(SemCache.INVALIDATE, request, timeout_s=5)
        assert (done.removed, done.epoch) == (1, 1)
        for name in others:
            await assert_eventually(partial(misses, mesh, name, asked(b"old")), timeout_s=2)

        # It comes back with what was voided while it was away on its disk, and is the writer again.
        await mesh.start(writer)
        for name in (writer, *others):
            for _ in range(3):
                assert await mesh.outcome(name, asked(b"old")) is not CacheOutcome.EXACT, "a voided answer"
            await assert_eventually(partial(hits, mesh, name, asked(b"new")), timeout_s=15)
            assert await hits(mesh, name, asked(b"kept"))
            assert await mesh.outcome(name, asked(b"old")) is not CacheOutcome.EXACT, "a voided answer"
        assert mesh.rank(ACME)[0] == writer


async def test_one_flight_over_all_processes(tmp_path: Path) -> None:
    async with fleet(tmp_path) as mesh:
        _, second, third = mesh.rank(ACME)
        one = replace(asked(b"k"), wait_s=10.0)
        await assert_eventually(lambda: misses(mesh, second, asked(b"k")), timeout_s=10)
        await mesh.keep(second, asked(b"other"))
        leader = await mesh.ask(second, one)
        assert leader.flight
        replies: list[CacheReply] = []

        async def follow(name: str) -> None:
            replies.append(await mesh.ask(name, one))

        async with anyio.create_task_group() as tg:
            for name in NAMES:
                tg.start_soon(follow, name)
            await anyio.wait_all_tasks_blocked()
            landing = replace(offer(asked(b"k"), "for all"), flight=leader.flight)
            await mesh.channels[third].call(SemCache.OFFER, landing, timeout_s=5)
        assert [reply.answer.text for reply in replies if reply.answer is not None] == ["for all"] * 3


async def _entries(mesh: Mesh, name: str, count: int) -> bool:
    return (await mesh.channels[name].call(SemCache.STATS, Empty(), timeout_s=5)).entries >= count


async def _entry(mesh: Mesh, name: str, key: bytes) -> str:
    reply = await mesh.ask(name, asked(key))
    assert reply.answer is not None
    return reply.answer.entry
