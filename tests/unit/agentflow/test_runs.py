"""Whole runs over real NATS and gRPC with a fake gateway: order, idempotency, refusals."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from covey.codec.methods import Flow
from covey.errors import AlreadyExists, InvalidArgument, NotFound, Overloaded
from covey.testing import assert_eventually
from covey.types.flow import (
    ListRuns,
    RunRequest,
    RunState,
    SubmitRun,
    Workflow,
)
from covey.types.ids import RunId
from covey.types.program import ObjectiveKind, SemanticCall
from tests.support.flow_site import llm, shout, site, use, workflow


async def test_a_run_goes_from_inputs_over_calls_and_a_tool_to_its_output(tmp_path: Path) -> None:
    async with site(tmp_path, [shout]) as here:
        nodes = workflow(
            llm("draft", "write about {{topic}}"),
            llm("better", "improve {{draft}}"),
            use("loud", "shout", text="{{better}}!"),
            llm("end", "close {{loud}} with {{draft}}"),
            outputs=("end",),
        )
        run_id = await here.submit(nodes, topic="bees {{draft}}")
        view = await here.wait(run_id)
        assert (view.state, view.error) == (RunState.SUCCEEDED, "")
        draft = "<write about bees {{draft}}>"
        loud = f"<IMPROVE {draft.upper()}>!"
        assert view.outputs == {"end": f"<close {loud} with {draft}>"}
        by_id = {node.id: node for node in view.nodes}
        assert by_id["loud"].value == loud
        assert (by_id["loud"].kind, by_id["loud"].worker, by_id["loud"].depends_on) == ("tool", "w", ("better",))
        assert by_id["draft"].usage is not None
        assert {node.attempts for node in view.nodes} == {1}
        hints = {call.output: call.then_tool and call.then_tool.tool for call in here.gateway.submitted}
        assert hints == {"draft": None, "better": "shout", "end": None}
        kinds = {get.name: get.objective.kind for get in here.gateway.gets}
        assert kinds["draft"] is ObjectiveKind.THROUGHPUT
        assert kinds["end"] is kinds["better"] is ObjectiveKind.LATENCY
        assert {headers["x-covey-tenant"] for headers in here.gateway.headers} == {"local"}
        await assert_eventually(lambda: not here.gateway.programs)


async def test_calls_behind_each_other_are_submitted_before_the_first_has_run(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        gate = anyio.Event()

        async def answer(prompt: str, _call: SemanticCall) -> str:
            await gate.wait()
            return prompt

        here.gateway.answer = answer
        chain = [llm("n0", "start"), *(llm(f"n{i}", f"{{{{n{i - 1}}}}} {i}") for i in range(1, 40))]
        run_id = await here.submit(workflow(*chain))
        await assert_eventually(lambda: len(here.gateway.submitted) == 40)
        gate.set()
        view = await here.wait(run_id)
        assert view.outputs == {"n39": "start " + " ".join(str(i) for i in range(1, 40))}


async def test_twenty_submits_of_one_key_are_one_run(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        nodes = workflow(llm("a", "hello {{who}}"))
        found: list[tuple[RunId, bool]] = []

        async def submit() -> None:
            request = SubmitRun(workflow=nodes, inputs={"who": "you"}, idempotency_key="k")
            reply = await here.channel.call(Flow.SUBMIT, request, timeout_s=20)
            found.append((reply.run_id, reply.existing))

        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                tasks.start_soon(submit)
        assert len({run_id for run_id, _ in found}) == 1
        assert sorted(existing for _, existing in found) == [False] + [True] * 19
        await here.wait(found[0][0])
        assert here.gateway.ran == ["hello you"]
        with pytest.raises(AlreadyExists) as refused:
            await here.submit(nodes, key="k", who="me")
        assert refused.value.field == "idempotency_key"
        listed = await here.channel.call(Flow.LIST, ListRuns(), timeout_s=5)
        assert [run.run_id for run in listed.runs] == [found[0][0]]


@pytest.mark.parametrize(
    ("nodes", "field", "words"),
    [
        (workflow(llm("a", "{{b}}"), llm("b", "{{a}}")), "workflow.nodes.a", ["a → b → a"]),
        (workflow(llm("a", "{{nothing}}")), "workflow.nodes.a.messages[0]", ["'a'", "nothing"]),
        (workflow(llm("a", "x"), llm("a", "y")), "workflow.nodes.a", ["two nodes"]),
        (workflow(llm("a", "x"), outputs=("z",)), "workflow.outputs.z", ["'z'"]),
    ],
)
async def test_a_bad_workflow_reaches_nobody(tmp_path: Path, nodes: Workflow, field: str, words: list[str]) -> None:
    async with site(tmp_path) as here:
        with pytest.raises(InvalidArgument) as refused:
            await here.submit(nodes)
        assert refused.value.field == field
        assert [word for word in words if word not in refused.value.message] == []
        assert here.gateway.opened == []
        assert here.flow.runs.listed("local", None, 10) == ()  # type: ignore[arg-type]


async def test_open_runs_and_runs_in_memory_are_bounded(tmp_path: Path) -> None:
    async with site(tmp_path, open_runs_max=1, runs_in_memory_max=1, runs_max=4) as here:
        blocked = await here.submit(workflow(use("t", "missing")))
        with pytest.raises(Overloaded) as refused:
            await here.submit(workflow(llm("a", "x")))
        assert refused.value.retry_after_ms
        await here.channel.call(Flow.CANCEL, RunRequest(run_id=blocked), timeout_s=5)
        ended = []
        for i in range(5):
            ended.append(await here.submit(workflow(llm("a", f"{i}"))))
            await here.wait(ended[-1])

        async def is_bounded() -> bool:
            listed = await here.channel.call(Flow.LIST, ListRuns(), timeout_s=5)
            return [run.run_id for run in listed.runs] == ended[:0:-1]

        await assert_eventually(is_bounded)
        view = await here.get(ended[1])
        assert (view.state, view.outputs) == (RunState.SUCCEEDED, {"a": "<1>"}), "read again from the journal"
        with pytest.raises(NotFound):
            await here.get(ended[0])
