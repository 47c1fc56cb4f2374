"""The run state machine: invariants under random ends, and replay."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument, Unavailable
from covey.policy.flow import FlowRun
from covey.policy.flow_event import (
    CancelRequested,
    FlowChange,
    NodeFailed,
    NodeRetried,
    NodeStarted,
    NodeSucceeded,
    RunEnded,
    Value,
)
from covey.policy.flow_state import End, Expire, FlowLimits, Start
from covey.policy.workflow import graph
from covey.types.flow import LlmNode, Node, NodeState, RetryPolicy, RunState, Workflow
from tests.unit.agentflow.flow_strategies import llm, tool, workflows

VALUE = Value(size_bytes=2, text="ok")


def _run(*nodes: Node, deadline_s: float = 0.0) -> FlowRun:
    workflow = Workflow(name="w", nodes=nodes)
    return FlowRun(graph(workflow, ["doc"]), created_s=0.0, deadline_s=deadline_s, limits=FlowLimits())


def _start_all(run: FlowRun, now: float) -> list[FlowChange]:
    events: list[FlowChange] = []
    for start in run.ready(now):
        assert isinstance(start, Start)
        events.append(NodeStarted(node=start.node, at_s=now, submission=start.submission))
        run.apply(events[-1])
    assert run.ready(now) == (), "all that can start was named at once"
    return events


def _succeed(run: FlowRun, *names: str, now: float = 1.0) -> None:
    for name in names:
        run.apply(NodeSucceeded(node=name, at_s=now, value=VALUE))


@given(workflows(), st.randoms(use_true_random=False), st.integers(0, 60))
def test_any_run_ends_keeps_its_invariants_and_replays(workflow: Workflow, random: Random, cancel_at: int) -> None:
    shape = graph(workflow, ["doc"])
    run = FlowRun(shape, created_s=0.0, limits=FlowLimits())
    journal: list[FlowChange] = []
    now = 0.0

    def record(event: FlowChange) -> None:
        journal.append(event)
        run.apply(event)
        run.check()

    for step in range(500):
        if run.ended:
            break
        if step == cancel_at and random.random() < 0.3:
            record(CancelRequested(at_s=now))
        effects = run.ready(now)
        if effects and isinstance(effects[0], End):
            record(RunEnded(at_s=now, state=effects[0].state, code=effects[0].code))
            continue
        for effect in effects:
            if isinstance(effect, Start):
                needed = shape.needs[effect.node]
                if not isinstance(shape.nodes[effect.node].work, LlmNode):
                    assert all(run.nodes[name].state is NodeState.SUCCEEDED for name in needed)
                record(NodeStarted(node=effect.node, at_s=now, submission=effect.submission))
            elif isinstance(effect, Expire) and run.nodes[effect.node].state in (NodeState.WAITING, NodeState.RUNNING):
                record(run.judge(effect.node, DeadlineExceeded("late"), now=now, rng=random))
        settled = [name for name in run.running() if run.has_all_needs(name)]
        if settled:
            name = random.choice(settled)
            if random.random() < 0.7:
                record(NodeSucceeded(node=name, at_s=now, value=VALUE))
            else:
                error = random.choice([Unavailable("gone", retry_after_ms=100), InvalidArgument("bad")])
                verdict = run.judge(name, error, now=now, rng=random)
                assert isinstance(verdict, NodeFailed) or error.retryable
                record(verdict)
        elif not run.ready(now):
            assert run.next_wake() > now, "a run with nothing at work waits for a time to come"
            now = run.next_wake()
    assert run.ended
    for node_id, node in run.nodes.items():
        policy = shape.nodes[node_id].retry
        assert policy is not None
        assert node.failures <= policy.attempts
    again = FlowRun(shape, created_s=0.0, limits=FlowLimits())
    for event in journal:
        again.apply(event)
        again.check()
    assert again.nodes == run.nodes
    assert (again.state, again.code, again.seq) == (run.state, run.code, len(journal))


def test_llm_nodes_are_handed_out_ahead_and_tools_are_not() -> None:
    run = _run(llm("a", "doc"), llm("b", "a"), tool("t", "b"), llm("c", "t", "a"))
    assert [event.node for event in _start_all(run, 0.0) if isinstance(event, NodeStarted)] == ["a", "b"]
    _succeed(run, "a", "b")
    assert [event.node for event in _start_all(run, 1.0) if isinstance(event, NodeStarted)] == ["t"]
    _succeed(run, "t")
    _start_all(run, 1.0)
    _succeed(run, "c")
    assert run.ready(1.0) == (End(state=RunState.SUCCEEDED),)


def test_after_orders_llm_nodes_too() -> None:
    run = _run(llm("a"), llm("b", after=("a",)))
    assert len(_start_all(run, 0.0)) == 1


def test_a_retry_takes_the_calls_behind_it_along_without_counting_their_attempts() -> None:
    run = _run(llm("a"), llm("b", "a"), llm("c", "b"), llm("other"))
    _start_all(run, 0.0)
    verdict = run.judge("a", Unavailable("gone", retry_after_ms=500), now=1.0, rng=Random(1))
    assert isinstance(verdict, NodeRetried)
    assert 1.5 <= verdict.resume_at_s <= 1.7
    run.apply(verdict)
    run.check()
    states = {name: node.state for name, node in run.nodes.items()}
    assert states == dict.fromkeys("abc", NodeState.WAITING) | {"other": NodeState.RUNNING}
    assert run.ready(1.0) == ()
    assert run.next_wake() == verdict.resume_at_s
    _start_all(run, verdict.resume_at_s)
    assert [(run.nodes[name].submissions, run.nodes[name].attempts) for name in "abc"] == [(2, 2), (2, 1), (2, 1)]


def test_a_long_chain_is_withdrawn_without_recursion() -> None:
    run = _run(llm("n0"), *(llm(f"n{i}", f"n{i - 1}") for i in range(1, 5_000)))
    _start_all(run, 0.0)
    run.apply(NodeRetried(node="n0", at_s=1.0, resume_at_s=2.0, code="UNAVAILABLE", message=""))
    assert run.running() == ()


def test_a_node_times_out_from_when_its_inputs_were_there() -> None:
    run = _run(llm("a"), tool("t", "a"))
    _start_all(run, 0.0)
    _succeed(run, "a", now=100.0)
    _start_all(run, 100.0)
    assert run.ready(159.0) == ()
    assert run.next_wake() == 160.0
    assert run.ready(160.0) == (Expire(node="t"),)
    assert isinstance(run.judge("t", DeadlineExceeded("late"), now=160.0, rng=Random(1)), NodeFailed)


def test_a_retry_that_would_start_too_late_is_a_failure() -> None:
    run = _run(tool("t", retry=RetryPolicy(attempts=9)))
    _start_all(run, 0.0)
    assert isinstance(run.judge("t", Unavailable("", retry_after_ms=70_000), now=1.0, rng=Random(1)), NodeFailed)


def test_a_run_has_a_deadline() -> None:
    run = _run(tool("t"), deadline_s=5.0)
    _start_all(run, 0.0)
    assert run.next_wake() == 5.0
    (end,) = run.ready(5.0)
    assert isinstance(end, End)
    assert (end.state, end.code) == (RunState.FAILED, "DEADLINE_EXCEEDED")


@pytest.mark.parametrize(
    "event",
    [
        NodeStarted(node="b", at_s=0, submission=1),
        NodeStarted(node="a", at_s=0, submission=2),
        NodeStarted(node="z", at_s=0, submission=1),
        NodeSucceeded(node="a", at_s=0, value=VALUE),
        RunEnded(at_s=0, state=RunState.SUCCEEDED),
        RunEnded(at_s=0, state=RunState.RUNNING),
    ],
)
def test_a_journal_of_something_else_is_refused(event: FlowChange) -> None:
    run = _run(tool("a"), tool("b", "a"))
    with pytest.raises(FailedPrecondition):
        run.apply(event)
    run.check()
    assert run.seq == 0
