"""Two tenants never see each other: not in answers, prefixes or stored blocks, nor each other's programs and runs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from covey.auth import MeshToken, new_api_key
from covey.cli.mesh import Mesh
from covey.codec.methods import Flow, Programs, SemCache
from covey.errors import CoveyError, NotFound
from covey.net.rpc import Channel
from covey.testing import assert_eventually
from covey.types.common import Empty
from covey.types.flow import ListRuns, LlmNode, Node, RunRequest, SubmitRun, WaitRun, WatchRun, Workflow
from covey.types.program import (
    AckValues,
    CallParams,
    CancelCalls,
    GetVariable,
    Message,
    Objective,
    OpenProgram,
    ProgramRequest,
    SetVariable,
    SubmitCalls,
)
from covey.types.semcache import CacheStats
from tests.support.kv_state import snapshot
from tests.support.meshes import TINY
from tests.support.probe import Probe, mesh_in_thread, probing

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

OWNER, STRANGER = "org_1", "org_12345"
"""Names of which one begins with the other: joined without care they would meet."""
TENANTS = """
[tenants.org_1]
key_file = "{folder}/org_1.key"

[tenants.org_12345]
key_file = "{folder}/org_12345.key"

[semcache.categories.general]
mode = "semantic"
tau = 0.75
guard = false

[gateway.dispatch]
exact_deadline_s = 5.0
semantic_deadline_s = 5.0

[gateway.routing]
split = "always"
"""


@pytest.fixture(autouse=True)
def _no_blocking() -> None:
    """Off: a test's process only watches here, and grpc's channels lock when they are collected."""


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    folder = tmp_path_factory.mktemp("tenants")
    for tenant in (OWNER, STRANGER):
        (folder / f"{tenant}.key").write_text(new_api_key())
        (folder / f"{tenant}.key").chmod(0o600)
    base = folder / "covey.toml"
    base.write_text(TENANTS.format(folder=folder))
    with mesh_in_thread(folder, base=base, settings=("semcache.preload=true",)) as mesh:
        yield mesh


def key_of(mesh: Mesh, tenant: str) -> str:
    assert mesh.plan.files.base is not None
    return Path(mesh.plan.files.base.parent / f"{tenant}.key").read_text()


@asynccontextmanager
async def web(mesh: Mesh, tenant: str) -> AsyncIterator[httpx.AsyncClient]:
    headers = {"Authorization": f"Bearer {key_of(mesh, tenant)}", "x-covey-tenant": OWNER}
    async with httpx.AsyncClient(base_url=mesh.http, headers=headers, trust_env=False, timeout=60) as client:
        yield client


def rpc(address: str, mesh: Mesh, tenant: str) -> Any:
    return Channel.open(address, token=MeshToken(key_of(mesh, tenant)))


async def ask(http: httpx.AsyncClient, prompt: str, **options: Any) -> dict[str, Any]:
    """Ask greedily; returns Covey's account of the request, with the text."""
    body = {"model": TINY, "messages": [{"role": "user", "content": prompt}], "max_tokens": 8, "temperature": 0}
    response = await http.post("/v1/chat/completions", json=body | {"ignore_eos": True} | options)
    assert response.status_code == httpx.codes.OK, response.text
    answer = response.json()
    account: dict[str, Any] = answer["covey"] | {"text": answer["choices"][0]["message"]["content"]}
    return account


async def cache(probe: Probe) -> CacheStats:
    return await probe.to("semcache-0").call(SemCache.STATS, Empty(), timeout_s=5)


async def entries(probe: Probe, count: int) -> bool:
    return (await cache(probe)).entries >= count


async def test_an_answer_is_never_another_tenants(mesh: Mesh) -> None:
    prompt, paraphrase = "How do I reset my password?", "How can I reset my password?"
    async with probing(mesh) as probe, web(mesh, OWNER) as owner, web(mesh, STRANGER) as stranger:
        await assert_eventually(lambda: _is_encoding(probe), timeout_s=60)
        assert (await ask(owner, prompt))["cache"] == "miss"
        await assert_eventually(lambda: entries(probe, 1), timeout_s=10)
        before = await cache(probe)
        assert (await ask(stranger, prompt))["cache"] == "miss"
        await assert_eventually(lambda: entries(probe, 2), timeout_s=10)
        assert (await ask(stranger, "How may I reset my password?"))["cache"] == "semantic", "its own"
        after = await cache(probe)
        assert (after.exact_hits, after.semantic_hits) == (before.exact_hits, before.semantic_hits + 1)
        # The control: the owner's own cache does answer, exactly and by meaning.
        assert (await ask(owner, prompt))["cache"] == "exact"
        assert (await ask(owner, paraphrase))["cache"] == "semantic"


async def test_a_paraphrase_is_no_hit_for_another_tenant(mesh: Mesh) -> None:
    async with probing(mesh) as probe, web(mesh, OWNER) as owner, web(mesh, STRANGER) as stranger:
        await assert_eventually(lambda: _is_encoding(probe), timeout_s=60)
        held = (await cache(probe)).entries
        assert (await ask(owner, "Which trains go from Bern to Geneva?"))["cache"] == "miss"
        await assert_eventually(lambda: entries(probe, held + 1), timeout_s=10)
        assert (await ask(stranger, "Which trains run from Bern to Geneva?"))["cache"] == "miss"
        assert (await ask(owner, "Which trains run from Bern to Geneva?"))["cache"] == "semantic"


async def test_a_prefix_is_never_another_tenants(mesh: Mesh) -> None:
    prompt = "The same long beginning of two tenants' prompts. " * 8
    async with probing(mesh) as probe, web(mesh, OWNER) as owner, web(mesh, STRANGER) as stranger:
        first = await ask(owner, prompt, cache="bypass")
        assert reused(first) == 0
        foreign = await ask(stranger, prompt, cache="bypass")
        assert reused(foreign) == 0, "a tenant got another's blocks"
        assert foreign["text"] == first["text"]
        assert foreign["split"]
        # The control: the owner's second request reuses its blocks, and so does the stranger's.
        for again in (await ask(owner, prompt, cache="bypass"), await ask(stranger, prompt, cache="bypass")):
            assert reused(again) > len(prompt) // 2
            assert again["text"] == first["text"]
        stored = (await snapshot(probe.to("kvstore-0"))).entries
        hashes = [h for entry in stored for h in entry.hashes]
        assert len({entry.namespace for entry in stored}) == 2
        assert len(hashes) == len(set(hashes)), "two tenants share a stored block"
        assert len(hashes) >= 2 * (len(prompt) // 32)


def reused(account: dict[str, Any]) -> int:
    return int(account["cached_tokens"]) + int(account["loaded_tokens"])


async def test_a_program_is_not_found_by_another_tenant(mesh: Mesh) -> None:
    async with rpc(mesh.grpc, mesh, OWNER) as owner, rpc(mesh.grpc, mesh, STRANGER) as stranger:
        opened = await owner.call(Programs.OPEN, OpenProgram(idempotency_key="k"), timeout_s=5)
        program = opened.program_id
        await owner.call(Programs.SET, SetVariable(program_id=program, name="x", value="secret"), timeout_s=5)
        get = GetVariable(program_id=program, name="x", objective=Objective(), timeout_s=1.0)
        requests = (
            (Programs.SUBMIT, SubmitCalls(program_id=program, calls=())),
            (Programs.SET, SetVariable(program_id=program, name="y", value="")),
            (Programs.GET, get),
            (Programs.ACK, AckValues(program_id=program, names=("x",))),
            (Programs.FORK, ProgramRequest(program_id=program)),
            (Programs.CANCEL, CancelCalls(program_id=program)),
            (Programs.CLOSE, ProgramRequest(program_id=program)),
        )
        for method, request in requests:
            with pytest.raises(NotFound) as refused:
                await stranger.call(method, request, timeout_s=5, headers={"x-covey-tenant": OWNER})
            assert same_as_unknown(refused.value)
        with pytest.raises(NotFound):
            async with stranger.stream(Programs.STREAM, get, timeout_s=5) as events:
                await anext(events)
        mine = await stranger.call(Programs.OPEN, OpenProgram(idempotency_key="k"), timeout_s=5)
        assert not mine.existing
        assert mine.program_id != program
        # The control: the owner still finds all of it.
        assert (await owner.call(Programs.GET, get, timeout_s=5)).value == "secret"
        assert (await owner.call(Programs.OPEN, OpenProgram(idempotency_key="k"), timeout_s=5)).existing


def same_as_unknown(error: CoveyError) -> bool:
    """Whether the answer is that for an id that never was."""
    return (error.message, error.field) == ("no such program; it may have expired", "program_id")


async def test_a_run_is_not_found_by_another_tenant(mesh: Mesh) -> None:
    work = LlmNode(messages=(Message(role="user", content="hello"),), params=CallParams(max_tokens=4, temperature=0.0))
    submit = SubmitRun(idempotency_key="k", workflow=Workflow(name="w", nodes=(Node(id="a", work=work),)))
    async with rpc(mesh.flow, mesh, OWNER) as owner, rpc(mesh.flow, mesh, STRANGER) as stranger:
        run = (await owner.call(Flow.SUBMIT, submit, timeout_s=10)).run_id
        requests = (
            (Flow.GET, RunRequest(run_id=run)),
            (Flow.WAIT, WaitRun(run_id=run, timeout_s=1.0)),
            (Flow.CANCEL, RunRequest(run_id=run)),
        )
        for method, request in requests:
            with pytest.raises(NotFound):
                await stranger.call(method, request, timeout_s=5, headers={"x-covey-tenant": OWNER})
        with pytest.raises(NotFound):
            async with stranger.stream(Flow.WATCH, WatchRun(run_id=run), timeout_s=5) as events:
                await anext(events)
        assert (await stranger.call(Flow.LIST, ListRuns(), timeout_s=5)).runs == ()
        mine = await stranger.call(Flow.SUBMIT, submit, timeout_s=10)
        assert not mine.existing
        assert mine.run_id != run
        # The control: the owner's run is there, and ends.
        view = await owner.call(Flow.WAIT, WaitRun(run_id=run, timeout_s=30.0), timeout_s=35)
        assert view.state == "SUCCEEDED", view.error
        assert [r.run_id for r in (await owner.call(Flow.LIST, ListRuns(), timeout_s=5)).runs] == [run]
        await stranger.call(Flow.WAIT, WaitRun(run_id=mine.run_id, timeout_s=30.0), timeout_s=35)


async def _is_encoding(probe: Probe) -> bool:
    return (await cache(probe)).encoder_ready
