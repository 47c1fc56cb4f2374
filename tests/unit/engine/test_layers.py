"""Layers of stored blocks come in bursts, break off, or turn out bad: tokens are right, and nobody waits for them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import anyio
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from covey.engine.fake import FakeRunner
from covey.engine.limits import EngineLimits
from covey.model.plan import Interrupt, Row, SampleSpec, StepOutcome, StepPlan
from covey.policy.batch_limits import Batching, BatchLimits
from covey.testing import assert_eventually
from covey.types.generate import Finished, GenerateRequest, Handover, Role
from tests.support.bursts import RUBBISH, Bursts
from tests.support.engines import (
    Answer,
    assert_idle,
    collect,
    is_cancelled,
    is_whole,
    plain,
    request_of,
    running_engine,
)

LAYERS = 6
OUTPUT = 6
_RUBBISH = np.uint64(int.from_bytes(bytes([RUBBISH] * 8), "little"))


class Wary(FakeRunner):
    """A runner that looks, at each layer, whether the keys before a row are there: attention would read them."""

    def __init__(self, *, n_blocks: int = 64, step_s: float = 0.0) -> None:
        super().__init__(layers=LAYERS, n_blocks=n_blocks, step_s=step_s)
        self.ranges: list[tuple[int, int]] = []
        """Layers of the rows that did not run through all of them at once."""
        self.whole_rows = 0

    def step(self, plan: StepPlan, interrupt: Interrupt | None = None) -> StepOutcome:
        for row in plan.rows:
            end = LAYERS if row.last_layer is None else row.last_layer
            if (row.first_layer, end) == (0, LAYERS):
                self.whole_rows += 1
            else:
                self.ranges.append((row.first_layer, end))
        return super().step(plan, interrupt)

    def _write(self, row: Row, layer: int) -> None:
        seen = self._keys[list(row.blocks), layer].reshape(-1)[: row.start]
        assert (seen != _RUBBISH).all(), f"layer {layer} is computed before its keys are there"
        super()._write(row, layer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    length: int
    shared: int
    """Tokens that it has in common with the others."""
    handed_over: bool
    cancelled_at: int | None

    def request(self, index: int) -> GenerateRequest:
        own = [(index * 37 + i * i) % 250 + 1 for i in range(self.length)]
        return request_of([*range(1, self.shared + 1), *own], request_id=f"r{index}", max_tokens=OUTPUT)


@cache
def expected(prompt: tuple[int, ...]) -> tuple[int, ...]:
    """The answer of a runner that does nothing else."""
    runner, blocks, tokens = FakeRunner(layers=LAYERS, n_blocks=32), tuple(range(32)), prompt
    for _ in range(OUTPUT):
        row = Row(seq=1, tokens=tokens, start=0, blocks=blocks, sample=SampleSpec(position=len(tokens)))
        (sampled,) = runner.step(StepPlan(rows=(row,))).sampled
        tokens = (*tokens, sampled.draws[0].token)
    return tokens[len(prompt) :]


CALLS = st.builds(
    Call,
    length=st.integers(1, 70),
    shared=st.sampled_from([0, 8, 20, 32]),
    handed_over=st.booleans(),
    cancelled_at=st.none() | st.none() | st.integers(0, 200),
)


@given(
    calls=st.lists(CALLS, min_size=1, max_size=5),
    batching=st.sampled_from(["fcfs", "layered", "flow", "laps"]),
    max_tokens=st.sampled_from([12, 64]),
    damage=st.sampled_from([0.0, 0.5]),
    n_blocks=st.sampled_from([24, 64]),
    seed=st.integers(0, 1 << 20),
)
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow], phases=(Phase.reuse, Phase.generate))
def test_any_arrival_of_layers_gives_the_same_tokens(
    calls: list[Call], batching: Batching, max_tokens: int, damage: float, n_blocks: int, seed: int
) -> None:
    batch = BatchLimits(batching=batching, max_tokens=max_tokens, max_running=5, chunk_min=8)
    limits = EngineLimits(batch=batch, admission="past_future", grace_s=0.0, layers_min_bytes=0)
    store = Bursts(seed, layers=LAYERS, damage=damage)
    anyio.run(_run, calls, limits, store, n_blocks)


async def _run(calls: list[Call], limits: EngineLimits, store: Bursts, n_blocks: int) -> None:
    """All prompts go through a prefill engine; the decode engine gets them with their tickets, or finds what it can."""
    answers: dict[int, Answer] = {}
    async with (
        running_engine(Wary(), role=Role.PREFILL, store=store, name="p") as prefill,
        running_engine(Wary(n_blocks=n_blocks), limits=limits, store=store, name="d") as decode,
    ):

        async def ask(index: int, call: Call) -> None:
            request = call.request(index)
            first = await collect(prefill, request)
            assert isinstance(first.last, Handover)
            if call.handed_over:
                request = plain(request, ticket=first.last.ticket)
            answer = answers[index] = await collect(decode, request, timeout_s=20)
            if call.handed_over:
                answer.events.insert(0, first.last.first)
            await prefill.cancel(request.request_id)

        async def cancel(index: int, call: Call) -> None:
            if call.cancelled_at is not None:
                for _ in range(call.cancelled_at):
                    await anyio.lowlevel.checkpoint()
                await decode.cancel(call.request(index).request_id)

        async with anyio.create_task_group() as tg:
            for index, call in enumerate(calls):
                tg.start_soon(ask, index, call)
                tg.start_soon(cancel, index, call)
        await assert_idle(decode)
        await assert_idle(prefill)
        await assert_eventually(lambda: store.stats.leases == store.stats.private_blocks == 0)
    for index, call in enumerate(calls):
        answer, whole = answers[index], expected(call.request(index).token_ids)
        assert is_whole(answer), answer.last
        if is_cancelled(answer):
            assert call.cancelled_at is not None
            assert answer.ids == whole[: len(answer.ids)]
        else:
            assert isinstance(answer.last, Finished)
            assert answer.ids == whole


@pytest.mark.parametrize("loading", ["layers", "whole"])
async def test_a_row_runs_through_the_layers_that_are_there_and_waits_for_the_others(loading: str) -> None:
    store, runner = Bursts(3, layers=LAYERS, turns_max=200), Wary()
    limits = EngineLimits(loading=loading, layers_min_bytes=0)  # type: ignore[arg-type]
    request = request_of(range(1, 60), max_tokens=OUTPUT)
    async with (
        running_engine(Wary(), role=Role.PREFILL, store=store, name="p") as prefill,
        running_engine(runner, store=store, name="d", limits=limits) as decode,
    ):
        first = await collect(prefill, request)
        rest = await collect(decode, plain(request, ticket=first.last.ticket))
    assert first.ids + rest.ids == expected(request.token_ids)
    timings = rest.last.timings
    assert 0 < timings.kv_wait_s <= timings.lookup_s + timings.transfer_s + 0.1
    if loading == "whole":
        assert runner.ranges == []
        return
    starts, ends = [first for first, _ in runner.ranges], [end for _, end in runner.ranges]
    assert len(runner.ranges) > 1
    assert starts == [0, *ends[:-1]], "each range begins where the one before ended"
    assert ends[-1] == LAYERS
    assert runner.computed == OUTPUT - 1


async def test_the_others_decode_on_while_one_waits_for_its_layers() -> None:
    store, runner = Bursts(5, layers=LAYERS, turns_max=2000), Wary(step_s=0.001)
    slow = request_of(range(1, 60), request_id="slow", max_tokens=OUTPUT)
    other = request_of(range(100, 140), request_id="other", max_tokens=150)
    async with (
        running_engine(Wary(), role=Role.PREFILL, store=store, name="p") as prefill,
        running_engine(runner, store=store, name="d", limits=EngineLimits(layers_min_bytes=0)) as decode,
    ):
        ticket = (await collect(prefill, slow)).last.ticket
        answers: dict[str, Answer] = {}

        async def ask(request: GenerateRequest) -> None:
            answers[request.request_id] = await collect(decode, request)

        async with anyio.create_task_group() as tg:
            tg.start_soon(ask, other)
            await assert_eventually(lambda: runner.whole_rows > 5, every_s=0.001)
            tg.start_soon(ask, plain(slow, ticket=ticket))
            await assert_eventually(lambda: runner.ranges, every_s=0.001)
            rows = runner.whole_rows
            await assert_eventually(lambda: runner.whole_rows > rows + 3 or "slow" in answers, every_s=0.001)
            assert "slow" not in answers, "its layers were to come slowly"
    assert answers["slow"].ids == expected(slow.token_ids)[1:]
    assert len(answers["other"].ids) == 150
