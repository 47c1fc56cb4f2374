"""Steps that fail: a row alone, a whole step for want of memory, the runner for good."""

from __future__ import annotations

import anyio
import pytest

from covey.engine.engine import Engine
from covey.engine.fake import FakeRunner
from covey.engine.limits import EngineLimits
from covey.model.plan import Interrupt, StepOutcome, StepPlan
from covey.policy.batch_limits import BatchLimits
from covey.testing import assert_eventually
from covey.types.generate import Failed, Finished
from tests.support.engines import assert_idle, collect, is_whole, request_of, running_engine

PROMPT = tuple(range(1, 30))


async def test_a_broken_row_fails_alone() -> None:
    async with running_engine(FakeRunner(bad_token=77)) as engine:
        answers = {}

        async def ask(name: str, tokens: tuple[int, ...]) -> None:
            answers[name] = await collect(engine, request_of(tokens, request_id=name))

        async with anyio.create_task_group() as tg:
            tg.start_soon(ask, "good", (1, 2, 3))
            tg.start_soon(ask, "bad", (1, 77, 3))
        assert isinstance(answers["bad"].last, Failed)
        assert isinstance(answers["good"].last, Finished)
        await assert_idle(engine)


async def test_a_broken_chunk_of_a_prompt_fails_it_at_once() -> None:
    runner = FakeRunner(bad_token=77, step_s=0.002, n_blocks=96)
    limits = EngineLimits(batch=BatchLimits(max_tokens=16, max_running=8, chunk_min=8))
    async with running_engine(runner, limits=limits) as engine, anyio.create_task_group() as tg:
        answers = {}

        async def ask(name: str, tokens: tuple[int, ...]) -> None:
            answers[name] = await collect(engine, request_of(tokens, request_id=name, max_tokens=60))

        tg.start_soon(ask, "good", (1, 2, 3))
        await ask("bad", (*range(1, 30), 77, *range(80, 240)))
        assert answers["bad"].last.code == "INTERNAL"
        assert not answers["bad"].ids
        assert runner.computed < 100, "the rest of the prompt was not computed"
        await assert_eventually(lambda: "good" in answers)
        assert len(answers["good"].ids) == 60
        await assert_idle(engine)


class BrokenRunner(FakeRunner):
    """Fails at its third step, with an error or for want of memory."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self._error: BaseException | None = error

    def step(self, plan: StepPlan, interrupt: Interrupt | None = None) -> StepOutcome:
        if self.steps == 2 and self._error is not None:
            error, self._error = self._error, None
            raise error
        return super().step(plan, interrupt)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")]
)
async def test_a_step_without_memory_fails_its_requests_and_the_engine_lives_on(error: BaseException) -> None:
    answers = []
    async with running_engine(BrokenRunner(error)) as engine, anyio.create_task_group() as tg:

        async def ask(index: int) -> None:
            answers.append(await collect(engine, request_of(range(1, 20 + index), request_id=str(index))))

        for index in range(3):
            tg.start_soon(ask, index)
        await assert_eventually(lambda: len(answers) == 3)
        assert {(answer.last.code, answer.last.retryable) for answer in answers} == {("NO_SPACE", True)}
        await assert_idle(engine)
        await ask(4)
        assert len(answers[-1].ids) == 12
        assert is_whole(answers[-1])


async def test_a_crash_of_the_runner_fails_the_streams_and_leaves_as_an_error() -> None:
    answers = []

    async def ask(engine: Engine) -> None:
        answers.append(await collect(engine, request_of(PROMPT, max_tokens=30)))

    with pytest.RaisesGroup(pytest.RaisesExc(RuntimeError, match="broken"), flatten_subgroups=True):
        async with anyio.create_task_group() as tg, running_engine(BrokenRunner(RuntimeError("broken"))) as engine:
            tg.start_soon(ask, engine)
            await anyio.sleep_forever()
    assert answers[0].last.code == "UNAVAILABLE"
    assert answers[0].last.retryable
