"""One model name for several: who answers, what a small model is shown, what is learnt, and what is left alone."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import anyio
import pytest

from covey.clock import MonotonicClock
from covey.codec.methods import SemCache
from covey.errors import CoveyError, Unavailable
from covey.net.rpc import Call, Handlers
from covey.policy.example_choice import INSTRUCTION
from covey.testing import assert_eventually
from covey.types.common import Empty
from covey.types.generate import EngineInfo, Role
from covey.types.ids import RequestId
from covey.types.program import CacheMode, CallParams, FunctionTool, Message, Tooling
from covey.types.semcache import CacheQuery, CacheReply, Example, RouteOutcome, RouteQuery, RouteReply
from services.gateway.assembly import Gateway
from services.gateway.config import InContextSettings, ModelConfig
from services.gateway.job import Job, Prompt
from services.gateway.models import LocalModel
from tests.support.fake_mesh import CONTEXT, TENANT, FakeMesh, FakeSemCache, FakeTokenizer, FakeWorker, fake_mesh, fast

MODELS = ("small", "large")
SHOWN = Example(entry="e1", text="list open files", answer="lsof", similarity=0.8, utility=0.9)


@dataclass
class Served(FakeWorker):
    """A worker of a model with this name."""

    model: str = ""

    def info(self) -> EngineInfo:
        return replace(super().info(), model=self.model)


@dataclass
class Advice(FakeSemCache):
    """Examples and choices as a test wants them; `routed` and `learnt` are what it was asked and told."""

    examples: tuple[Example, ...] = (SHOWN,)
    reply: RouteReply = field(default_factory=lambda: RouteReply(model="small", decision="d1", second="large"))
    fault: CoveyError | None = None
    routed: list[RouteQuery] = field(default_factory=list)
    learnt: list[RouteOutcome] = field(default_factory=list)

    def handlers(self) -> Handlers:
        return {**super().handlers(), SemCache.ROUTE: self.route, SemCache.LEARN: self.learn}

    async def lookup(self, query: CacheQuery, call: Call) -> CacheReply:
        reply = await super().lookup(query, call)
        return replace(reply, examples=self.examples[: query.examples_max])

    async def route(self, query: RouteQuery, _call: Call) -> RouteReply:
        self.routed.append(query)
        if self.fault is not None:
            raise self.fault
        return self.reply

    async def learn(self, outcome: RouteOutcome, _call: Call) -> Empty:
        self.learnt.append(outcome)
        return Empty()


@dataclass
class Site:
    """A gateway with `auto` before two models, and its semcache."""

    mesh: FakeMesh
    gateway: Gateway
    small: Served
    large: Served
    advice: Advice

    async def ask(self, job: Job) -> str:
        with anyio.fail_after(5):
            return await self.gateway.completions.text(job)


@asynccontextmanager
async def site(*, advice: Advice | None = None, **settings: Any) -> AsyncIterator[Site]:
    config = fast(
        models=tuple(ModelConfig(name=name) for name in MODELS),
        in_context=InContextSettings(models=MODELS, **{"deadline_s": 1.0, **settings}),
    )
    async with fake_mesh() as mesh:
        small = Served(name="s", role=Role.DECODE, model="small", script="little")
        large = Served(name="l", role=Role.DECODE, model="large", script="a lot more")
        await mesh.add(small)
        await mesh.add(large)
        found = advice or Advice()
        await mesh.add_semcache(found)
        gateway = await mesh.gateway(config, [LocalModel(name=n, tokenizer=FakeTokenizer()) for n in MODELS])
        yield Site(mesh, gateway, small, large, found)


def job(text: str = "list open ports", **changes: Any) -> Job:
    asked = Job(
        request_id=RequestId("r"),
        tenant=TENANT,
        model="auto",
        prompts=(Prompt(messages=(Message(role="user", content=text),)),),
        params=CallParams(temperature=0, max_tokens=16),
        cache=CacheMode.USE,
        deadline_at=MonotonicClock().now() + 10.0,
    )
    return replace(asked, **changes)


def prompt_of(worker: FakeWorker) -> str:
    """What reached a worker last: a token is a byte."""
    return bytes(worker.seen[-1].token_ids).decode()


async def test_the_small_model_is_shown_examples_and_the_second_answer_teaches() -> None:
    async with site() as it:
        assert await it.ask(job()) == "little"
        assert INSTRUCTION in prompt_of(it.small)
        assert "list open files" in prompt_of(it.small)
        await assert_eventually(lambda: len(it.advice.learnt) == 2)
        assert INSTRUCTION not in prompt_of(it.large), "the yardstick answers the request as it came"
    assert {outcome.model for outcome in it.advice.learnt} == set(MODELS)
    assert {outcome.decision for outcome in it.advice.learnt} == {"d1"}
    assert next(o.reward for o in it.advice.learnt if o.model == "large") == 1.0
    assert it.advice.routed[0].models == MODELS
    shown = {offer.query.model: offer.examples for offer in it.advice.offers}
    assert shown["small"] == ("e1",), "whoever keeps the answer learns what it was given with"


async def test_the_large_model_is_shown_nothing_and_no_second_means_no_second_answer() -> None:
    async with site(advice=Advice(reply=RouteReply(model="large", decision="d1"))) as it:
        assert await it.ask(job()) == "a lot more"
        await anyio.wait_all_tasks_blocked()
        assert INSTRUCTION not in prompt_of(it.large)
    assert not it.small.seen
    assert not it.advice.learnt


@pytest.mark.parametrize(
    "advice",
    [
        Advice(fault=Unavailable("gone")),
        Advice(error=Unavailable("gone")),
        Advice(reply=RouteReply(model="another", decision="d1", second="small")),
        Advice(delay_s=30.0),
    ],
    ids=["route fails", "examples fail", "an unknown model", "late"],
)
async def test_without_help_the_dearest_model_answers(advice: Advice) -> None:
    async with site(advice=advice, deadline_s=0.05) as it:
        assert await it.ask(job()) == "a lot more"
        await anyio.wait_all_tasks_blocked()
    assert not it.small.seen
    assert not advice.learnt


async def test_a_semcache_that_is_gone_costs_no_answer() -> None:
    async with site() as it:
        it.mesh.network.disconnect(it.mesh.directory.records["semcache"].address)
        assert await it.ask(job()) == "a lot more"
        del it.mesh.directory.records["semcache"]
        assert await it.ask(job()) == "a lot more"


@pytest.mark.parametrize(
    "change",
    [
        {"cache": CacheMode.BYPASS},
        {"tooling": Tooling(tools=(FunctionTool(name="f"),))},
        {"params": CallParams(temperature=0, max_tokens=16, grammar="x")},
        {"prompts": (Prompt(text="plain"),)},
        {"prompts": (Prompt(messages=(Message(role="assistant", content="I said"),)),)},
    ],
    ids=["bypass", "functions", "grammar", "a text", "no question"],
)
async def test_requests_that_examples_could_change_are_left_alone(change: dict[str, Any]) -> None:
    async with site() as it:
        chosen = await it.gateway.completions._in_context.choose(job(**change))  # any grammar is read later
    assert chosen.job.model == "large"
    assert (chosen.decision, chosen.second, chosen.job.shown) == ("", "", ())
    assert chosen.job.prompts == chosen.original.prompts
    assert not it.advice.routed
    assert not it.advice.queries


async def test_another_model_name_is_not_touched() -> None:
    async with site() as it:
        assert await it.ask(job(model="small")) == "little"
    assert not it.advice.routed


async def test_examples_that_do_not_fit_are_left_out() -> None:
    long = replace(SHOWN, answer="x" * CONTEXT)
    async with site(advice=Advice(examples=(long,))) as it:
        assert await it.ask(job()) == "little"
        assert INSTRUCTION not in prompt_of(it.small)
        await assert_eventually(lambda: it.advice.offers)
    assert it.advice.offers[0].examples == ()


async def test_a_request_that_is_dropped_teaches_nothing_and_asks_nobody_else() -> None:
    async with site() as it:
        it.small.gate = anyio.Event()
        with anyio.move_on_after(2) as scope:
            async with it.gateway.completions.open(job()):
                await assert_eventually(lambda: it.small.running)
                scope.cancel()
                await anyio.lowlevel.checkpoint()
        await assert_eventually(lambda: it.small.cancelled)
        await anyio.wait_all_tasks_blocked()
    assert not it.large.seen
    assert not it.advice.learnt


async def test_a_second_answer_that_fails_leaves_the_first() -> None:
    async with site(second_s=0.2) as it:
        it.large.gate = anyio.Event()
        assert await it.ask(job()) == "little"
        await assert_eventually(lambda: it.large.cancelled)
    assert not it.advice.learnt
