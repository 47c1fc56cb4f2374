"""A thousand requests at once on the real runner, with cancels at random: each ends once, nothing is left behind."""

from __future__ import annotations

import resource
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import anyio
import pytest

from covey.engine.engine import Engine
from covey.engine.limits import EngineLimits
from covey.engine.promises import Admission
from covey.model.runner import TorchRunner, open_runner
from covey.model.tokenizer import Tokenizer, open_tokenizer
from covey.policy.batch_limits import Batching, BatchLimits
from covey.types.generate import Failed, Finished, GenerateRequest, Refused
from tests.support.engines import Shelf, assert_idle, collect, is_cancelled, is_whole, plain, request_of, running_engine
from tests.support.tiny_llama import write_tiny_llama

REQUESTS = 1000
OUTPUT = 12
GROWTH_KIB = 24 << 10
"""By what a second thousand may raise the peak of memory: caches that had not filled yet, and noise."""


@dataclass
class Seen:
    """What became of the requests."""

    ends: Counter[str] = field(default_factory=Counter)
    broken: list[Any] = field(default_factory=list)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def runner(model: Path) -> TorchRunner:
    return open_runner(str(model), cache_dir=model.parent / "cache", n_blocks=160, block_size=16)


@pytest.fixture
def vocabulary(model: Path) -> Tokenizer:
    return open_tokenizer(str(model))


def requests(rng: Random) -> list[GenerateRequest]:
    """Prompts of 1 to 120 tokens; half of them begin like others do."""
    shared = [[rng.randrange(250) for _ in range(64)] for _ in range(5)]
    found = []
    for index in range(REQUESTS):
        beginning = rng.choice(shared)[: rng.randrange(65)] if rng.random() < 0.5 else []
        tokens = [*beginning, *(rng.randrange(250) for _ in range(rng.randrange(1, 56)))]
        fields = {"temperature": 0.8, "seed": index} if index % 3 == 0 else {}
        request = request_of(tokens, request_id=f"r{index}", max_tokens=OUTPUT, deadline_s=120.0, **fields)
        found.append(plain(request, model=""))
    return found


async def crowd(engine: Engine, rng: Random) -> Seen:
    seen = Seen()

    async def ask(request: GenerateRequest, patience: int | None) -> None:
        answer = await _until(engine, request, patience)
        if answer is None:
            seen.ends["left"] += 1
        elif not is_whole(answer) or isinstance(answer.last, Failed | Refused):
            seen.broken.append(answer.last)
        else:
            seen.ends["cancelled" if is_cancelled(answer) else "finished"] += 1
            if isinstance(answer.last, Finished) and not is_cancelled(answer) and len(answer.ids) != OUTPUT:
                seen.broken.append(answer)

    async with anyio.create_task_group() as tg:
        for request in requests(rng):
            tg.start_soon(ask, request, rng.choice([None, None, None, rng.randrange(400)]))
    return seen


async def _until(engine: Engine, request: GenerateRequest, patience: int | None) -> Any:
    """Read a stream to its end; the impatient cancel, or just leave, after so many turns of the event loop."""
    if patience is None:
        return await collect(engine, request)
    found: list[Any] = []
    async with anyio.create_task_group() as tg:

        async def read() -> None:
            found.append(await collect(engine, request))

        tg.start_soon(read)
        for _ in range(patience):
            await anyio.lowlevel.checkpoint()
        if patience % 2:
            await engine.cancel(request.request_id)
        else:
            tg.cancel_scope.cancel()
    return found[0] if found else None


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize(("batching", "admission"), [("fcfs", "reserve"), ("flow", "past_future")])
async def test_a_thousand_requests_with_random_cancels(
    batching: Batching, admission: Admission, runner: TorchRunner, vocabulary: Tokenizer
) -> None:
    limits = EngineLimits(
        batch=BatchLimits(batching=batching, max_running=48, max_tokens=256, queue_max=REQUESTS),
        admission=admission,
        grace_s=0.01,
        handover_ttl_s=1.0,
    )
    shelf = Shelf()
    async with running_engine(runner, vocabulary=vocabulary, limits=limits, store=shelf) as engine:
        await crowd(engine, Random(1))  # fills the caches, of the engine and of the interpreter
        await assert_idle(engine)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        seen = await crowd(engine, Random(2))
        await assert_idle(engine)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert not seen.broken
        assert sum(seen.ends.values()) == REQUESTS
        assert min(seen.ends["finished"], seen.ends["cancelled"], seen.ends["left"]) > 20, seen.ends
        assert grown < GROWTH_KIB
        assert shelf.stats.leases == shelf.stats.private_blocks == 0
