"""Two models behind one name: near-misses reach the small one, outcomes teach, and both survive their semcache."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from covey.auth import MeshToken
from covey.cli.files import LOCAL_TENANT, MeshFiles
from covey.cli.mesh import Mesh, MeshPlan, running
from covey.codec.methods import SemCache
from covey.net.channels import Channel
from covey.policy.example_choice import INSTRUCTION
from covey.testing import assert_eventually
from covey.types.common import Empty
from covey.types.ids import TenantId
from covey.types.semcache import CacheQuery, RouteQuery
from services.semcache.mesh_judge import COMPARED, MeshJudge
from services.semcache.shadow import Sampled
from tests.support.meshes import client_of
from tests.support.tiny_llama import write_tiny_llama

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.timeout(180)]

MODELS = ("tiny", "other")
PATIENT = """\
[gateway.in_context]
models = ["tiny", "other"]
deadline_s = 10.0
example_tokens_max = 200
[semcache]
encode_s = 10.0
judge_model = "tiny"
"""
ASKED = "how do I list the open ports of this machine"
ROUNDS = 12


async def test_two_models_behind_one_name(tmp_path: Path) -> None:
    async with running(_plan(tmp_path)) as mesh, client_of(mesh) as client, _semcache_of(mesh) as semcache:
        await assert_eventually(lambda: _is_encoding(semcache), timeout_s=60)
        await _ask(client, "other", "how do I list the open files of this machine")
        await assert_eventually(lambda: _examples(semcache), timeout_s=20)

        first = await _ask(client, "auto", ASKED)
        assert first["model"] == "tiny", "nothing is known yet: the cheapest answers"
        bare = await _ask(client, "tiny", ASKED)
        shown = first["usage"]["prompt_tokens"] - bare["usage"]["prompt_tokens"]
        assert shown > len(INSTRUCTION) + len("how do I list the open files of this machine"), "a token is a byte"
        assert await _is_close(semcache), "one outcome is not enough to be sure"

        for i in range(ROUNDS):
            before = await _answered(client, "other")
            answer = await _ask(client, "auto", ASKED, seed=i)
            if answer["model"] == "tiny" and await _is_close(semcache):
                await assert_eventually(partial(_has_grown, client, before), timeout_s=20)
        await assert_eventually(lambda: _is_sure(semcache), timeout_s=20)

        await _the_judge_is_answered(mesh, client)

        mesh.children["semcache-0"].process.kill()
        orphan = await _ask(client, "auto", ASKED)
        assert orphan["model"] == "other", "without help the dearest model answers"
        assert orphan["usage"]["prompt_tokens"] == bare["usage"]["prompt_tokens"]


@asynccontextmanager
async def _semcache_of(mesh: Mesh) -> AsyncIterator[Channel]:
    token = MeshToken(mesh.plan.files.mesh_token_file.read_text())
    async with Channel.open(mesh.semcache, token=token) as channel:
        yield channel


async def _the_judge_is_answered(mesh: Mesh, client: httpx.AsyncClient) -> None:
    """A random model's verdicts are worth nothing; that the gateway takes the judge's questions is."""
    hits = [
        Sampled(category="faq", entry=t, asked=f"{t}?", stored=t, answer=f"as for {t}", tenant=TenantId(LOCAL_TENANT))
        for t in ("ports", "files", "users", "disks")
    ]
    before = await _answered(client, "tiny")
    token = MeshToken(mesh.plan.files.mesh_token_file.read_text())
    async with Channel.open(mesh.grpc, token=token) as gateway:
        judge = MeshJudge(lambda: gateway, "tiny", timeout_s=30.0)
        assert [await judge.judge(hit) for hit in hits][:3] == [None] * 3, "nothing to compare with"
    assert await _answered(client, "tiny") == before + 2 * COMPARED, "each reference in both orders"


def _plan(folder: Path) -> MeshPlan:
    base = folder / "covey.toml"
    base.write_text(PATIENT)
    return MeshPlan(
        files=MeshFiles(run_dir=folder / "run", cache_dir=folder / "cache", base=base),
        models={name: str(write_tiny_llama(folder / name, seed=seed)) for seed, name in enumerate(MODELS)},
        restart=False,
    )


async def _ask(client: httpx.AsyncClient, model: str, text: str, **options: Any) -> dict[str, Any]:
    """An answer of a few tokens that a seed determines: another seed, another request to the exact cache."""
    body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 8, "seed": 0, **options}
    reply = await client.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


async def _is_encoding(semcache: Channel) -> bool:
    return (await semcache.call(SemCache.STATS, Empty(), timeout_s=5)).encoder_ready


async def _examples(semcache: Channel) -> int:
    query = CacheQuery(tenant=TenantId(LOCAL_TENANT), model="other", text=ASKED, examples_max=3)
    return len((await semcache.call(SemCache.LOOKUP, query, timeout_s=10)).examples)


async def _is_close(semcache: Channel) -> bool:
    query = RouteQuery(tenant=TenantId(LOCAL_TENANT), text=ASKED, models=MODELS)
    return bool((await semcache.call(SemCache.ROUTE, query, timeout_s=10)).second)


async def _is_sure(semcache: Channel) -> bool:
    return not await _is_close(semcache)


async def _answered(client: httpx.AsyncClient, model: str) -> float:
    text = (await client.get("/metrics")).text
    lines = [line for line in text.splitlines() if "requests_total" in line and f'model="{model}"' in line]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


async def _has_grown(client: httpx.AsyncClient, before: float) -> bool:
    return await _answered(client, "other") > before
