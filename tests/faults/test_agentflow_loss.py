"""agentflow is killed in mid-run: the run goes on where its journal ends, and nothing that had ended runs again."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import anyio
import anyio.from_thread
import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

import covey
from covey.cli.files import MeshFiles
from covey.cli.mesh import Mesh, MeshPlan, running
from covey.cli.up import publish
from covey.testing import assert_eventually
from covey.types.flow import NodeState, RunState, RunView
from covey.types.program import CacheMode
from tests.support.meshes import LEAN
from tests.support.tiny_llama import write_tiny_llama

pytestmark = [pytest.mark.faults, pytest.mark.timeout(180)]

RUN_S = 90.0
LONG_TOKENS = 400
CALLS = ("ask", "think", "conclude")
STEPS = ["first", "second"]

Disturb = Callable[[], Awaitable[None]]


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    folder = tmp_path_factory.mktemp("agentflow")
    source = str(write_tiny_llama(folder / "model"))
    files = MeshFiles(run_dir=folder / "run", cache_dir=folder / "cache")
    plan = MeshPlan(files=files, models={"tiny": source}, settings=LEAN, restart=True)
    with (
        anyio.from_thread.start_blocking_portal() as portal,
        portal.wrap_async_context_manager(running(plan)) as mesh,
    ):
        publish(mesh)
        yield mesh


def _workflow() -> covey.Workflow:
    workflow = covey.Workflow("ask-note-think-note-conclude")

    def call(name: str, prompt: str, tokens: int) -> covey.Ref:
        return workflow.llm(
            name, prompt, max_tokens=tokens, ignore_eos=True, temperature=0, cache=CacheMode.BYPASS, timeout_s=60.0
        )

    asked = call("ask", "What is worth noting?", 16)
    first = workflow.tool("first", "note", step="first", text=asked)
    thought = call("think", f"Think about {first} at length.", LONG_TOKENS)
    second = workflow.tool("second", "note", step="second", text=thought)
    call("conclude", f"Conclude from {second}.", 16)
    return workflow


class Notes:
    """A tool with a side effect: it appends a line a call. A call of `held` waits for `released`."""

    def __init__(self, file: Path, *, held: str = "") -> None:
        self.file = file
        self.begun = anyio.Event()
        self.released = anyio.Event()
        file.touch()

        @covey.tool
        async def note(step: str, text: str) -> str:
            with file.open("a") as notes:
                notes.write(f"{step}\n")
            if step == held:
                self.begun.set()
                await self.released.wait()
            return f"note of {len(text)} characters"

        self.tool = note

    @property
    def steps(self) -> list[str]:
        return self.file.read_text().splitlines()


async def _run(mesh: Mesh, notes: Notes, disturb: Callable[[covey.Run], Awaitable[None]] | None = None) -> RunView:
    async with (
        covey.Client.connect(run_dir=mesh.plan.files.run_dir) as client,
        client.serve_tools([notes.tool]),
    ):
        run = await client.submit(_workflow())
        if disturb is not None:
            await disturb(run)
        return await run.wait(RUN_S)


async def _kill(mesh: Mesh) -> None:
    """Kill agentflow and wait for the one that takes its place."""
    killed = mesh.children["agentflow-0"].process
    killed.kill()
    await assert_eventually(lambda: mesh.children["agentflow-0"].process.pid != killed.pid, timeout_s=30)


async def _until_running(run: covey.Run, node_id: str) -> None:
    async with run.events() as events:
        async for event in events:
            if event.node is not None and (event.node.id, event.node.state) == (node_id, NodeState.RUNNING):
                return
    raise AssertionError(f"the run ended and {node_id} never ran")


async def _calls_served(mesh: Mesh) -> float:
    """How many calls the gateway has taken, however they ended."""
    async with httpx.AsyncClient(trust_env=False) as client:
        text = (await client.get(f"{mesh.http}/metrics")).text
    requests = next(f for f in text_string_to_metric_families(text) if f.name == "covey_requests")
    return sum(sample.value for sample in requests.samples if sample.name.endswith("_total"))


@pytest.mark.parametrize("during", ["think", "second"])
async def test_a_killed_agentflow_resumes_the_run_and_repeats_nothing(mesh: Mesh, during: str, tmp_path: Path) -> None:
    undisturbed = await _run(mesh, Notes(tmp_path / "undisturbed"))
    assert undisturbed.state is RunState.SUCCEEDED, undisturbed.error
    notes = Notes(tmp_path / "disturbed", held=during)
    before = await _calls_served(mesh)

    async def disturb(run: covey.Run) -> None:
        await _until_running(run, during)
        if during == "second":
            await notes.begun.wait()
        at_kill = {node.id: node for node in (await run.view()).nodes}
        assert at_kill[during].state is NodeState.RUNNING
        assert at_kill["first"].state is NodeState.SUCCEEDED
        await _kill(mesh)
        notes.released.set()

    view = await _run(mesh, notes, disturb)
    assert view.state is RunState.SUCCEEDED, view.error
    assert view.outputs == undisturbed.outputs
    assert {n.id: n.value for n in view.nodes} == {n.id: n.value for n in undisturbed.nodes}
    assert {node.attempts for node in view.nodes} == {1}
    assert notes.steps == STEPS
    assert await _calls_served(mesh) - before == len(CALLS)
