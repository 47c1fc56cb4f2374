"""Promise 9 through the whole mesh: HTTP → gateway → prefill → kvstore → decode equals transformers, token by token."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import httpx
import pytest

from benchmarks.prompts import chat_prompts
from covey.cli.mesh import Mesh
from covey.model.source import resolve
from covey.model.tokenizer import open_tokenizer
from tests.support.meshes import PACKAGED, chat_body, client_of, mesh_of
from tests.support.reference_model import load_reference
from tests.support.teacher import Tally, Teacher

pytestmark = [pytest.mark.e2e, pytest.mark.golden, pytest.mark.timeout(900)]

TOKENS = 48
AT_ONCE = 8


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return Teacher(load_reference(resolve(PACKAGED).path))


def _prompts() -> list[str]:
    data = os.environ.get("COVEY_DATA")
    return chat_prompts(Path(data) if data else None)


async def _answers(mesh: Mesh, prompts: Sequence[str]) -> list[dict[str, Any]]:
    """Ask every prompt, eight at a time."""
    answers: list[dict[str, Any]] = [{}] * len(prompts)
    permits = anyio.CapacityLimiter(AT_ONCE)

    async def ask(client: httpx.AsyncClient, index: int) -> None:
        body = chat_body(PACKAGED, prompts[index], max_tokens=TOKENS, ignore_eos=False, return_token_ids=True)
        async with permits:
            response = await client.post("/v1/chat/completions", json=body)
        assert response.status_code == httpx.codes.OK, response.text
        answers[index] = response.json()

    async with client_of(mesh) as client, anyio.create_task_group() as tasks:
        for index in range(len(prompts)):
            tasks.start_soon(ask, client, index)
    return answers


def _judge(teacher: Teacher, prompts: Sequence[str], answers: Sequence[dict[str, Any]]) -> Tally:
    tokenizer = open_tokenizer(PACKAGED)
    total = Tally()
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = tokenizer.encode_chat([{"role": "user", "content": prompt}])
        assert answer["usage"]["prompt_tokens"] == len(ids)
        tally = teacher.judge(ids, answer["choices"][0]["token_ids"])
        total.matched += tally.matched
        total.ties += tally.ties
        total.wrong += tally.wrong
    return total


def _check_path(answers: Sequence[dict[str, Any]], *, split: bool | None, warm: bool) -> None:
    """No answer came from semcache; where the split is forced, blocks moved; where it is warm, prefixes hit."""
    for answer in answers:
        assert answer["covey"]["cache"] == "bypass"
        if split is not None:
            assert answer["covey"]["split"] is split
        if split:
            assert answer["covey"]["blocks_moved"] > 0
    if warm:
        long = [a for a in answers if a["usage"]["prompt_tokens"] > 32 + 1]
        assert long, "no prompt fills a block: the warm run would show nothing"
        for answer in long:
            assert answer["covey"]["cached_tokens"] + answer["covey"]["loaded_tokens"] > 0


CASES = [("always", 1), ("auto", 2)]
if os.environ.get("COVEY_SOAK"):
    CASES += [("always", 2), ("auto", 1), ("never", 1)]


@pytest.mark.parametrize(("split", "workers"), CASES)
async def test_the_mesh_speaks_the_tokens_of_the_reference(
    split: str, workers: int, tmp_path: Path, packaged_cache: Path, teacher: Teacher, record_property: Any
) -> None:
    prompts = _prompts()
    plan: dict[str, Any] = {"prefill": workers, "decode": workers, "kvstore": workers}
    settings = (f"gateway.routing.split={split}",)
    async with mesh_of(tmp_path, model=PACKAGED, cache_dir=packaged_cache, settings=settings, **plan) as mesh:
        for warm in (False, True):
            answers = await _answers(mesh, prompts)
            _check_path(answers, split=True if split == "always" else None, warm=warm)
            tally = await anyio.to_thread.run_sync(_judge, teacher, prompts, answers)
            record_property("golden", f"{split} {workers} {'warm' if warm else 'cold'}: {tally}")
            print(f"split={split}, {workers} of each, {'warm' if warm else 'cold'}: {tally}")
            assert tally.wrong == 0
            assert tally.matched > len(prompts)
