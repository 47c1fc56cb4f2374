"""Runs that are cancelled, watched in pieces, fail, lose a tool worker, agentflow or the gateway."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from covey.client.tool import tool
from covey.client.tool_worker import serving
from covey.codec.methods import Flow
from covey.errors import DeadlineExceeded, InvalidArgument, NotFound, Unauthenticated, Unavailable
from covey.testing import assert_eventually
from covey.types.flow import (
    FlowEvent,
    ListRuns,
    NodeState,
    RetryPolicy,
    RunRequest,
    RunState,
    ToolCall,
    WatchRun,
)
from covey.types.program import SemanticCall
from tests.support.flow_site import llm, shout, site, use, workflow
from tests.support.flows import OTHER_KEY, agentflow, key_channel


async def test_cancel_stops_decoding_and_tools_before_it_returns(tmp_path: Path) -> None:
    stopped: list[str] = []
    began = anyio.Event()

    @tool
    async def slow(text: str) -> str:
        began.set()
        try:
            await anyio.sleep_forever()
        finally:
            stopped.append(text)
        return ""

    async with site(tmp_path, [slow]) as here:

        async def answer(_prompt: str, _call: SemanticCall) -> str:
            try:
                await anyio.sleep_forever()
            finally:
                stopped.append("decode")
            raise AssertionError

        here.gateway.answer = answer
        run_id = await here.submit(workflow(use("t", "slow", text="tool"), llm("a", "x"), llm("b", "{{a}} {{t}}")))
        await began.wait()
        await assert_eventually(lambda: here.gateway.ran)
        view = await here.channel.call(Flow.CANCEL, RunRequest(run_id=run_id), timeout_s=20)
        assert sorted(stopped) == ["decode", "tool"]
        assert view.state is RunState.CANCELLED
        states = {node.id: node.state for node in view.nodes}
        assert states == {"t": NodeState.CANCELLED, "a": NodeState.CANCELLED, "b": NodeState.SKIPPED}
        again = await here.channel.call(Flow.CANCEL, RunRequest(run_id=run_id), timeout_s=20)
        assert again == view


async def test_watching_resumes_anywhere_without_loss_or_repeat(tmp_path: Path) -> None:
    async with site(tmp_path, [shout]) as here:
        run_id = await here.submit(workflow(llm("a", "x"), use("t", "shout", text="{{a}}"), llm("b", "{{t}}")))
        seen: list[FlowEvent] = []
        while not seen or seen[-1].run_state is not RunState.SUCCEEDED:  # a new stream for each event
            request = WatchRun(run_id=run_id, after_seq=seen[-1].seq if seen else 0)
            async with here.channel.stream(Flow.WATCH, request, timeout_s=20) as events:
                seen.append(await anext(events))
        async with here.channel.stream(Flow.WATCH, WatchRun(run_id=run_id), timeout_s=20) as events:
            whole = [event async for event in events]
        assert whole == seen
        assert [event.seq for event in seen] == list(range(1, len(seen) + 1))
        assert (await here.get(run_id)).seq == len(seen)
        values = {event.node.id: event.node.value for event in seen if event.node and event.node.value}
        assert values == {"a": "<x>", "t": "<X>", "b": "<<X>>"}


async def test_a_failed_attempt_is_tried_again_with_the_calls_behind_it(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        failures = iter([Unavailable("worker lost"), Unavailable("worker lost")])

        async def answer(prompt: str, call: SemanticCall) -> str:
            error = next(failures, None) if call.output.startswith("a") else None
            if error is not None:
                raise error
            return prompt

        here.gateway.answer = answer
        retry = RetryPolicy(attempts=3, base_s=0.01, ceiling_s=0.01)
        run_id = await here.submit(workflow(llm("a", "x", retry=retry), llm("b", "{{a}} y"), llm("c", "{{b}} z")))
        view = await here.wait(run_id)
        assert view.outputs == {"c": "x y z"}
        assert [node.attempts for node in view.nodes] == [3, 1, 1]


async def test_a_refused_call_fails_the_run_with_its_error(tmp_path: Path) -> None:
    async with site(tmp_path) as here:

        async def answer(_prompt: str, call: SemanticCall) -> str:
            raise InvalidArgument("max_tokens is over the context", field="max_tokens")

        here.gateway.answer = answer
        view = await here.wait(await here.submit(workflow(llm("a", "x"), llm("b", "{{a}}"))))
        assert (view.state, view.error_code) == (RunState.FAILED, "INVALID_ARGUMENT")
        assert "node 'a': max_tokens is over the context" in view.error
        states = {node.id: (node.state, node.value) for node in view.nodes}
        assert states["a"] == (NodeState.FAILED, "")
        assert states["b"] == (NodeState.SKIPPED, ""), "error text is nobody's input"


async def test_a_tool_that_nobody_offers_fails_by_name(tmp_path: Path) -> None:
    async with site(tmp_path, tool_timeout_s=0.2) as here:
        view = await here.wait(await here.submit(workflow(use("t", "missing"))))
        assert (view.state, view.error_code) == (RunState.FAILED, "DEADLINE_EXCEEDED")
        assert "no attached worker offers the tool 'missing'" in view.error


async def test_a_lost_tool_worker_is_replaced_by_another(tmp_path: Path) -> None:
    keys: list[str] = []
    began = anyio.Event()

    @tool(name="work")
    async def hang(call: ToolCall) -> str:
        keys.append(call.key)
        began.set()
        await anyio.sleep_forever()
        return ""

    @tool(name="work")
    async def work(call: ToolCall) -> str:
        keys.append(call.key)
        return "done"

    async with site(tmp_path) as here:
        async with serving(here.channel, [hang], worker="first"):
            run_id = await here.submit(workflow(use("t", "work")))
            await began.wait()
        async with serving(here.channel, [work], worker="second"):
            view = await here.wait(run_id)
        assert view.outputs == {"t": "done"}
        assert (view.nodes[0].worker, view.nodes[0].attempts) == ("second", 2)
        assert len(keys) == 2
        assert keys[0] == keys[1]


async def test_a_tool_that_raises_is_retried_then_fails_with_its_words(tmp_path: Path) -> None:
    calls = 0

    @tool
    def divide(a: int, b: int) -> float:
        nonlocal calls
        calls += 1
        return a / b

    async with site(tmp_path, [divide]) as here:
        retry = RetryPolicy(attempts=2, base_s=0.01, ceiling_s=0.01)
        ended = await here.wait(await here.submit(workflow(use("t", "divide", retry=retry, a="1", b="0"))))
        assert (ended.state, ended.error_code, calls) == (RunState.FAILED, "TOOL_FAILED", 2)
        assert "ZeroDivisionError" in ended.error
        ended = await here.wait(await here.submit(workflow(use("t", "divide", a="1", b="x"))))
        assert (ended.state, calls) == (RunState.FAILED, 2)
        assert "arguments" not in ended.error
        assert "b" in ended.error


async def test_a_run_deadline_ends_it_in_time(tmp_path: Path) -> None:
    async with site(tmp_path) as here:

        async def answer(_prompt: str, _call: SemanticCall) -> str:
            await anyio.sleep_forever()
            raise AssertionError

        here.gateway.answer = answer
        view = await here.wait(await here.submit(workflow(llm("a", "x")), deadline_s=0.3))
        assert (view.state, view.error_code) == (RunState.FAILED, "DEADLINE_EXCEEDED")
        assert view.ended_s - view.created_s < 2
        await assert_eventually(lambda: here.gateway.cancelled)


async def test_a_stopped_agentflow_leaves_its_runs_to_the_next(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        gate = anyio.Event()

        async def answer(prompt: str, call: SemanticCall) -> str:
            if call.output == "b":
                await gate.wait()
            return prompt

        here.gateway.answer = answer
        run_id = await here.submit(workflow(llm("a", "x"), llm("b", "{{a}} y"), use("t", "shout", text="{{b}}")))
        await assert_eventually(lambda: len(here.gateway.ran) == 2)

        async def one_succeeded() -> bool:
            return (await here.get(run_id)).nodes[0].state is NodeState.SUCCEEDED

        await assert_eventually(one_succeeded)
        await here.stack.aclose()
        gate.set()
        async with agentflow(here.nats.url, here.nats.token, here.gateway_address, here.blobs) as flow:
            async with key_channel(flow.address) as channel, serving(channel, [shout], worker="w"):
                view = await replace(here, channel=channel).wait(run_id)
        assert view.outputs == {"t": "X Y"}
        assert here.gateway.ran == ["x", "x y"], "no call ran twice"
        assert here.gateway.opened == [run_id]


async def test_a_gateway_that_forgot_the_program_gets_what_is_missing(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        gate = anyio.Event()

        async def answer(prompt: str, call: SemanticCall) -> str:
            if call.output != "a":
                await gate.wait()
            return prompt

        here.gateway.answer = answer
        run_id = await here.submit(workflow(llm("a", "{{doc}}"), llm("b", "{{a}} y"), llm("c", "{{b}} z")), doc="x")

        async def one_succeeded() -> bool:
            return (await here.get(run_id)).nodes[0].state is NodeState.SUCCEEDED

        await assert_eventually(one_succeeded)
        here.gateway.forget()
        gate.set()
        view = await here.wait(run_id)
        assert view.outputs == {"c": "x y z"}
        assert here.gateway.ran.count("x") == 1, "a journaled call does not run again"
        assert here.gateway.opened == [run_id, run_id]
        assert {node.attempts for node in view.nodes} == {1}


async def test_large_values_pass_through_blobs(tmp_path: Path) -> None:
    async with site(tmp_path, [shout]) as here:
        text = "long words " * 20_000
        run_id = await here.submit(workflow(use("t", "shout", text="{{doc}}"), llm("a", "{{t}}")), doc=text)
        view = await here.wait(run_id)
        assert view.outputs == {"a": f"<{text.upper()}>"}
        sizes = [path.stat().st_size for path in here.blobs.rglob("*") if path.is_file()]
        assert len(sizes) == 3, "the request, the tool's value and the answer"
        assert min(sizes) > 16_384


async def test_tenants_do_not_see_each_other(tmp_path: Path) -> None:
    async with site(tmp_path, [shout], tool_timeout_s=0.2) as here:
        run_id = await here.submit(workflow(llm("a", "x")))
        await here.wait(run_id)
        async with key_channel(here.flow.address, OTHER_KEY) as other:
            for method in (Flow.GET, Flow.CANCEL):
                with pytest.raises(NotFound):
                    await other.call(method, RunRequest(run_id=run_id), timeout_s=5)
            with pytest.raises(NotFound):
                async with other.stream(Flow.WATCH, WatchRun(run_id=run_id), timeout_s=5) as events:
                    await anext(events)
            assert (await other.call(Flow.LIST, ListRuns(), timeout_s=5)).runs == ()
            theirs = replace(here, channel=other)
            ended = await theirs.wait(await theirs.submit(workflow(use("t", "shout", text="x"))))
            assert "no attached worker offers the tool 'shout'" in ended.error
        async with key_channel(here.flow.address, "ck-wrong-wrong-wrong") as wrong:
            with pytest.raises(Unauthenticated):
                await wrong.call(Flow.LIST, ListRuns(), timeout_s=5)


async def test_waiting_has_an_end(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        run_id = await here.submit(workflow(use("t", "missing")))
        with pytest.raises(DeadlineExceeded) as ended:
            await here.wait(run_id, timeout_s=0.05)
        assert ended.value.field == "timeout_s"
        await here.channel.call(Flow.CANCEL, RunRequest(run_id=run_id), timeout_s=5)
