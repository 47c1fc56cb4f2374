"""Running out of blocks swaps somebody out; nobody loses or repeats a token by it, and nothing is left behind."""

from __future__ import annotations

from random import Random

import anyio
import pytest

from covey.engine.engine import Engine
from covey.engine.fake import FakeRunner
from covey.engine.limits import EngineLimits
from covey.policy.batch_limits import BatchLimits
from covey.testing import assert_eventually
from covey.types.generate import Finished, GenerateRequest
from tests.support.engines import (
    Answer,
    Shelf,
    assert_idle,
    collect,
    is_cancelled,
    is_whole,
    request_of,
    running_engine,
)

BLOCKS = 24
LIMITS = EngineLimits(admission="past_future", grace_s=0.0, batch=BatchLimits(max_running=12, max_tokens=64))


def crowd() -> list[GenerateRequest]:
    """Eight requests that together need three times the blocks there are."""
    return [
        request_of([(i * i + 7 * i * j) % 250 + 1 for i in range(20 + j)], request_id=f"r{j}", max_tokens=50)
        for j in range(8)
    ]


async def teach(engine: Engine) -> None:
    """Show the engine so many short answers that it expects no others."""
    for index in range(20):
        await collect(engine, request_of((index + 1, 5), request_id=f"short{index}", max_tokens=2))


async def alone() -> dict[str, Answer]:
    async with running_engine() as engine:
        return {request.request_id: await collect(engine, request) for request in crowd()}


async def together(engine: Engine) -> dict[str, Answer]:
    answers: dict[str, Answer] = {}

    async def ask(request: GenerateRequest) -> None:
        answers[request.request_id] = await collect(engine, request)

    async with anyio.create_task_group() as tg:
        for request in crowd():
            tg.start_soon(ask, request)
    return answers


@pytest.mark.parametrize("store", ["none", "good", "down", "forgetful"])
async def test_a_wrong_prediction_costs_time_and_nothing_else(store: str) -> None:
    expected = await alone()
    shelf = Shelf()
    shelf.is_down = store == "down"
    runner = FakeRunner(n_blocks=BLOCKS)
    async with running_engine(runner, limits=LIMITS, store=None if store == "none" else shelf) as engine:
        await teach(engine)
        if store == "forgetful":
            shelf.forgets = True
        answers = await together(engine)
        assert engine.board.preemptions > 0, "this test must run out of blocks"
        assert (engine.board.swapped_out > 0) == (store in {"good", "forgetful"})
        for name, answer in answers.items():
            assert isinstance(answer.last, Finished), (name, answer.last)
            assert answer.ids == expected[name].ids
            assert answer.text == expected[name].text
            assert is_whole(answer)
            assert answer.last.usage.completion_tokens == 50
        await assert_idle(engine)
        await assert_eventually(lambda: shelf.stats.leases == shelf.stats.private_blocks == 0)


async def test_the_store_saves_what_was_computed() -> None:
    """Swapped and resumed, a request computes at most its unfinished block again; dropped, all its tokens."""
    computed = {}
    for store in (None, Shelf()):
        runner = FakeRunner(n_blocks=BLOCKS)
        async with running_engine(runner, limits=LIMITS, store=store) as engine:
            await teach(engine)
            before = runner.computed
            await together(engine)
            computed[store is not None] = runner.computed - before
            preemptions = engine.board.preemptions
    least = sum(len(request.token_ids) + 49 for request in crowd())
    assert computed[True] <= least + preemptions, "the last token of a swapped request is computed again"
    assert computed[False] > computed[True]


async def test_reserving_the_worst_case_never_preempts() -> None:
    limits = EngineLimits(batch=LIMITS.batch, grace_s=0.0)
    async with running_engine(FakeRunner(n_blocks=BLOCKS), limits=limits) as engine:
        await teach(engine)
        answers = await together(engine)
        assert engine.board.preemptions == 0
        assert all(len(answer.ids) == 50 for answer in answers.values())


@pytest.mark.parametrize("slow_s", [0.0, 0.005])
async def test_cancelled_while_being_swapped_or_swapped_out(slow_s: float) -> None:
    rng = Random(4)
    shelf = Shelf()
    async with running_engine(FakeRunner(n_blocks=BLOCKS), limits=LIMITS, store=shelf) as engine:
        await teach(engine)
        shelf.slow_s = slow_s
        ended: list[bool] = []

        async def ask(request: GenerateRequest) -> None:
            answer = await collect(engine, request)
            ended.append(is_whole(answer) and (len(answer.ids) == 50 or is_cancelled(answer)))

        async def another_preemption() -> None:
            seen = engine.board.preemptions
            await assert_eventually(lambda: engine.board.preemptions > seen or len(ended) > 2, every_s=0.0005)

        async with anyio.create_task_group() as tg:
            for request in crowd():
                tg.start_soon(ask, request)
            for victim in rng.sample(crowd(), 5):
                await another_preemption()
                await engine.cancel(victim.request_id)
        assert ended == [True] * 8
        await assert_idle(engine)
        await assert_eventually(lambda: shelf.stats.leases == shelf.stats.private_blocks == 0)
