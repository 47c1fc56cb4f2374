"""SIGKILL of the agentflow process at each side of a tool's effect and of its journal record; the run goes on."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import anyio
import pytest

import covey
from covey.net.embedded import EmbeddedNats
from covey.testing import assert_eventually, free_port
from covey.types.flow import RunState, ToolCall
from tests.support.fake_gateway import fake_gateway
from tests.support.flows import KEY


@asynccontextmanager
async def process(
    tmp_path: Path, nats: EmbeddedNats, gateway: str, port: int, environment: Mapping[str, str]
) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """Start the real service, on any port if 0, and wait until it is ready: it, its address; kill what is left."""
    read_fd, write_fd = os.pipe()
    key_file = tmp_path / "key"
    key_file.touch(mode=0o600)
    key_file.write_text(KEY)
    settings = {
        "nats": nats.url,
        "nats_token_file": str(nats.token_file),
        "run_dir": str(tmp_path),
        "listen": f"127.0.0.1:{port}",
        "gateway": gateway,
        "tenants.local.key_file": str(key_file),
    }
    if not port:
        settings |= {"listen": "127.0.0.1:0", "worker": "agentflow-0"}
    flags = [flag for name, value in settings.items() for flag in ("--set", f"{name}={value}")]
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-m", "services.agentflow", *flags, "--ready-fd", str(write_fd),
        pass_fds=(write_fd,), env={**os.environ, **environment, "PYTHONPATH": str(Path.cwd())},
    )  # fmt: skip
    os.close(write_fd)
    try:
        with anyio.fail_after(30):
            said = await anyio.to_thread.run_sync(os.read, read_fd, 4096, abandon_on_cancel=True)
        yield child, json.loads(said)["grpc"]
    finally:
        os.close(read_fd)
        if child.returncode is None:
            child.kill()
        with anyio.CancelScope(shield=True):
            await child.wait()


def _workflow(steps: int) -> covey.Workflow:
    wf = covey.Workflow("chain")
    last = wf.input("start")
    for i in range(steps):
        draft = wf.llm(f"ask_{i}", f"{last}?")
        last = wf.tool(f"effect_{i}", "effect", text=draft)
    return wf


@pytest.mark.faults
@pytest.mark.parametrize("point", ["before_effect", "after_effect", "after_journal"])
async def test_a_killed_agentflow_repeats_no_journaled_step(tmp_path: Path, point: str) -> None:
    effects: list[tuple[str, str]] = []

    @covey.tool
    async def effect(text: str, call: ToolCall) -> str:
        effects.append((call.node, call.key))
        return f"{text}!"

    async with AsyncExitStack() as stack:
        nats = await stack.enter_async_context(EmbeddedNats.start(tmp_path))
        gateway, address = await stack.enter_async_context(fake_gateway())
        port = free_port()
        client = await stack.enter_async_context(covey.Client.connect(flow=f"127.0.0.1:{port}", api_key=KEY))
        failpoints = {"COVEY_FAILPOINTS": f"agentflow.{point}=crash@2"}
        async with process(tmp_path, nats, address, port, failpoints) as (first, _):
            await stack.enter_async_context(client.serve_tools([effect]))
            run = await client.submit(_workflow(3), {"start": "go"}, idempotency_key="k")
            with anyio.fail_after(20):
                assert await first.wait() == 137
        async with process(tmp_path, nats, address, port, {}):
            view = await run.wait(timeout_s=30)
        assert view.state is RunState.SUCCEEDED, view.error
        assert view.outputs == {"effect_2": "<<<go?>!?>!?>!"}
        by_node = {node: {key for name, key in effects if name == node} for node, _ in effects}
        assert {node: len(keys) for node, keys in by_node.items()} == {"effect_0": 1, "effect_1": 1, "effect_2": 1}
        assert len(effects) == 3, "the worker answers a repeated key from memory: each effect happened once"
        assert gateway.ran == ["go?", "<go?>!?", "<<go?>!?>!?"], "no call ran twice"
        assert gateway.opened == [run.id]


@pytest.mark.faults
async def test_a_tool_worker_without_memory_sees_the_same_key_again(tmp_path: Path) -> None:
    effects: list[str] = []

    @covey.tool
    async def effect(text: str, call: ToolCall) -> str:
        effects.append(call.key)
        return text

    async with AsyncExitStack() as stack:
        nats = await stack.enter_async_context(EmbeddedNats.start(tmp_path))
        _, address = await stack.enter_async_context(fake_gateway())
        port = free_port()
        client = await stack.enter_async_context(covey.Client.connect(flow=f"127.0.0.1:{port}", api_key=KEY))
        failpoints = {"COVEY_FAILPOINTS": "agentflow.after_effect=crash@1"}
        async with process(tmp_path, nats, address, port, failpoints) as (first, _):
            async with client.serve_tools([effect]):
                run = await client.submit(_workflow(1), {"start": "go"}, idempotency_key="k")
                with anyio.fail_after(20):
                    assert await first.wait() == 137
        async with process(tmp_path, nats, address, port, {}), client.serve_tools([effect]):
            view = await run.wait(timeout_s=30)
        assert view.state is RunState.SUCCEEDED, view.error
        assert len(effects) == 2, "one kill between effect and journal"
        assert len(set(effects)) == 1, "with the same key"


@pytest.mark.faults
async def test_the_service_drains_at_sigterm_and_is_small(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        nats = await stack.enter_async_context(EmbeddedNats.start(tmp_path))
        _, address = await stack.enter_async_context(fake_gateway())
        port = free_port()
        client = await stack.enter_async_context(covey.Client.connect(flow=f"127.0.0.1:{port}", api_key=KEY))
        async with process(tmp_path, nats, address, port, {}) as (child, _):
            status = Path(f"/proc/{child.pid}/status")
            resident_kib = int(next(line for line in status.read_text().splitlines() if "VmRSS" in line).split()[1])
            assert resident_kib < 150 * 1024
            wf = covey.Workflow("w")
            wf.tool("t", "nobody")
            run = await client.submit(wf)
            child.send_signal(signal.SIGTERM)
            with anyio.fail_after(15):
                assert await child.wait() == 0
        async with process(tmp_path, nats, address, port, {}):

            async def is_running() -> bool:
                return (await run.view()).state is RunState.RUNNING

            await assert_eventually(is_running)
            assert (await run.cancel()).state is RunState.CANCELLED


@pytest.mark.faults
async def test_a_restarted_agentflow_is_where_it_was(tmp_path: Path) -> None:
    async with EmbeddedNats.start(tmp_path) as nats, fake_gateway() as (_, gateway):
        async with process(tmp_path, nats, gateway, 0, {}) as (child, first):
            child.kill()
            await child.wait()
        async with process(tmp_path, nats, gateway, 0, {}) as (_, second):
            assert second == first
