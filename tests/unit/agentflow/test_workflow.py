"""What a workflow must be, and what is said of one that is not."""

from __future__ import annotations

import pytest
from hypothesis import given

from covey.errors import InvalidArgument
from covey.policy import template
from covey.policy.workflow import graph
from covey.types.flow import LlmNode, Node, ToolNode, Workflow
from covey.types.program import CallParams, Message
from tests.unit.agentflow.flow_strategies import llm, tool, workflows


def _workflow(*nodes: Node, outputs: tuple[str, ...] = ()) -> Workflow:
    return Workflow(name="w", nodes=nodes, outputs=outputs)


@pytest.mark.parametrize(
    ("workflow", "field", "words"),
    [
        (_workflow(), "workflow.nodes", ["at least one node"]),
        (_workflow(llm("a", "doc"), llm("a", "doc")), "workflow.nodes.a", ["two nodes", "'a'"]),
        (_workflow(llm("doc")), "workflow.nodes.doc", ["node and of an input"]),
        (_workflow(llm("a b")), "workflow.nodes.a b", ["'a b'"]),
        (_workflow(llm("a__2")), "workflow.nodes.a__2", ["reserved"]),
        (_workflow(llm("draft"), llm("b", "draf")), "workflow.nodes.b.messages[0]", ["'b'", "{{draf}}", "'draft'"]),
        (_workflow(tool("t", "nothing")), "workflow.nodes.t.arguments.a0", ["'t'", "{{nothing}}"]),
        (_workflow(llm("a", after=("z",))), "workflow.nodes.a.after", ["'a'", "'z'"]),
        (_workflow(llm("a"), outputs=("b",)), "workflow.outputs.b", ["'b'"]),
        (_workflow(llm("a", "a")), "workflow.nodes.a", ["a → a"]),
        (_workflow(llm("a", "c"), llm("b", "a"), tool("c", "b"), llm("d", "c")), "workflow.nodes.a", ["a → b → c → a"]),
        (_workflow(llm("a", "b"), llm("b", after=("a",))), "workflow.nodes.a", ["cycle"]),
        (_workflow(Node(id="t", work=ToolNode(tool=""))), "workflow.nodes.t.tool", ["'t'"]),
        (
            _workflow(Node(id="m", work=LlmNode(messages=(), params=CallParams()))),
            "workflow.nodes.m.messages",
            ["'m'"],
        ),
        (
            _workflow(Node(id="m", work=LlmNode(messages=(Message(role="robot", content=""),), params=CallParams()))),
            "workflow.nodes.m.messages[0].role",
            ["'robot'"],
        ),
    ],
)
def test_a_bad_workflow_is_refused_by_name(workflow: Workflow, field: str, words: list[str]) -> None:
    with pytest.raises(InvalidArgument) as refused:
        graph(workflow, ["doc"])
    assert refused.value.field == field
    assert [word for word in words if word not in refused.value.message] == []


def test_outputs_are_the_nodes_that_nobody_needs() -> None:
    found = graph(_workflow(llm("a", "doc"), llm("b", "a"), tool("c", "a")), ["doc"])
    assert found.outputs == ("b", "c")
    assert found.then_tool("a") is not None
    assert found.then_tool("b") is None


def test_a_tool_that_only_comes_after_a_call_is_its_next_tool() -> None:
    found = graph(_workflow(llm("a", "doc"), tool("t", after=("a",)), llm("b", "a", "t")), ["doc"])
    assert found.then_tool("a") is not None
    assert found.is_awaited("a")


@given(workflows())
def test_every_node_comes_after_what_it_needs(workflow: Workflow) -> None:
    found = graph(workflow, ["doc"])
    seen: set[str] = set()
    for node_id in found.nodes:
        assert seen.issuperset(found.needs[node_id])
        seen.add(node_id)
    assert seen == {node.id for node in workflow.nodes}


def test_a_graph_of_ten_thousand_nodes_in_a_row() -> None:
    chain = [llm("n0"), *(llm(f"n{i}", f"n{i - 1}") for i in range(1, 10_000))]
    assert list(graph(_workflow(*reversed(chain)), []).nodes) == [f"n{i}" for i in range(10_000)]


def test_values_are_put_in_once_and_other_braces_are_text() -> None:
    text = 'say {{ x }} and {"a": {{"b"}}} to {{y}}'
    assert template.names(text) == ("x", "y")
    assert template.render(text, {"x": "{{y}}", "y": "you"}) == 'say {{y}} and {"a": {{"b"}}} to you'
    assert template.rename(text, lambda name: name + "_2") == 'say {{x_2}} and {"a": {{"b"}}} to {{y_2}}'
    with pytest.raises(InvalidArgument, match="'y'"):
        template.render(text, {"x": ""})
