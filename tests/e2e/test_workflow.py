"""Workflows and semantic functions through the SDK, against a mesh of real processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import anyio
import anyio.from_thread
import pytest

import covey
from covey.auth import MeshToken
from covey.cli.demo_workflow import MODULES, read_documentation, reading
from covey.cli.mesh import Mesh
from covey.cli.up import publish
from covey.codec.methods import Decode
from covey.net.rpc import Channel
from covey.policy.pinning import PinConfig, PinPolicy
from covey.types.common import Empty
from covey.types.flow import NodeView, RunState, RunView
from covey.types.generate import EngineLoad
from covey.types.program import CacheMode, CacheOutcome, ToolHint
from tests.support.meshes import mesh_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

RUN_S = 90.0
TOOL_S = 2.0
"""What the demo workflow says of its tool."""
STOP_S = 0.25
FREE_S = 5.0
"""Blocks of a request that ended are kept for a second, then written to the store."""
SAMPLE_S = 0.005


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    folder = tmp_path_factory.mktemp("workflow")
    with (
        anyio.from_thread.start_blocking_portal() as portal,
        portal.wrap_async_context_manager(mesh_of(folder)) as mesh,
    ):
        publish(mesh)
        yield mesh


def _run_dir(mesh: Mesh) -> Path:
    return mesh.plan.files.run_dir


def _decode(mesh: Mesh) -> AbstractAsyncContextManager[Channel]:
    """A channel to the decode worker, with the mesh's own token."""
    token = MeshToken((_run_dir(mesh) / "mesh.token").read_text())
    return Channel.open(mesh.children["decode-0"].addresses["grpc"], token=token)


async def _load(decode: Channel) -> EngineLoad:
    return await decode.call(Decode.LOAD, Empty(), timeout_s=5.0)


async def _run_demo(mesh: Mesh) -> RunView:
    async with covey.Client.connect(run_dir=_run_dir(mesh)) as client, client.serve_tools([read_documentation]):
        run = await client.submit(reading())
        view = await run.wait(RUN_S)
    assert view.state is RunState.SUCCEEDED, view.error
    return view


def _calls(view: RunView) -> list[NodeView]:
    return [node for node in view.nodes if node.kind == "llm"]


async def test_the_demo_workflow_pins_while_tools_run_and_is_answered_from_semcache_the_second_time(
    mesh: Mesh,
) -> None:
    first = await _run_demo(mesh)
    nodes = {node.id: node for node in first.nodes}
    for module in MODULES:
        assert nodes[f"ask_{module}"].pinned_blocks > 0
        assert nodes[f"read_{module}"].value == read_documentation(module)
        usage = nodes[f"note_{module}"].usage
        assert usage is not None
        assert usage.cached_tokens + usage.loaded_tokens > 0
    assert nodes["answer"].pinned_blocks == 0
    assert first.outputs == {"answer": nodes["answer"].value}
    pin = PinPolicy(PinConfig()).choose(ToolHint(tool="read_documentation", expected_s=TOOL_S))
    assert pin is not None
    async with _decode(mesh) as decode:
        with anyio.fail_after(pin.ttl_s + 1):
            while (await _load(decode)).pinned_blocks:
                await anyio.sleep(SAMPLE_S)
    second = await _run_demo(mesh)
    assert {node.id: node.cache for node in _calls(second)} == {node.id: CacheOutcome.EXACT for node in _calls(first)}
    assert second.outputs == first.outputs


@covey.semantic(max_tokens=16, temperature=0)
def gist(text: str) -> str:  # type: ignore[empty-body]
    """Say in few words: {{text}}"""


@covey.semantic(max_tokens=24, temperature=0)
def join(first: str, second: str) -> str:  # type: ignore[empty-body]
    """What do these have in common? {{first}} {{second}}"""


async def test_semantic_functions_are_futures_that_feed_each_other(mesh: Mesh) -> None:
    async with covey.Client.connect(run_dir=_run_dir(mesh)) as client:
        async with client.program():
            gists = [gist("bees dance"), gist("ants lay trails")]
            joined = join(*gists)
            async with joined.stream(objective=covey.latency()) as pieces:
                text = "".join([piece async for piece in pieces])
            assert text
            assert await joined.get(objective=covey.throughput()) == text
            whole = await joined.result(objective=covey.deadline(30.0))
            assert whole.value == text
            assert whole.usage is not None
            assert whole.usage.completion_tokens <= 24
            values = [await one for one in gists]
        async with client.program(model="tiny"):
            again = join(*values)  # texts in place of futures: the very same prompt
            assert await again == text
            assert (await again.result()).cache is CacheOutcome.EXACT


async def test_cancelling_a_run_stops_its_decoding_and_frees_its_blocks(mesh: Mesh) -> None:
    workflow = covey.Workflow("endless")
    prompt = "Go on and on."
    workflow.llm("long", prompt, max_tokens=1900, ignore_eos=True, temperature=0, cache=CacheMode.BYPASS)
    async with covey.Client.connect(run_dir=_run_dir(mesh)) as client, _decode(mesh) as decode:
        run = await client.submit(workflow)
        with anyio.fail_after(30):
            while not (await _load(decode)).running:
                await anyio.sleep(SAMPLE_S)
        view = await run.cancel()
        with anyio.fail_after(STOP_S):
            while (await _load(decode)).running:
                await anyio.sleep(SAMPLE_S)
        assert view.state is RunState.CANCELLED
        with anyio.fail_after(FREE_S):
            while (load := await _load(decode)).pinned_blocks:
                await anyio.sleep(SAMPLE_S)
        assert load.free_blocks + load.cached_blocks == load.total_blocks
