"""Examples and the choice of a model through the service: near-misses are shown, outcomes teach, tenants stay apart."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import anyio
import numpy as np
import pytest

from covey.clock import MonotonicClock
from covey.errors import InvalidArgument, NotFound
from covey.types.generate import FinishReason
from covey.types.ids import TenantId
from covey.types.semcache import CacheOffer, CacheQuery, RouteOutcome, RouteQuery
from services.semcache.example_pool import CLUSTERED_FROM, ExamplePool
from services.semcache.minilm import Encoded
from services.semcache.tutor import Tutor, TutorConfig
from services.semcache.vectors import Vectors

ACME, RIVAL = TenantId("acme"), TenantId("rival")


class _Words:
    """An embedder whose vectors are bags of words."""

    ready = True

    async def one(self, tenant: TenantId, text: str, *, timeout_s: float) -> Encoded:
        return Encoded(vector=vector(text), tokens=len(text.split()))


def vector(text: str) -> Vectors:
    found = np.zeros(64, np.float32)
    for word in text.lower().split():
        found[hash_of(word)] += 1.0
    length = float(np.linalg.norm(found))
    return found / length if length else found


def hash_of(word: str) -> int:
    return sum(ord(c) * (i + 1) for i, c in enumerate(word)) % 64


def tutor(**changes: object) -> Tutor:
    config = replace(TutorConfig(), **changes)  # type: ignore[arg-type]
    return Tutor(_Words(), config, clock=MonotonicClock(), rng=Random(1))  # type: ignore[arg-type]


def asks(text: str, *, tenant: TenantId = ACME, count: int = 3) -> CacheQuery:
    return CacheQuery(tenant=tenant, model="large", text=text, examples_max=count)


def offers(text: str, answer: str, *, tenant: TenantId = ACME, shown: tuple[str, ...] = ()) -> CacheOffer:
    query = CacheQuery(tenant=tenant, model="large", text=text)
    return CacheOffer(query=query, text=answer, reason=FinishReason.STOP, examples=shown)


async def test_a_near_miss_is_shown_and_the_likest_stands_last() -> None:
    it = tutor()
    await it.offer(offers("find files larger than one gigabyte in home", "find ~ -size +1G"), "big")
    await it.offer(offers("find files larger than five megabytes in home", "find ~ -size +5M"), "small")
    await it.offer(offers("who wrote the odyssey", "Homer"), "poet")
    found = await it.examples(asks("find files larger than five gigabyte in home"))
    assert {example.entry for example in found} == {"big", "small"}
    assert [e.utility for e in found] == sorted(e.utility for e in found)
    assert await it.examples(asks("find files larger than one gigabyte in home", count=1))


async def test_tenants_never_see_each_others_examples_unless_a_pool_is_shared() -> None:
    apart, shared = tutor(), tutor(shared=True)
    for it in (apart, shared):
        await it.offer(offers("list open ports", "ss -ltn"), "ports")
    assert not await apart.examples(asks("list open ports", tenant=RIVAL))
    assert await apart.examples(asks("list open ports")), "positive control: its own tenant does"
    assert await shared.examples(asks("list open ports", tenant=RIVAL))


async def test_personal_data_stays_out_of_a_shared_pool_and_a_tenant_can_be_forgotten() -> None:
    it = tutor(shared=True)
    await it.offer(offers("mail the report to jane.doe@example.org", "done"), "mail")
    await it.offer(offers("list open ports", "ss -ltn"), "ports")
    assert not await it.examples(asks("mail the report to jane.doe@example.org"))
    it.forget(ACME)
    assert not await it.examples(asks("list open ports"))


async def test_an_answer_that_was_given_with_examples_teaches_no_one_and_a_wrong_one_goes() -> None:
    it = tutor()
    await it.offer(offers("list open ports", "ss", shown=("x",)), "ports")
    assert not await it.examples(asks("list open ports"))
    await it.offer(offers("list open ports", "ls"), "wrong")
    it.remove(ACME, "wrong")
    assert not await it.examples(asks("list open ports"))


async def test_the_choice_learns_which_requests_the_small_model_can_do() -> None:
    it, models = tutor(), ("small", "large")
    easy, hard = "say hello to the nice team", "prove 12 theorems about 7 sets and 9 maps over 33 fields"
    for i in range(60):
        for text, small in ((f"{easy} {i}", 1.0), (f"{hard} {i}", 0.0)):
            reply = await it.route(RouteQuery(tenant=ACME, text=text, models=models))
            for model, reward in (("small", small), ("large", 1.0)):
                it.learn(RouteOutcome(tenant=ACME, decision=reply.decision, model=model, reward=reward))
    assert (await it.route(RouteQuery(tenant=ACME, text=f"{easy} again", models=models))).model == "small"
    assert (await it.route(RouteQuery(tenant=ACME, text=f"{hard} again", models=models))).model == "large"
    busy = RouteQuery(tenant=ACME, text=f"{hard} again", models=models, load=(0.0, 1000.0))
    assert [(await it.route(busy)).model for _ in range(20)][-1] == "small", "load moves work, and only load"


async def test_outcomes_of_unknown_or_foreign_decisions_are_refused() -> None:
    it = tutor()
    reply = await it.route(RouteQuery(tenant=ACME, text="x", models=("a", "b")))
    with pytest.raises(NotFound):
        it.learn(RouteOutcome(tenant=RIVAL, decision=reply.decision, model="a", reward=1.0))
    with pytest.raises(InvalidArgument):
        it.learn(RouteOutcome(tenant=ACME, decision=reply.decision, model="c", reward=1.0))
    with pytest.raises(InvalidArgument):
        await it.route(RouteQuery(tenant=ACME, text="x", models=()))


async def test_a_pool_is_bounded_and_finds_the_same_after_clustering() -> None:
    pool = ExamplePool(entries_max=400, size_bytes_max=1 << 20, rng=Random(2))
    for i in range(CLUSTERED_FROM + 200):
        text = f"topic{i % 20} item{i} of things"
        where = vector(text)
        pool.add(f"e{i}", text, "a", owner=ACME, model="m", category="", vector=where, now=float(i))
        pool.check()
    assert len(pool) == 400
    wanted = "topic7 item447 of things"
    before = pool.find(wanted, vector(wanted), category="", count=1, tokens_max=10_000)
    assert await pool.cluster(anyio.CapacityLimiter(1))
    assert not await pool.cluster(anyio.CapacityLimiter(1)), "nothing has changed since"
    assert pool.find(wanted, vector(wanted), category="", count=1, tokens_max=10_000) == before
