"""Speculation changes how many steps an answer takes, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import anyio
import pytest

from covey.engine.fake import FakeRunner
from covey.engine.limits import EngineLimits
from covey.model.plan import Draw, Row, SampleSpec
from covey.policy.speculation import SpeculationLimits
from covey.types.generate import FinishReason, GenerateRequest, Role
from tests.support.engines import Answer, assert_idle, collect, is_whole, request_of, running_engine

PROMPT = tuple(range(1, 30))
PATTERN = (11, 42, 17, 3, 55, 28)
OFF = EngineLimits(speculation=SpeculationLimits(guess_max=0))


class Stutterer(FakeRunner):
    """Says the same six words over and over, with a slip now and then."""

    def _draw(self, row: Row, spec: SampleSpec) -> Draw:
        drawn = super()._draw(row, spec)
        word = PATTERN[spec.position % len(PATTERN)]
        is_slip = drawn.token % 9 == 0 or word in spec.banned
        return drawn if is_slip else replace(drawn, token=word)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "short": {"max_tokens": 7},
    "one": {"max_tokens": 1},
    "two": {"max_tokens": 2},
    "stop": {"stop": ("u rd",)},
    "stop in a word": {"stop": ("u",)},
    "end of text": {"ignore_eos": False},
    "late end of text": {"ignore_eos": False, "min_tokens": 40},
    "log probabilities": {"logprobs": 2},
    "penalty": {"presence_penalty": 0.7},
    "seeded": {"temperature": 0.9, "seed": 5},
}


def requests() -> list[GenerateRequest]:
    return [request_of(PROMPT, request_id=name, **({"max_tokens": 90} | fields)) for name, fields in CASES.items()]


async def answers(limits: EngineLimits, *, together: bool, runner: FakeRunner) -> dict[str, Answer]:
    found: dict[str, Answer] = {}

    async def ask(request: GenerateRequest) -> None:
        found[request.request_id] = await collect(engine, request)

    async with running_engine(runner, limits=limits) as engine:
        async with anyio.create_task_group() as tg:
            for request in requests():
                if together:
                    tg.start_soon(ask, request)
                else:
                    await ask(request)
        await assert_idle(engine, pinned=None)
        assert engine.board.generated_tokens == sum(len(answer.ids) for answer in found.values())
        assert (engine.board.accepted_tokens > 0) == (limits is not OFF)
    return found


@pytest.mark.parametrize("together", [False, True])
async def test_answers_are_the_same_with_and_without(together: bool) -> None:
    plain = await answers(OFF, together=together, runner=Stutterer(n_blocks=256, step_s=0.0005))
    guessed = await answers(EngineLimits(), together=together, runner=Stutterer(n_blocks=256, step_s=0.0005))
    assert plain["stop"].last.reason is plain["stop in a word"].last.reason is FinishReason.STOP
    for name, expected in plain.items():
        found = guessed[name]
        assert is_whole(found)
        assert (found.ids, found.text) == (expected.ids, expected.text), name
        assert found.last.reason is expected.last.reason
        assert found.last.usage.completion_tokens == expected.last.usage.completion_tokens
        probabilities = [[one for event in answer.tokens for one in event.logprobs] for answer in (found, expected)]
        assert probabilities[0] == probabilities[1]


async def test_guesses_save_steps() -> None:
    steps = {}
    for limits in (OFF, EngineLimits()):
        runner = Stutterer(step_s=0.002)
        async with running_engine(runner, limits=limits) as engine:
            await collect(engine, request_of(PROMPT, max_tokens=150))
            steps[limits is OFF] = runner.steps
    assert steps[True] >= 150
    assert steps[False] < 0.7 * steps[True]


async def test_what_was_guessed_wrong_is_not_in_the_cache() -> None:
    """A later request that hits the blocks of a speculated one continues like any other."""
    async with running_engine(Stutterer(), limits=OFF) as engine:
        first = await collect(engine, request_of(PROMPT, request_id="1", max_tokens=100))
        expected = await collect(engine, request_of((*PROMPT, *first.ids), request_id="2", max_tokens=40))
    async with running_engine(Stutterer(step_s=0.001)) as engine:
        first = await collect(engine, request_of(PROMPT, request_id="1", max_tokens=100))
        found = await collect(engine, request_of((*PROMPT, *first.ids), request_id="2", max_tokens=40))
        assert engine.board.drafted_tokens > engine.board.accepted_tokens > 0
    assert found.last.usage.cached_tokens > len(PROMPT)
    assert found.ids == expected.ids


async def test_a_prefill_worker_does_not_guess() -> None:
    async with running_engine(Stutterer(), role=Role.PREFILL) as engine:
        await collect(engine, request_of(PATTERN * 6))
        assert engine.board.drafted_tokens == 0
