"""What a valid workflow is, and the graph that it forms."""

from __future__ import annotations

import difflib
import heapq
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from covey.errors import InvalidArgument
from covey.policy import template
from covey.types.flow import LlmNode, Node, ToolNode, Workflow
from covey.types.program import ToolHint

ROLES = ("system", "user", "assistant", "tool")
RESERVED = re.compile(r".*__\d+")
"""Names that agentflow gives to the values of later attempts: `summary__2`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """The edges of a valid workflow; nodes in topological order, ties by their place in the workflow."""

    nodes: Mapping[str, Node]
    """In topological order."""
    values: Mapping[str, tuple[str, ...]]
    """Node → the nodes whose values its templates name."""
    needs: Mapping[str, tuple[str, ...]]
    """Node → all nodes that must have succeeded first: those of `values` and of `after`."""
    consumers: Mapping[str, tuple[str, ...]]
    """Node → the nodes that need it."""
    outputs: tuple[str, ...]
    """The declared outputs; without any, the nodes that no other node needs."""

    def is_llm(self, node_id: str) -> bool:
        return isinstance(self.nodes[node_id].work, LlmNode)

    def is_awaited(self, node_id: str) -> bool:
        """Whether something outside the gateway's graph waits for this value: the client or a tool."""
        return node_id in self.outputs or self.then_tool(node_id) is not None

    def then_tool(self, node_id: str) -> ToolHint | None:
        """Return the tool call that starts once the node has ended, the longest expected one of several.

        Whether it takes the node's value or only comes after it: either way the conversation waits for the tool.
        """
        tools = [
            work for consumer in self.consumers[node_id] if isinstance(work := self.nodes[consumer].work, ToolNode)
        ]
        if not tools:
            return None
        longest = max(tools, key=lambda work: work.expected_s)
        return ToolHint(tool=longest.tool, expected_s=longest.expected_s)


def graph(workflow: Workflow, inputs: Iterable[str]) -> Graph:
    """Check a workflow and return its graph.

    Raises:
        InvalidArgument: no nodes, a bad or double id, a reference to nothing, an unknown output or a cycle; the
            message names the node and the variable, `field` the place.
    """
    known_inputs = frozenset(inputs)
    _check_names(workflow, known_inputs)
    by_id = {node.id: node for node in workflow.nodes}
    values = {node.id: _values(node, by_id, known_inputs) for node in workflow.nodes}
    needs = {node.id: tuple(dict.fromkeys((*values[node.id], *_after(node, by_id)))) for node in workflow.nodes}
    consumers: dict[str, list[str]] = {node_id: [] for node_id in by_id}
    for node_id, before in needs.items():
        for dependency in before:
            consumers[dependency].append(node_id)
    order = _topological(needs, consumers)
    for output in workflow.outputs:
        if output not in by_id:
            message = f"output {output!r} is no node of the workflow{_suggest(output, by_id)}"
            raise InvalidArgument(message, field=f"workflow.outputs.{output}")
    sinks = tuple(node_id for node_id in by_id if not consumers[node_id])
    return Graph(
        nodes={node_id: by_id[node_id] for node_id in order},
        values=values,
        needs=needs,
        consumers={node_id: tuple(found) for node_id, found in consumers.items()},
        outputs=tuple(dict.fromkeys(workflow.outputs)) or sinks,
    )


def templates(node: Node) -> tuple[tuple[str, str], ...]:
    """Return each template of a node with its place."""
    place = f"workflow.nodes.{node.id}"
    if isinstance(node.work, LlmNode):
        return tuple((f"{place}.messages[{i}]", message.content) for i, message in enumerate(node.work.messages))
    return tuple((f"{place}.arguments.{name}", text) for name, text in node.work.arguments.items())


def _check_names(workflow: Workflow, inputs: frozenset[str]) -> None:
    if not workflow.name:
        raise InvalidArgument("a workflow needs a name", field="workflow.name")
    if not workflow.nodes:
        raise InvalidArgument("a workflow needs at least one node", field="workflow.nodes")
    for name in inputs:
        _check_name(name, "input", f"inputs.{name}")
    seen: set[str] = set()
    for node in workflow.nodes:
        place = f"workflow.nodes.{node.id}"
        _check_name(node.id, "node", place)
        if node.id in seen:
            raise InvalidArgument(f"two nodes have the id {node.id!r}", field=place)
        if node.id in inputs:
            raise InvalidArgument(f"{node.id!r} is the name of a node and of an input", field=place)
        seen.add(node.id)
        _check_work(node, place)


def _check_name(name: str, what: str, place: str) -> None:
    if not template.is_name(name):
        raise InvalidArgument(
            f"{what} name {name!r}: use a letter or _, then letters, digits, _ . and -, 128 at most", field=place
        )
    if RESERVED.fullmatch(name):
        raise InvalidArgument(f"{what} name {name!r}: an ending of __ and digits is reserved", field=place)


def _check_work(node: Node, place: str) -> None:
    if isinstance(node.work, ToolNode):
        if not node.work.tool:
            raise InvalidArgument(f"node {node.id!r} names no tool", field=f"{place}.tool")
    else:
        if not node.work.messages:
            raise InvalidArgument(f"node {node.id!r} has no messages", field=f"{place}.messages")
        for i, message in enumerate(node.work.messages):
            if message.role not in ROLES:
                raise InvalidArgument(
                    f"node {node.id!r}: role {message.role!r} is none of {', '.join(ROLES)}",
                    field=f"{place}.messages[{i}].role",
                )
        if node.work.params.n != 1:
            raise InvalidArgument(f"node {node.id!r}: a node has one value, so n must be 1", field=f"{place}.params.n")
    if node.retry is not None and node.retry.base_s > node.retry.ceiling_s:
        raise InvalidArgument(f"node {node.id!r}: base_s is over ceiling_s", field=f"{place}.retry.base_s")


def _values(node: Node, by_id: Mapping[str, Node], inputs: frozenset[str]) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for place, text in templates(node):
        for name in template.names(text):
            if name in by_id:
                found[name] = None
            elif name not in inputs:
                hint = _suggest(name, (*by_id, *inputs))
                message = f"node {node.id!r} names {{{{{name}}}}}, which is no input and no node{hint}"
                raise InvalidArgument(message, field=place)
    return tuple(found)


def _after(node: Node, by_id: Mapping[str, Node]) -> tuple[str, ...]:
    for name in node.after:
        if name not in by_id:
            message = f"node {node.id!r} comes after {name!r}, which is no node{_suggest(name, by_id)}"
            raise InvalidArgument(message, field=f"workflow.nodes.{node.id}.after")
    return node.after


def _topological(needs: Mapping[str, tuple[str, ...]], consumers: Mapping[str, list[str]]) -> list[str]:
    place = {node_id: i for i, node_id in enumerate(needs)}
    missing = {node_id: len(before) for node_id, before in needs.items()}
    ready = [(place[node_id], node_id) for node_id, count in missing.items() if count == 0]
    heapq.heapify(ready)
    order: list[str] = []
    while ready:
        _, node_id = heapq.heappop(ready)
        order.append(node_id)
        for consumer in consumers[node_id]:
            missing[consumer] -= 1
            if missing[consumer] == 0:
                heapq.heappush(ready, (place[consumer], consumer))
    if len(order) < len(needs):
        cycle = _cycle(needs, frozenset(order))
        raise InvalidArgument(f"the nodes form a cycle: {' → '.join(cycle)}", field=f"workflow.nodes.{cycle[0]}")
    return order


def _cycle(needs: Mapping[str, tuple[str, ...]], done: frozenset[str]) -> list[str]:
    """Walk back from a node left over until one repeats: each of them needs another one left over."""
    node_id = next(name for name in needs if name not in done)
    walk: dict[str, None] = {}
    while node_id not in walk:
        walk[node_id] = None
        node_id = next(name for name in needs[node_id] if name not in done)
    path = list(walk)
    path = path[path.index(node_id) :]
    return [node_id, *reversed(path)]


def _suggest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names)[:1000], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
