"""Promise 9: whatever path a request takes through the engine, its greedy tokens are those of transformers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from random import Random
from typing import Any

import anyio
import pytest

from covey.engine.engine import Engine
from covey.engine.limits import EngineLimits
from covey.model.plan import Interrupt, StepOutcome, StepPlan
from covey.model.runner import TorchRunner, open_runner
from covey.model.tokenizer import Tokenizer, open_tokenizer
from covey.policy.batch_limits import BatchLimits
from covey.policy.speculation import SpeculationLimits
from covey.types.generate import GenerateRequest, Handover, Role
from tests.support.bursts import Bursts
from tests.support.engines import Shelf, assert_idle, collect, is_whole, plain, request_of, running_engine
from tests.support.families import FAMILIES, write_reference
from tests.support.teacher import Teacher
from tests.support.tiny_llama import VOCAB_SIZE

pytestmark = [pytest.mark.golden, pytest.mark.timeout(300)]

N_LAYERS = 4
OUTPUT = 24
CHUNKED = BatchLimits(max_tokens=64, max_running=16, chunk_min=16)
Answers = dict[str, tuple[int, ...]]


@dataclass
class Often:
    """An interrupt that is preempted at every third look, as if somebody urgent came all the time."""

    inner: Interrupt
    looks: int = 0

    def cancelled(self) -> Collection[int]:
        return self.inner.cancelled()

    def is_preempted(self) -> bool:
        self.looks += 1
        return self.looks % 3 == 0 or self.inner.is_preempted()


@dataclass
class Spy:
    """A runner that counts what it was asked for, and is preempted in between if it is `nervous`."""

    inner: TorchRunner
    nervous: bool = False
    suspended: int = 0
    drafts: int = 0
    chunks: list[int] = field(default_factory=list)

    def step(self, plan: StepPlan, interrupt: Interrupt | None = None) -> StepOutcome:
        if self.nervous and interrupt is not None:
            interrupt = Often(interrupt)
        outcome = self.inner.step(plan, interrupt)
        self.suspended += len(outcome.suspended)
        self.drafts += sum(row.draft for row in plan.rows)
        self.chunks += [len(row.tokens) for row in plan.rows if row.start and len(row.tokens) - row.draft > 1]
        return outcome

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@dataclass
class Model:
    """One family's model, in both implementations."""

    teacher: Teacher
    vocabulary: Tokenizer
    roomy: TorchRunner
    other: TorchRunner
    tight: TorchRunner

    @asynccontextmanager
    async def engine(self, spy: Spy, batch: BatchLimits | None = None, **options: Any) -> AsyncIterator[Engine]:
        bounds: Any = {name: options.pop(name) for name in tuple(options) if name in EngineLimits.__dataclass_fields__}
        limits = EngineLimits(batch=batch or BatchLimits(), grace_s=0.0, layers_min_bytes=0, **bounds)
        runner: Any = spy
        async with running_engine(runner, vocabulary=self.vocabulary, limits=limits, **options) as engine:
            yield engine
            await assert_idle(engine)


def requests() -> list[GenerateRequest]:
    """Prompts of many lengths, each of which repeats itself in part."""
    rng = Random(11)
    found = []
    for index in range(8):
        phrase = [rng.randrange(VOCAB_SIZE) for _ in range(5 + 3 * index)]
        noise = [rng.randrange(VOCAB_SIZE) for _ in range(9 * index)]
        tokens = [*phrase, *noise, *phrase, *phrase[:3]]
        found.append(plain(request_of(tokens, request_id=f"p{index}", max_tokens=OUTPUT), model=""))
    return found


async def ask_all(engine: Engine) -> Answers:
    answers: Answers = {}

    async def ask(request: GenerateRequest) -> None:
        answer = await collect(engine, request)
        assert is_whole(answer), answer.last
        answers[request.request_id] = answer.ids

    async with anyio.create_task_group() as tg:
        for request in requests():
            tg.start_soon(ask, request)
    return answers


async def chunked(model: Model) -> Answers:
    spy = Spy(model.roomy)
    async with model.engine(spy, CHUNKED, speculation=SpeculationLimits(guess_max=0)) as engine:
        answers = await ask_all(engine)
    assert len(spy.chunks) > 4
    assert spy.drafts == spy.suspended == 0
    return answers


async def layered(model: Model) -> Answers:
    spy = Spy(model.roomy)
    async with model.engine(spy, BatchLimits(batching="layered", chunk_min=64)) as engine:
        answers = await ask_all(engine)
    assert spy.suspended > 4
    return answers


async def flow(model: Model) -> Answers:
    spy = Spy(model.roomy, nervous=True)
    async with model.engine(spy, BatchLimits(batching="flow")) as engine:
        answers = await ask_all(engine)
    assert spy.suspended > 4
    return answers


async def laps(model: Model) -> Answers:
    async with model.engine(Spy(model.roomy), BatchLimits(batching="laps")) as engine:
        return await ask_all(engine)


async def swapped(model: Model, store: Shelf | None = None) -> Answers:
    store = store or Shelf()
    async with model.engine(Spy(model.tight), CHUNKED, admission="past_future", store=store) as engine:
        await teach(engine)
        answers = await ask_all(engine)
        assert engine.board.swapped_out > 0
    return answers


async def dropped(model: Model) -> Answers:
    async with model.engine(Spy(model.tight), CHUNKED, admission="past_future") as engine:
        await teach(engine)
        answers = await ask_all(engine)
        assert engine.board.preemptions > 0
    return answers


async def teach(engine: Engine) -> None:
    """Show the engine so many short answers that it expects no others."""
    for index in range(20):
        await collect(engine, plain(request_of((index, 5), request_id=f"short{index}", max_tokens=2), model=""))


async def cached(model: Model) -> Answers:
    spy = Spy(model.roomy)
    async with model.engine(spy) as engine:
        await ask_all(engine)
        before = engine.board.computed_tokens
        answers = await ask_all(engine)
        assert engine.board.computed_tokens - before < sum(len(r.token_ids) for r in requests())
    return answers


async def streamed(model: Model) -> Answers:
    """As split, with layers that come late and in bursts, and loads that break off."""
    store = Bursts(7, layers=N_LAYERS, damage=0.3)
    answers = await split(model, store)
    assert store.loads > store.broken > 0
    return answers


async def split(model: Model, store: Shelf | None = None) -> Answers:
    shelf, answers = store or Shelf(), {}
    async with (
        model.engine(Spy(model.roomy), CHUNKED, role=Role.PREFILL, store=shelf, name="p") as prefill,
        model.engine(Spy(model.other), CHUNKED, store=shelf, name="d") as decode,
    ):
        for request in requests():
            first = await collect(prefill, request)
            assert isinstance(first.last, Handover)
            rest = await collect(decode, plain(request, ticket=first.last.ticket))
            assert store is not None or rest.last.usage.loaded_tokens > 0 or len(request.token_ids) < 8
            answers[str(request.request_id)] = first.ids + rest.ids
            await prefill.cancel(request.request_id)
    return answers


async def speculated(model: Model) -> Answers:
    spy = Spy(model.roomy)
    async with model.engine(spy) as engine:
        answers = await ask_all(engine)
        assert 0 <= engine.board.accepted_tokens <= engine.board.drafted_tokens
    assert spy.drafts > 0
    return answers


PATHS: tuple[Callable[[Model], Awaitable[Answers]], ...] = (
    chunked,
    layered,
    flow,
    laps,
    swapped,
    dropped,
    cached,
    split,
    streamed,
    speculated,
)


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen2", "qwen3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("golden") / request.param
    config = deepcopy(FAMILIES[request.param])
    config.num_hidden_layers = N_LAYERS
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1] * N_LAYERS
    teacher = Teacher(write_reference(config, folder))

    def runner(n_blocks: int) -> TorchRunner:
        return open_runner(str(folder), cache_dir=folder.parent / "cache", n_blocks=n_blocks, block_size=8)

    return Model(teacher, open_tokenizer(str(folder)), runner(256), runner(256), runner(24))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.__name__)
async def test_greedy_tokens_are_the_references(model: Model, path: Callable[[Model], Awaitable[Answers]]) -> None:
    answers = await path(model)
    for request in requests():
        answer = answers[request.request_id]
        assert len(answer) == OUTPUT
        tally = model.teacher.judge(request.token_ids, answer)
        assert tally.wrong == 0, f"{request.request_id}: {tally}"
