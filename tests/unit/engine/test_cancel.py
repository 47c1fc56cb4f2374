"""Cancellation at every stage, and many requests at once: nothing is left behind."""

from __future__ import annotations

from contextlib import aclosing
from random import Random

import anyio
import pytest

from covey.engine.engine import Engine
from covey.engine.fake import FakeRunner
from covey.engine.limits import EngineLimits
from covey.policy.batch_limits import BatchLimits
from covey.testing import assert_eventually
from covey.types.generate import Event, GenerateRequest, Handover, Progress, Role, Stage, Tokens
from tests.support.engines import Shelf, assert_idle, collect, is_whole, plain, request_of, running_engine

PROMPT = tuple(range(1, 60))
EARLY = (Stage.QUEUE, Stage.LOOKUP, Stage.PREFILL)


async def abandon(engine: Engine, request: GenerateRequest, after: type[Event], stage: Stage | None = None) -> None:
    """Read until an event of a kind (and stage) comes, then leave."""
    with anyio.fail_after(10):
        async with aclosing(engine.generate(request)) as events:
            async for event in events:
                if isinstance(event, after) and (stage is None or getattr(event, "stage", None) is stage):
                    return
    raise AssertionError("the stream ended first")


@pytest.mark.parametrize(
    ("role", "stage"),
    [
        *((role, stage) for role in (Role.PREFILL, Role.DECODE) for stage in EARLY),
        (Role.PREFILL, Stage.TRANSFER),
    ],
)
async def test_leaving_at_any_stage_frees_everything(role: Role, stage: Stage) -> None:
    shelf = Shelf()
    limits = EngineLimits(
        batch=BatchLimits(max_running=1, max_tokens=16), progress_s=0.01, kv_timeout_s=30.0, grace_s=0.0
    )
    async with running_engine(FakeRunner(step_s=0.05), role=role, store=shelf, limits=limits) as engine:
        async with anyio.create_task_group() as tg:
            if stage is Stage.QUEUE:
                tg.start_soon(collect, engine, request_of(PROMPT, request_id="ahead", max_tokens=2))
                await assert_eventually(lambda: engine.load().running == 1)
            shelf.slow_s = 20.0 if stage is Stage.LOOKUP else 0.0
            request = request_of(tuple(range(60, 120)), request_id="leaver", max_tokens=2)
            if stage is Stage.TRANSFER:
                tg.start_soon(_slow_down_at_first_token, engine, shelf)
            await abandon(engine, request, Progress, stage)
            shelf.slow_s = 0.0
        with anyio.fail_after(1.0):
            await assert_idle(engine)
        await engine.cancel(request_of((1,), request_id="ahead").request_id)
        await assert_eventually(lambda: shelf.stats.leases == 0)


async def _slow_down_at_first_token(engine: Engine, shelf: Shelf) -> None:
    await assert_eventually(lambda: engine.board.computed_tokens > 30, every_s=0.001)
    shelf.slow_s = 20.0


async def test_blocks_are_free_within_a_quarter_second_of_leaving() -> None:
    async with running_engine(FakeRunner(step_s=0.02)) as engine:
        await abandon(engine, request_of(PROMPT, max_tokens=100), Tokens)
        with anyio.fail_after(0.25):
            await assert_idle(engine)


async def test_a_submit_that_was_left_before_it_was_taken_never_runs() -> None:
    runner = FakeRunner(step_s=0.2)
    async with running_engine(runner) as engine, anyio.create_task_group() as tg:
        tg.start_soon(collect, engine, request_of((1, 2), request_id="busy", max_tokens=1))
        await assert_eventually(lambda: engine.board.busy_since is not None)
        with anyio.move_on_after(0.05):
            await collect(engine, request_of(PROMPT, request_id="left", max_tokens=50))
        await assert_eventually(lambda: runner.steps == 1 and engine.load().running == 0)
        await assert_idle(engine)
        assert runner.steps == 1


@pytest.mark.slow
async def test_two_hundred_requests_with_random_cancels_leak_nothing() -> None:
    rng = Random(7)
    shelf = Shelf()
    limits = EngineLimits(batch=BatchLimits(max_running=16, max_tokens=128), grace_s=0.02, handover_ttl_s=0.2)
    whole: list[bool] = []
    async with (
        running_engine(FakeRunner(n_blocks=96), role=Role.PREFILL, store=shelf, limits=limits, name="p") as prefill,
        running_engine(FakeRunner(n_blocks=96), role=Role.DECODE, store=shelf, limits=limits, name="d") as decode,
    ):

        async def run(index: int, patience_s: float | None) -> None:
            length, shared = rng.randrange(1, 90), rng.randrange(0, 40)
            tokens = (*range(1, shared + 1), *(rng.randrange(1, 250) for _ in range(length)))
            request = request_of(tokens, request_id=str(index), max_tokens=rng.randrange(1, 30))
            with anyio.move_on_after(patience_s):
                first = await collect(prefill, request)
                whole.append(is_whole(first))
                if isinstance(first.last, Handover):
                    rest = await collect(decode, plain(request, ticket=first.last.ticket))
                    whole.append(is_whole(rest, start=1))

        with anyio.fail_after(60):
            async with anyio.create_task_group() as tg:
                for index in range(200):
                    tg.start_soon(run, index, rng.choice([None, None, rng.random() * 2]))
        await assert_idle(prefill)
        await assert_idle(decode)
        await assert_eventually(lambda: shelf.stats.leases == shelf.stats.private_blocks == 0)
    assert all(whole)
    assert len(whole) > 150


async def test_the_tokens_of_survivors_do_not_change_when_others_leave() -> None:
    async with running_engine() as engine:
        expected = await collect(engine, request_of(PROMPT, request_id="alone", max_tokens=40))
    async with running_engine(FakeRunner(step_s=0.002)) as engine, anyio.create_task_group() as tg:
        answers = []

        async def stay() -> None:
            answers.append(await collect(engine, request_of(PROMPT, request_id="stays", max_tokens=40)))

        tg.start_soon(stay)
        for index in range(10):
            tokens = tuple(range(index + 2, index + 50))
            await abandon(engine, request_of(tokens, request_id=f"goes{index}", max_tokens=50), Tokens)
        await assert_eventually(lambda: answers)
        assert answers[0].ids == expected.ids


async def test_cancelling_after_any_number_of_turns_leaves_nothing() -> None:
    shelf = Shelf()
    limits = EngineLimits(grace_s=0.0)
    finished = 0
    async with (
        running_engine(role=Role.PREFILL, store=shelf, limits=limits, name="p") as prefill,
        running_engine(store=shelf, limits=limits, name="d") as decode,
    ):
        for turns in range(0, 300, 3):
            request = request_of((*range(1, 40), turns % 199 + 1), request_id=str(turns), max_tokens=8)

            async def run(request: GenerateRequest) -> None:
                nonlocal finished
                first = await collect(prefill, request)
                assert isinstance(first.last, Handover), first.last
                await collect(decode, plain(request, ticket=first.last.ticket))
                finished += 1

            async with anyio.create_task_group() as tg:
                tg.start_soon(run, request)
                for _ in range(turns):
                    await anyio.lowlevel.checkpoint()
                tg.cancel_scope.cancel()
            await prefill.cancel(request.request_id)
        await assert_idle(prefill)
        await assert_idle(decode)
        await assert_eventually(lambda: shelf.stats.leases == shelf.stats.private_blocks == 0)
    assert finished > 0
