"""Equal requests that miss together ask one worker, over a real semcache; and what a client may say of the cache."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from covey.errors import InvalidArgument
from covey.testing import VirtualClock, assert_eventually
from covey.types.generate import Role
from covey.types.program import CacheMode
from services.gateway.http.cache_controls import cache_controls
from services.semcache.config import Config
from tests.support.fake_mesh import MODEL, FakeWorker
from tests.support.http_edge import Edge, http_edge
from tests.support.semcache import Parts, running_cache

CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "temperature": 0}


async def ask(edge: Edge, **change: Any) -> tuple[int, str, str]:
    reply = await edge.http.post("/v1/chat/completions", json=CHAT | change)
    if reply.status_code != 200:
        return reply.status_code, "", ""
    return 200, reply.json()["choices"][0]["message"]["content"], reply.headers["x-covey-cache"]


async def with_cache(edge: Edge, parts: Parts, **faults: Any) -> FakeWorker:
    await edge.mesh.add_semcache(parts.servicer)  # type: ignore[arg-type] # the real one
    return await edge.mesh.add(FakeWorker(name="d", role=Role.DECODE, **faults))


async def test_equal_requests_that_miss_together_ask_one_worker() -> None:
    async with running_cache(VirtualClock(), Config(preload=False), wait=False) as parts, http_edge() as edge:
        worker = await with_cache(edge, parts, pace_s=0.02)
        replies: list[tuple[int, str, str]] = []

        async def one() -> None:
            replies.append(await ask(edge))

        async with anyio.create_task_group() as tg:
            for _ in range(6):
                tg.start_soon(one)
        assert len({text for _, text, _ in replies}) == 1
        assert sorted(cache for _, _, cache in replies) == ["exact"] * 5 + ["miss"]
        assert len(worker.seen) == 1
        streamed = await edge.http.post("/v1/chat/completions", json=CHAT | {"stream": True})
        assert streamed.headers["x-covey-cache"] == "exact"
        assert len(parts.desk.flights) == 0


async def test_a_leader_that_goes_away_leaves_the_flight_to_the_next() -> None:
    async with running_cache(VirtualClock(), Config(preload=False), wait=False) as parts, http_edge() as edge:
        worker = await with_cache(edge, parts, pace_s=0.03)
        replies: list[tuple[int, str, str]] = []

        async def one() -> None:
            replies.append(await ask(edge))

        async with anyio.create_task_group() as tg:
            leaving = anyio.CancelScope()

            async def leader() -> None:
                with leaving:
                    await ask(edge)

            tg.start_soon(leader)
            await assert_eventually(lambda: len(parts.desk.flights) == 1)
            for _ in range(2):
                tg.start_soon(one)
            await assert_eventually(lambda: len(worker.seen) == 1)
            leaving.cancel()
        assert [status for status, _, _ in replies] == [200, 200]
        assert sorted(cache for _, _, cache in replies) == ["exact", "miss"]
        assert len(worker.seen) == 2


@pytest.mark.parametrize(
    ("wish", "age", "header", "expected"),
    [
        ("use", 0.0, "", (CacheMode.USE, 0.0)),
        ("use", 0.0, "no-cache", (CacheMode.REFRESH, 0.0)),
        ("use", 0.0, "No-Store , private", (CacheMode.NO_STORE, 0.0)),
        ("use", 0.0, "no-store, no-cache", (CacheMode.BYPASS, 0.0)),
        ("use", 0.0, "bypass", (CacheMode.BYPASS, 0.0)),
        ("no-store", 0.0, "no-cache", (CacheMode.BYPASS, 0.0)),
        ("no-cache", 0.0, "", (CacheMode.REFRESH, 0.0)),
        ("use", 60.0, "max-age=10", (CacheMode.USE, 10.0)),
        ("use", 5.0, "max-age=10", (CacheMode.USE, 5.0)),
        ("use", 0.0, "max-age=10", (CacheMode.USE, 10.0)),
        ("use", 0.0, "max-age=0", (CacheMode.REFRESH, 0.0)),
    ],
)
def test_what_a_client_may_say(wish: str, age: float, header: str, expected: tuple[CacheMode, float]) -> None:
    assert cache_controls(wish, age, header) == expected


@pytest.mark.parametrize("header", ["max-age", "max-age=-1", "max-age=1.5", "max-age=9999999999999"])
def test_a_wrong_age_is_refused(header: str) -> None:
    with pytest.raises(InvalidArgument, match="whole number"):
        cache_controls("use", 0.0, header)


async def test_no_store_and_ages_over_http() -> None:
    clock = VirtualClock()
    async with running_cache(clock, Config(preload=False), wait=False) as parts, http_edge() as edge:
        worker = await with_cache(edge, parts)
        first = await edge.http.post("/v1/chat/completions", json=CHAT, headers={"cache-control": "no-store"})
        assert first.headers["x-covey-cache"] == "miss"
        await ask(edge)
        await assert_eventually(lambda: len(parts.store) == 1)
        assert (len(worker.seen), (await ask(edge))[2]) == (2, "exact")
        clock.advance(30)
        assert (await ask(edge, cache_max_age_s=60))[2] == "exact"
        aged = await edge.http.post("/v1/chat/completions", json=CHAT, headers={"cache-control": "max-age=10"})
        assert aged.headers["x-covey-cache"] == "miss"
