"""Random workflows and random ends of their nodes, for property tests."""

from __future__ import annotations

from hypothesis import strategies as st

from covey.types.flow import LlmNode, Node, RetryPolicy, ToolNode, Workflow
from covey.types.program import CallParams, Message


def llm(node_id: str, *names: str, after: tuple[str, ...] = (), retry: RetryPolicy | None = None) -> Node:
    text = "write " + " ".join(f"{{{{{name}}}}}" for name in names)
    work = LlmNode(messages=(Message(role="user", content=text),), params=CallParams())
    return Node(id=node_id, work=work, after=after, retry=retry)


def tool(node_id: str, *names: str, after: tuple[str, ...] = (), retry: RetryPolicy | None = None) -> Node:
    work = ToolNode(tool="echo", arguments={f"a{i}": f"{{{{{name}}}}}" for i, name in enumerate(names)})
    return Node(id=node_id, work=work, after=after, retry=retry)


@st.composite
def workflows(draw: st.DrawFn) -> Workflow:
    """Acyclic: each node names some of the nodes before it and perhaps the input `doc`; shuffled."""
    nodes: list[Node] = []
    for i in range(draw(st.integers(1, 9))):
        earlier = [node.id for node in nodes]
        names = draw(st.lists(st.sampled_from(["doc", *earlier]), max_size=3))
        after = draw(st.lists(st.sampled_from(earlier), max_size=1)) if earlier else []
        make = draw(st.sampled_from([llm, tool]))
        nodes.append(make(f"n{i}", *names, after=tuple(after), retry=RetryPolicy(attempts=draw(st.integers(1, 3)))))
    return Workflow(name="random", nodes=tuple(draw(st.permutations(nodes))))
