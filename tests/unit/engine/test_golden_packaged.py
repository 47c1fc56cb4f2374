"""Promise 9 on the packaged model by teacher forcing: chunks, layers, interrupts, swaps, cached prefixes, guesses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from covey.engine.engine import Engine
from covey.engine.limits import EngineLimits
from covey.model.runner import TorchRunner, open_runner
from covey.model.source import resolve
from covey.model.tokenizer import Tokenizer, open_tokenizer
from covey.policy.batch_limits import BatchLimits
from tests.support.engines import Shelf, collect, is_whole, plain, request_of, running_engine
from tests.support.reference_model import load_reference
from tests.support.teacher import Teacher

pytestmark = [pytest.mark.golden, pytest.mark.slow, pytest.mark.timeout(400)]

OUTPUT = 20
TEXT = "The river rises in the mountains. The river flows to the sea. The river rises in the"
PROMPTS = (TEXT, "Count: one, two, three, one, two, three, one,", "A list of colours: red, green, blue, " * 3)


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return Teacher(load_reference(resolve("smollm2").path))


@pytest.fixture(scope="module")
def runner(packaged_cache: Path) -> Iterator[TorchRunner]:
    made = open_runner("smollm2", cache_dir=packaged_cache, n_blocks=14, block_size=8)
    yield made
    made.close()


@pytest.fixture(scope="module")
def vocabulary() -> Tokenizer:
    return open_tokenizer("smollm2")


LIMITS: dict[str, dict[str, Any]] = {
    "chunked": {"batch": BatchLimits(max_tokens=24, max_running=8, chunk_min=8)},
    "layered": {"batch": BatchLimits(batching="layered", chunk_min=8)},
    "flow": {"batch": BatchLimits(batching="flow")},
    "swapped": {"admission": "past_future"},
}


@pytest.mark.parametrize("path", LIMITS)
async def test_the_packaged_model_is_greedy_like_transformers_on_every_path(
    path: str, runner: TorchRunner, vocabulary: Tokenizer, teacher: Teacher
) -> None:
    limits = EngineLimits(**({"grace_s": 0.0} | LIMITS[path]))
    asked = {f"p{i}": vocabulary.encode(text) for i, text in enumerate(PROMPTS)}
    answers: list[tuple[str, tuple[int, ...]]] = []
    async with running_engine(runner, vocabulary=vocabulary, limits=limits, store=Shelf(512 << 20)) as engine:

        async def ask(name: str) -> None:
            request = request_of(asked[name], request_id=name, max_tokens=OUTPUT)
            answer = await collect(engine, plain(request, model=""), timeout_s=200)
            assert is_whole(answer), answer.last
            answers.append((name, answer.ids))

        if path == "swapped":
            await _teach(engine)
        for _ in range(2):  # the second round begins with cached, or stored, prefixes
            async with anyio.create_task_group() as tg:
                for name in asked:
                    tg.start_soon(ask, name)
        assert (engine.board.preemptions > 0) == (path == "swapped")
        assert engine.board.accepted_tokens > 0, "these texts repeat themselves"
    for name, ids in answers:
        assert len(ids) == OUTPUT
        tally = teacher.judge(asked[name], ids)
        assert tally.wrong == 0, f"{name}: {tally}"


async def _teach(engine: Engine) -> None:
    """Show the engine so many short answers that it expects no others."""
    for index in range(17):
        request = request_of((index + 5, 7), request_id=f"short{index}", max_tokens=2)
        await collect(engine, plain(request, model=""), timeout_s=100)
