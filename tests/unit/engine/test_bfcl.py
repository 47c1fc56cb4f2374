"""Answers over real function schemas: whatever the model would like to say, each is JSON and obeys its schema."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import jsonschema
import pytest

from covey.engine.limits import EngineLimits
from covey.model.runner import TorchRunner, open_runner
from covey.model.tokenizer import Tokenizer, open_tokenizer
from covey.policy.batch_limits import BatchLimits
from covey.types.generate import FinishReason, GenerateRequest
from covey.types.grammar import Grammar, GrammarKind
from tests.support.bfcl import Case, load_cases
from tests.support.engines import Answer, collect, request_of, running_engine
from tests.support.tiny_llama import write_tiny_llama

DATA = os.environ.get("COVEY_DATA")
pytestmark = [
    pytest.mark.skipif(DATA is None, reason="COVEY_DATA names no folder of data sets"),
    pytest.mark.timeout(240),
]
ON_TINY, ON_PACKAGED = 180, 20


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    assert DATA is not None
    every = load_cases(Path(DATA))
    assert len(every) > 600
    return every[:: len(every) // (ON_TINY + ON_PACKAGED)][: ON_TINY + ON_PACKAGED]


def requests(cases: Sequence[Case], tokenizer: Tokenizer, *, temperature: float) -> list[GenerateRequest]:
    """A constrained request for each case, and for every fifth a free one of the same prompt."""
    found = []
    for i, case in enumerate(cases):
        tokens = tokenizer.encode(case.question)[:200]
        options: dict[str, Any] = {"max_tokens": 1500, "temperature": temperature, "seed": i, "ignore_eos": False}
        grammar = Grammar(kind=GrammarKind.JSON_SCHEMA, body=case.schema).write()
        found.append(request_of(tokens, request_id=case.id, grammar=grammar, deadline_s=200.0, **options))
        if i % 5 == 0:
            free = options | {"max_tokens": 40}
            found.append(request_of(tokens, request_id=f"free-{case.id}", deadline_s=200.0, **free))
    return [replace(request, model="") for request in found]


async def ask(runner: TorchRunner, tokenizer: Tokenizer, asked: Sequence[GenerateRequest]) -> dict[str, Answer]:
    limits = EngineLimits(batch=BatchLimits(max_running=32, queue_max=512))
    answers: dict[str, Answer] = {}

    async def one(request: GenerateRequest) -> None:
        answers[request.request_id] = await collect(engine, request, timeout_s=200.0)

    async with running_engine(runner, vocabulary=tokenizer, limits=limits) as engine:
        async with anyio.create_task_group() as tasks:
            for request in asked:
                tasks.start_soon(one, request)
    return answers


def check(cases: Sequence[Case], answers: dict[str, Answer]) -> None:
    for case in cases:
        answer = answers[case.id]
        assert answer.last.reason is FinishReason.STOP, (case, answer.text)
        jsonschema.validate(json.loads(answer.text), case.schema)
    free = [answer for name, answer in answers.items() if name.startswith("free-")]
    assert free
    assert all(answer.last.reason in (FinishReason.STOP, FinishReason.LENGTH) for answer in free)


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[TorchRunner, Tokenizer]:
    model = str(write_tiny_llama(tmp_path / "model"))
    return open_runner(model, cache_dir=tmp_path, n_blocks=2048, block_size=32), open_tokenizer(model)


@pytest.fixture
def packaged(packaged_cache: Path) -> tuple[TorchRunner, Tokenizer]:
    return open_runner("smollm2", cache_dir=packaged_cache, n_blocks=400, block_size=32), open_tokenizer("smollm2")


async def test_a_random_model_obeys_180_schemas(cases: list[Case], tiny: tuple[TorchRunner, Tokenizer]) -> None:
    runner, tokenizer = tiny
    chosen = cases[:ON_TINY]
    check(chosen, await ask(runner, tokenizer, requests(chosen, tokenizer, temperature=1.0)))


async def test_the_packaged_model_obeys_20_schemas(cases: list[Case], packaged: tuple[TorchRunner, Tokenizer]) -> None:
    runner, tokenizer = packaged
    chosen = cases[ON_TINY:]
    assert len(chosen) == ON_PACKAGED
    check(chosen, await ask(runner, tokenizer, requests(chosen, tokenizer, temperature=0.0)))
