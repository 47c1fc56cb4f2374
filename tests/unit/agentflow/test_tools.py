"""Tool workers: bounded concurrency, keys, loss, silence, and a journal that is away for a while."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from random import Random

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey.client.tool import tool
from covey.client.tool_worker import serving
from covey.codec.methods import Tools
from covey.errors import AlreadyExists, FailedPrecondition, InvalidArgument, Unavailable
from covey.testing import assert_eventually, virtual_time
from covey.types.flow import (
    RunState,
    SubmitRun,
    ToolAttached,
    ToolBeat,
    ToolCall,
    ToolHello,
    ToolResult,
    ToolSpec,
    ToolWorkerMessage,
)
from covey.types.ids import RunId, TenantId
from services.agentflow.toolbox import Toolbox, ToolFailed
from tests.support.fake_gateway import fake_gateway
from tests.support.flow_site import llm, site, use, workflow
from tests.support.flows import agentflow, key_channel
from tests.support.nats import nats_server

TENANT = TenantId("local")


def _hello(worker: str, *specs: ToolSpec) -> ToolHello:
    return ToolHello(worker=worker, tools=specs)


def _call(key: str, name: str = "t") -> ToolCall:
    return ToolCall(key=key, run_id=RunId("r"), node=key, tool=name)


async def test_a_worker_gets_no_more_calls_than_it_takes() -> None:
    box = Toolbox()
    with box.attached(TENANT, _hello("w", ToolSpec(name="t", concurrency=2))) as session:
        done: list[str] = []

        async def run(key: str) -> None:
            value, worker = await box.call(TENANT, _call(key), again=False)
            done.append(f"{worker}:{value}")

        async with anyio.create_task_group() as tasks:
            for key in "abcde":
                tasks.start_soon(run, key)
            for _ in "abcde":
                call = await session.incoming.receive()
                assert isinstance(call, ToolCall)
                assert len(session.calls) <= 2
                box.check()
                box.deliver(session, ToolResult(key=call.key, value=call.key))
        assert sorted(done) == [f"w:{key}" for key in "abcde"]
        box.deliver(session, ToolResult(key="a", value="late"))
        assert session.calls == {}


@given(st.randoms(use_true_random=False))
def test_no_place_is_lost_when_waiting_calls_are_cancelled(random: Random) -> None:
    @virtual_time
    async def run() -> None:
        box, done = Toolbox(), 0
        spec = ToolSpec(name="t", concurrency=random.randint(1, 3))
        with box.attached(TENANT, _hello("w", spec)) as session:

            async def work() -> None:
                async for call in session.incoming:
                    assert isinstance(call, ToolCall)
                    await anyio.sleep(random.random() * 0.1)
                    box.deliver(session, ToolResult(key=call.key, value="ok"))

            async def ask(key: str, patience_s: float) -> None:
                nonlocal done
                with anyio.move_on_after(patience_s) as scope:
                    await box.call(TENANT, _call(key), again=False)
                done += 1
                assert not scope.cancelled_caught or patience_s < 1, "a place was lost"
                box.check()

            async with anyio.create_task_group() as workers:
                for _ in range(spec.concurrency):
                    workers.start_soon(work)
                with anyio.fail_after(60):
                    async with anyio.create_task_group() as tasks:
                        for i in range(40):
                            tasks.start_soon(ask, f"{i}", random.choice([0.0, 0.05, 0.1, 30.0]))
                workers.cancel_scope.cancel()
            assert done == 40
            assert session.calls == {}

    run()


async def test_a_lost_worker_fails_its_calls_unless_they_may_not_run_twice() -> None:
    box = Toolbox()
    errors: dict[str, Exception] = {}

    async def run(name: str) -> None:
        try:
            await box.call(TENANT, _call(name, name), again=False)
        except (Unavailable, FailedPrecondition) as error:
            errors[name] = error

    async with anyio.create_task_group() as tasks:
        specs = (ToolSpec(name="safe"), ToolSpec(name="once", idempotent=False))
        with box.attached(TENANT, _hello("w", *specs)) as session:
            tasks.start_soon(run, "safe")
            tasks.start_soon(run, "once")
            await session.incoming.receive()
            await session.incoming.receive()
    assert {name: type(error) for name, error in errors.items()} == {"safe": Unavailable, "once": FailedPrecondition}
    with box.attached(TENANT, _hello("w", *specs)):
        with pytest.raises(FailedPrecondition, match="not to be idempotent"):
            await box.call(TENANT, _call("x", "once"), again=True)


async def test_workers_have_names_and_tools_of_their_own() -> None:
    box = Toolbox()
    spec = ToolSpec(name="t")
    with box.attached(TENANT, _hello("w", spec)):
        with pytest.raises(AlreadyExists), box.attached(TENANT, _hello("w", spec)):
            pass
        with box.attached(TenantId("other"), _hello("w", spec)):
            assert box.workers == 2
    with pytest.raises(InvalidArgument), box.attached(TENANT, _hello("w", spec, spec)):
        pass
    with pytest.raises(InvalidArgument), box.attached(TENANT, _hello("w")):
        pass
    assert box.workers == 0


async def test_a_failing_tool_says_whether_to_try_again() -> None:
    box = Toolbox()
    with box.attached(TENANT, _hello("w", ToolSpec(name="t"))) as session:
        async with anyio.create_task_group() as tasks:

            async def fail() -> None:
                call = await session.incoming.receive()
                assert isinstance(call, ToolCall)
                box.deliver(session, ToolResult(key=call.key, error="no such file", retryable=False))

            tasks.start_soon(fail)
            with pytest.raises(ToolFailed) as failed:
                await box.call(TENANT, _call("a"), again=False)
        assert (failed.value.code, failed.value.retryable, failed.value.message) == (
            "TOOL_FAILED", False, "no such file"
        )  # fmt: skip


async def test_a_silent_worker_is_let_go(tmp_path: Path) -> None:
    async with site(tmp_path, tool_beat_s=0.05) as here:

        async def silent() -> AsyncIterator[ToolWorkerMessage]:
            yield _hello("silent", ToolSpec(name="t"))
            yield ToolBeat()
            await anyio.sleep_forever()

        async with here.channel.exchange(Tools.ATTACH, silent(), timeout_s=20) as replies:
            attached = await anext(replies)
            assert isinstance(attached, ToolAttached)
            assert attached.beat_s == 0.05
            assert here.flow.toolbox.workers == 1
            assert [reply async for reply in replies] == []
        await assert_eventually(lambda: here.flow.toolbox.workers == 0)

        async def rude() -> AsyncIterator[ToolWorkerMessage]:
            yield ToolBeat()

        with pytest.raises(InvalidArgument, match="hello"):
            async with here.channel.exchange(Tools.ATTACH, rude(), timeout_s=20) as replies:
                await anext(replies)


async def test_two_hundred_branches_through_one_worker(tmp_path: Path) -> None:
    busy = most = 0

    @tool(concurrency=8)
    async def work(text: str) -> str:
        nonlocal busy, most
        busy += 1
        most = max(most, busy)
        await anyio.lowlevel.checkpoint()
        busy -= 1
        return text

    async with site(tmp_path, [work]) as here:
        branches = [use(f"t{i}", "work", text=f"{i}") for i in range(200)]
        total = " ".join(f"{{{{t{i}}}}}" for i in range(200))
        view = await here.wait(await here.submit(workflow(*branches, llm("sum", total))))
        assert view.outputs == {"sum": "<" + " ".join(str(i) for i in range(200)) + ">"}
        assert 1 <= most <= 8


async def test_a_run_outlives_a_nats_restart(tmp_path: Path) -> None:
    began, go_on = anyio.Event(), anyio.Event()

    @tool
    async def slow() -> str:
        began.set()
        await go_on.wait()
        return "done"

    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(nats_server(tmp_path))
        _, address = await stack.enter_async_context(fake_gateway())
        flow = await stack.enter_async_context(agentflow(server.url, server.token, address, tmp_path / "blobs"))
        channel = await stack.enter_async_context(key_channel(flow.address))
        await stack.enter_async_context(serving(channel, [slow]))
        tenant = TenantId("local")
        run_id, _ = await flow.runs.submit(tenant, SubmitRun(workflow=workflow(use("t", "slow"), llm("a", "{{t}}"))))
        await began.wait()
        await server.kill()
        go_on.set()
        await server.start()
        live = await flow.runs.find(tenant, run_id)
        with anyio.fail_after(30):
            await live.until_ended()
        assert live.state.state is RunState.SUCCEEDED
