"""semcache beside the workers: hits, misses, races, modes, and never an error."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from covey.errors import Unavailable
from covey.testing import assert_eventually
from covey.types.generate import FinishReason, Role
from covey.types.semcache import CachedAnswer
from tests.support.fake_mesh import MODEL, FakeSemCache, FakeWorker, fast
from tests.support.http_edge import Edge, http_edge

CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "temperature": 0}
KEPT = CachedAnswer(
    entry="e", text="a kept answer " * 20, ids=(1, 2, 3), reason=FinishReason.STOP, prompt_tokens=4, completion_tokens=3
)


async def ask(edge: Edge, **change: Any) -> tuple[str, str]:
    """The answer's text and what the cache did."""
    reply = await edge.http.post("/v1/chat/completions", json=CHAT | change)
    assert reply.status_code == 200, reply.text
    body = reply.json()
    assert body["covey"]["cache"] == reply.headers["x-covey-cache"]
    return body["choices"][0]["message"]["content"], body["covey"]["cache"]


async def both(edge: Edge, **faults: Any) -> tuple[FakeWorker, FakeSemCache]:
    worker = await edge.mesh.add(FakeWorker(name="d", role=Role.DECODE, **faults))
    return worker, await edge.mesh.add_semcache(FakeSemCache())


async def test_a_finished_answer_is_offered_and_found_again() -> None:
    async with http_edge() as edge:
        worker, cache = await both(edge)
        first = await ask(edge)
        await assert_eventually(lambda: cache.offers)
        second = await ask(edge)
        streamed = await edge.http.post("/v1/chat/completions", json=CHAT | {"stream": True})
    assert (first[1], second[1]) == ("miss", "exact")
    assert first[0] == second[0]
    assert len(worker.seen) == 1
    assert cache.offers[0].ids
    assert streamed.headers["x-covey-cache"] == "exact"
    assert streamed.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("change", "found_again"),
    [
        ({"temperature": 1}, False),  # sampled without a seed: nothing determines the answer
        ({"temperature": 1, "seed": 4}, True),
        ({"logprobs": True}, False),
        ({"logit_bias": {"97": 1, "98": 2}}, True),
    ],
)
async def test_only_determined_answers_have_an_exact_key(change: dict[str, Any], found_again: bool) -> None:
    async with http_edge() as edge:
        worker, cache = await both(edge)
        await ask(edge, **change)
        await anyio.wait_all_tasks_blocked()
        _, outcome = await ask(edge, **change)
    assert (outcome == "exact") == found_again
    assert len(worker.seen) == (1 if found_again else 2)
    assert all(bool(q.exact_key) or q.text for q in cache.queries)


async def test_other_parameters_other_tenants_other_answers() -> None:
    async with http_edge() as edge:
        _, cache = await both(edge)
        for change in ({}, {"max_tokens": 5}, {"stop": "z"}, {"messages": [{"role": "user", "content": "other"}]}):
            await ask(edge, **change)
    assert len({q.exact_key for q in cache.queries if q.exact_key}) == 4


async def test_a_semantic_hit_wins_over_a_slow_worker_and_cancels_it() -> None:
    async with http_edge() as edge:
        worker, cache = await both(edge, pace_s=0.3)
        cache.semantic = KEPT
        text, outcome = await ask(edge, temperature=1)
        await assert_eventually(lambda: worker.running == 0)
    assert (text, outcome) == (KEPT.text, "semantic")
    assert not cache.offers


async def test_a_slow_cache_costs_its_deadline_and_no_more() -> None:
    async with http_edge() as edge:
        _, cache = await both(edge)
        cache.delay_s, cache.semantic = 5.0, KEPT
        began = anyio.current_time()
        text, outcome = await ask(edge)
    assert anyio.current_time() - began < 1.5
    assert (len(text), outcome) == (12, "off")


async def test_a_broken_cache_is_no_error() -> None:
    async with http_edge() as edge:
        _, cache = await both(edge)
        cache.error = Unavailable("gone")
        outcomes = [(await ask(edge))[1] for _ in range(5)]
    assert set(outcomes) == {"off"}
    assert len(cache.queries) == 3  # then the breaker spares the look-ups


async def test_modes() -> None:
    async with http_edge() as edge:
        worker, cache = await both(edge)
        assert (await ask(edge, cache="bypass"))[1] == "bypass"
        assert not cache.queries
        await ask(edge, cache="no-store")
        await anyio.wait_all_tasks_blocked()
        assert not cache.offers
        await ask(edge, cache="refresh")
        await assert_eventually(lambda: cache.offers)
        assert (await ask(edge, cache="no-store"))[1] == "exact"
    assert len(worker.seen) == 3


async def test_a_kept_answer_longer_than_the_buffer_is_streamed_whole() -> None:
    dispatch = fast().dispatch
    config = fast(dispatch=type(dispatch)(stream_events_max=4))
    async with http_edge(config) as edge:
        _, cache = await both(edge)
        await ask(edge)
        await assert_eventually(lambda: cache.exact)
        cache.exact = dict.fromkeys(cache.exact, KEPT)
        text, outcome = await ask(edge)
    assert (text, outcome) == (KEPT.text, "exact")


async def test_formats_and_functions_have_keys_of_their_own_and_no_meaning() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    changes: tuple[dict[str, Any], ...] = (
        {},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "regex", "regex": "a+"}},
        {"tools": [tool]},
        {"tools": [tool], "tool_choice": "required"},
    )
    async with http_edge() as edge:
        _, cache = await both(edge)
        for change in changes:
            await ask(edge, **change)
    assert len({q.exact_key for q in cache.queries if q.exact_key}) == len(changes)
    assert sum(bool(q.text) for q in cache.queries if not q.exact_key) == 1, (
        "only the free one is looked for by meaning"
    )
