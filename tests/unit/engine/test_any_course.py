"""Whatever the policy, the pool, the store, the readers and the cancels: tokens are right, ends are single, nothing
stays.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, get_args

import anyio
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from covey.engine.fake import FakeRunner
from covey.engine.limits import EngineLimits
from covey.engine.promises import Admission
from covey.model.plan import Draw, Row, SampleSpec, StepPlan
from covey.policy.batch_limits import Batching, BatchLimits
from covey.policy.speculation import SpeculationLimits
from covey.testing import assert_eventually
from covey.types.generate import Failed, Finished, FinishReason, GenerateRequest
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

LAYERS = 4


class Parrot(FakeRunner):
    """Half the time says what it said six tokens before, so that guesses often hold."""

    def _draw(self, row: Row, spec: SampleSpec) -> Draw:
        drawn = super()._draw(row, spec)
        if drawn.token % 4 == 0 or spec.banned:
            return drawn
        return replace(drawn, token=(11, 42, 17, 3, 55, 28)[spec.position % 6])


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    prompt: tuple[int, ...]
    max_tokens: int
    priority: int
    starts_at: int
    """Turns of the event loop before it is asked."""
    cancelled_at: int | None

    def request(self, index: int) -> GenerateRequest:
        return request_of(self.prompt, request_id=f"r{index}", max_tokens=self.max_tokens, priority=self.priority)


@cache
def expected(prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    """The answer, a token a step, on a runner that does nothing else."""
    runner = Parrot(layers=LAYERS, n_blocks=32)
    blocks, tokens = tuple(range(32)), prompt
    for _ in range(count):
        row = Row(seq=1, tokens=tokens, start=0, blocks=blocks, sample=SampleSpec(position=len(tokens)))
        (sampled,) = runner.step(StepPlan(rows=(row,))).sampled
        tokens = (*tokens, sampled.draws[0].token)
    return tokens[len(prompt) :]


PROMPTS = st.builds(
    lambda head, tail, times: tuple(head[:20] + tail * times)[:100],
    st.sampled_from([[1, 2, 3, 4, 5, 6, 7, 8] * 3, list(range(40, 70))]),
    st.lists(st.integers(0, 250), min_size=1, max_size=12),
    st.integers(1, 8),
)
CALLS = st.builds(
    Call,
    prompt=PROMPTS,
    max_tokens=st.integers(1, 60),
    priority=st.integers(0, 2),
    starts_at=st.integers(0, 60),
    cancelled_at=st.none() | st.none() | st.integers(0, 300),
)
LIMITS = st.builds(
    lambda batching, admission, max_tokens, max_running, guess_max, outbox: EngineLimits(
        batch=BatchLimits(
            batching=batching, max_tokens=max_tokens, max_running=max_running, chunk_min=8, prompt_tokens_max=max_tokens
        ),
        admission=admission,
        speculation=SpeculationLimits(guess_max=guess_max),
        outbox_tokens=outbox,
        grace_s=0.0,
    ),
    st.sampled_from(get_args(Batching)),
    st.sampled_from(get_args(Admission)),
    st.sampled_from([12, 40, 256]),
    st.integers(1, 10),
    st.sampled_from([0, 3, 8]),
    st.sampled_from([4, 1024]),
)


@given(
    calls=st.lists(CALLS, min_size=1, max_size=7),
    limits=LIMITS,
    n_blocks=st.integers(20, 40),
    store=st.sampled_from(["none", "good", "down", "forgets"]),
    expects_short=st.booleans(),
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow], phases=(Phase.reuse, Phase.generate))
def test_any_course_ends_well(
    calls: list[Call], limits: EngineLimits, n_blocks: int, store: str, expects_short: bool
) -> None:
    anyio.run(_run, calls, limits, n_blocks, store, expects_short)


async def _run(calls: list[Call], limits: EngineLimits, n_blocks: int, store: str, expects_short: bool) -> None:
    shelf = Shelf()
    shelf.is_down, shelf.forgets = store == "down", store == "forgets"
    runner = Parrot(layers=LAYERS, n_blocks=n_blocks)
    answers: dict[int, Answer] = {}
    async with running_engine(runner, limits=limits, store=None if store == "none" else shelf) as engine:
        if expects_short:
            for index in range(17):
                await collect(engine, request_of((index, 1), request_id=f"s{index}", max_tokens=1))

        async def ask(index: int, call: Call) -> None:
            await _turns(call.starts_at)
            answers[index] = await collect(engine, call.request(index), timeout_s=20)

        async def cancel(index: int, call: Call) -> None:
            if call.cancelled_at is not None:
                await _turns(call.starts_at + call.cancelled_at)
                await engine.cancel(call.request(index).request_id)

        async with anyio.create_task_group() as tg:
            for index, call in enumerate(calls):
                tg.start_soon(ask, index, call)
                tg.start_soon(cancel, index, call)
        await assert_idle(engine)
        assert runner.suspended == 0
        await assert_eventually(lambda: shelf.stats.leases == shelf.stats.private_blocks == 0)
    for index, call in enumerate(calls):
        _check(call, answers[index])


def _check(call: Call, answer: Answer) -> None:
    last: Any = answer.last
    assert not isinstance(last, Failed), last
    assert is_whole(answer)
    whole = expected(call.prompt, call.max_tokens)
    if is_cancelled(answer):
        assert call.cancelled_at is not None
        assert answer.ids == whole[: len(answer.ids)]
    else:
        assert isinstance(last, Finished)
        assert last.reason is FinishReason.LENGTH
        assert answer.ids == whole


async def _turns(count: int) -> None:
    for _ in range(count):
        await anyio.lowlevel.checkpoint()
