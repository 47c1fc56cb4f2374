"""A cached block that changes while nothing runs is noticed, dropped with what grows from it, and never served."""

from __future__ import annotations

import pytest

from covey.engine.engine import Engine
from covey.engine.fake import FakeRunner
from covey.engine.limits import EngineLimits
from covey.testing import assert_eventually
from tests.support.engines import assert_idle, collect, request_of, running_engine

PROMPT = tuple(range(1, 60))
LIMITS = EngineLimits(grace_s=0.0)


async def until_all_are_known(engine: Engine) -> None:
    seen = engine.board.verified_blocks
    blocks = engine.load().cached_blocks
    await assert_eventually(lambda: engine.board.verified_blocks >= seen + 2 * blocks, timeout_s=20)


@pytest.mark.parametrize("broken", [0, 3])
async def test_a_changed_block_is_dropped_with_what_grows_from_it(broken: int) -> None:
    runner = FakeRunner()
    async with running_engine(runner, limits=LIMITS) as engine:
        expected = await collect(engine, request_of(PROMPT, request_id="1"))
        await assert_idle(engine)
        await until_all_are_known(engine)
        before = engine.load().cached_blocks
        named = [i for i in range(runner.info.n_blocks) if any(runner.block_view(i))]
        runner.block_view(named[broken])[3] ^= 1
        await assert_eventually(lambda: engine.board.corrupt_blocks == 1, timeout_s=20)
        assert engine.load().cached_blocks < before
        engine.check()
        again = await collect(engine, request_of(PROMPT, request_id="2"))
        assert again.ids == expected.ids
        assert again.last.usage.cached_tokens <= broken * runner.info.block_size
        await assert_idle(engine)


async def test_good_blocks_stay() -> None:
    async with running_engine(FakeRunner(), limits=LIMITS) as engine:
        await collect(engine, request_of(PROMPT, request_id="1"))
        await assert_idle(engine)
        await until_all_are_known(engine)
        again = await collect(engine, request_of(PROMPT, request_id="2"))
        assert again.last.usage.cached_tokens == 56
        assert engine.board.corrupt_blocks == 0
