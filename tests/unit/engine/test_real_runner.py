"""The engine over the real runner and a tiny random Llama: whatever path a request takes, its tokens are the same."""

from __future__ import annotations

from pathlib import Path
from random import Random

import anyio
import pytest

from covey.engine.limits import EngineLimits
from covey.model.runner import TorchRunner, open_runner
from covey.model.tokenizer import Tokenizer, open_tokenizer
from covey.policy.batch_limits import BatchLimits
from covey.types.generate import GenerateRequest, Handover, Resume, Role
from tests.support.engines import Shelf, collect, is_whole, plain, request_of, running_engine
from tests.support.tiny_llama import write_tiny_llama

LENGTHS = (1, 15, 16, 33, 100)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def runners(model: Path) -> list[TorchRunner]:
    return [open_runner(str(model), cache_dir=model / "cache", n_blocks=64, block_size=16) for _ in range(3)]


@pytest.fixture
def vocabulary(model: Path) -> Tokenizer:
    return open_tokenizer(str(model))


def requests() -> list[GenerateRequest]:
    rng = Random(3)
    return [
        plain(
            request_of(
                [rng.randrange(250) for _ in range(length)],
                request_id=f"{length}-{temperature}",
                max_tokens=24,
                temperature=temperature,
                seed=length,
            ),
            model="",
        )
        for length in LENGTHS
        for temperature in (0.0, 0.8)
    ]


async def test_split_batched_chunked_cached_and_resumed_runs_agree(
    runners: list[TorchRunner], vocabulary: Tokenizer
) -> None:
    async with running_engine(runners[0], vocabulary=vocabulary) as engine:
        expected = {request.request_id: await collect(engine, request) for request in requests()}
    assert len({answer.ids for answer in expected.values()}) > len(LENGTHS)
    shelf = Shelf()
    limits = EngineLimits(batch=BatchLimits(max_tokens=24, max_running=8, chunk_min=8))
    async with (
        running_engine(
            runners[1], role=Role.PREFILL, vocabulary=vocabulary, limits=limits, store=shelf, name="p"
        ) as prefill,
        running_engine(runners[2], vocabulary=vocabulary, limits=limits, store=shelf, name="d") as decode,
    ):
        for attempt in range(2):  # the second round hits the prefix caches

            async def run(request: GenerateRequest) -> None:
                first = await collect(prefill, request)
                assert isinstance(first.last, Handover)
                rest = await collect(decode, plain(request, ticket=first.last.ticket))
                whole = expected[request.request_id]
                assert first.ids + rest.ids == whole.ids
                assert first.text + rest.text == whole.text
                assert rest.last.usage.loaded_tokens + rest.last.usage.cached_tokens == len(request.token_ids)
                await prefill.cancel(request.request_id)

            async with anyio.create_task_group() as tg:
                for request in requests():
                    tg.start_soon(run, plain(request, attempt=attempt))
        for request in requests():
            whole = expected[request.request_id]
            resume = Resume(emitted=whole.ids[:9], text_offset=len("".join(e.text for e in whole.tokens[:9])))
            rest = await collect(decode, plain(request, resume=resume, attempt=2))
            assert whole.ids[:9] + rest.ids == whole.ids
            assert is_whole(rest, start=9)
