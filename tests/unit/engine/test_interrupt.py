"""What is wanted no more, or is more urgent, stops a running step at the next layer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import aclosing

import anyio
import pytest

from covey.engine.engine import Engine
from covey.engine.fake import FakeRunner
from covey.engine.limits import EngineLimits
from covey.policy.batch_limits import Batching, BatchLimits
from covey.testing import assert_eventually
from covey.types.generate import Failed, GenerateRequest
from tests.support.engines import Answer, assert_idle, collect, is_cancelled, is_whole, request_of, running_engine

LAYERS = 40
LAYER_S = 0.02
LONG = tuple(range(1, 200))


def limits(batching: Batching = "fcfs") -> EngineLimits:
    batch = BatchLimits(batching=batching, max_tokens=512, chunk_min=512)
    return EngineLimits(batch=batch, grace_s=0.0, progress_s=0.02)


async def by_cancel(engine: Engine, request: GenerateRequest, seen: Callable[[], int]) -> int:
    """Cancel by id in mid-step; how many layers had run then."""
    async with anyio.create_task_group() as tg:
        answers: list[Answer] = []

        async def ask() -> None:
            answers.append(await collect(engine, request))

        tg.start_soon(ask)
        await assert_eventually(lambda: seen() >= 3, every_s=0.001)
        before = seen()
        await engine.cancel(request.request_id)
        await assert_eventually(lambda: answers, every_s=0.001)
        assert is_cancelled(answers[0])
    return before


async def by_leaving(engine: Engine, request: GenerateRequest, seen: Callable[[], int]) -> int:
    """Close the iterator in mid-step."""
    async with aclosing(engine.generate(request)) as events:
        async for _ in events:
            if seen() >= 3:
                break
        return seen()


@pytest.mark.parametrize("way", [by_cancel, by_leaving])
async def test_a_cancel_takes_effect_within_a_layer(
    way: Callable[[Engine, GenerateRequest, Callable[[], int]], Awaitable[int]],
) -> None:
    runner = FakeRunner(layers=LAYERS, layer_s=LAYER_S)
    async with running_engine(runner, limits=limits()) as engine:
        before = await way(engine, request_of(LONG, max_tokens=4), lambda: runner.layers)
        await assert_idle(engine)
        assert runner.layers <= before + 2, "the one that ran, and one that had begun"
        assert runner.layers < LAYERS
        assert runner.suspended == 0


async def test_a_deadline_ends_a_request_in_mid_step() -> None:
    runner = FakeRunner(layers=LAYERS, layer_s=LAYER_S)
    async with running_engine(runner, limits=limits()) as engine:
        answer = await collect(engine, request_of(LONG, deadline_s=5 * LAYER_S))
        assert isinstance(answer.last, Failed)
        assert answer.last.code == "DEADLINE_EXCEEDED"
        await assert_idle(engine)
        assert runner.layers < LAYERS / 2


async def test_the_others_of_a_step_do_not_notice() -> None:
    async with running_engine(FakeRunner(layers=LAYERS)) as engine:
        expected = await collect(engine, request_of(LONG[:90], request_id="alone", max_tokens=3))
    runner = FakeRunner(layers=LAYERS, layer_s=0.005, n_blocks=96)
    async with running_engine(runner, limits=limits()) as engine, anyio.create_task_group() as tg:
        answers: dict[str, Answer] = {}

        async def ask(name: str, tokens: tuple[int, ...]) -> None:
            answers[name] = await collect(engine, request_of(tokens, request_id=name, max_tokens=3))

        tg.start_soon(ask, "stays", LONG[:90])
        tg.start_soon(ask, "goes", LONG[90:])
        await assert_eventually(lambda: runner.layers >= 3, every_s=0.001)
        await engine.cancel(request_of(LONG, request_id="goes").request_id)
        await assert_eventually(lambda: len(answers) == 2)
        assert is_cancelled(answers["goes"])
        assert answers["stays"].ids == expected.ids
        assert is_whole(answers["stays"])
        await assert_idle(engine)


async def test_an_urgent_arrival_stops_a_long_prefill_between_layers() -> None:
    """FlowPrefill: the short prompt has its token before the long one, which goes on where it stopped."""
    async with running_engine(FakeRunner(layers=LAYERS)) as engine:
        expected = await collect(engine, request_of(LONG, request_id="alone", max_tokens=3))
    runner = FakeRunner(layers=LAYERS, layer_s=LAYER_S, n_blocks=96)
    async with running_engine(runner, limits=limits("flow")) as engine, anyio.create_task_group() as tg:
        ended: list[str] = []
        answers: dict[str, Answer] = {}

        async def ask(name: str, tokens: tuple[int, ...], max_tokens: int, priority: int) -> None:
            request = request_of(tokens, request_id=name, max_tokens=max_tokens, priority=priority)
            answers[name] = await collect(engine, request)
            ended.append(name)

        tg.start_soon(ask, "warm", (9, 8, 7), 1, 0)  # the policy learns how long a token takes
        await assert_eventually(lambda: ended)
        began = runner.layers
        tg.start_soon(ask, "long", LONG, 3, 0)
        await assert_eventually(lambda: runner.layers >= began + 3, every_s=0.001)
        tg.start_soon(ask, "short", (5, 6), 1, 1)
        await assert_eventually(lambda: len(ended) == 3, timeout_s=30)
        assert ended == ["warm", "short", "long"]
        assert answers["long"].ids == expected.ids
        assert runner.suspended == 0
        await assert_idle(engine)


@pytest.mark.parametrize("batching", ["fcfs", "layered", "laps", "flow"])
async def test_every_policy_brings_the_same_tokens(batching: Batching) -> None:
    prompts = [tuple((i * j) % 250 + 1 for i in range(1, 12 + 23 * j)) for j in range(1, 7)]
    async with running_engine(FakeRunner(layers=4)) as engine:
        expected = [await collect(engine, request_of(p, request_id=str(i))) for i, p in enumerate(prompts)]
    runner = FakeRunner(layers=4, n_blocks=96, layer_s=0.001)
    async with running_engine(runner, limits=limits(batching)) as engine, anyio.create_task_group() as tg:
        answers: dict[int, Answer] = {}

        async def ask(index: int) -> None:
            answers[index] = await collect(engine, request_of(prompts[index], request_id=str(index)))

        for index in range(len(prompts)):
            tg.start_soon(ask, index)
            for _ in range(20):
                await anyio.lowlevel.checkpoint()
        await assert_eventually(lambda: len(answers) == len(prompts), timeout_s=30)
        assert [answers[i].ids for i in range(len(prompts))] == [answer.ids for answer in expected]
        assert all(is_whole(answer) for answer in answers.values())
        await assert_idle(engine)
