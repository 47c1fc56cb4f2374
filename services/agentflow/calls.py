"""What a node asks of the outside: a semantic call at the gateway or a call of a tool, with stable names."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b

from covey.policy import template
from covey.policy.workflow import Graph
from covey.types.flow import LlmNode, ToolCall, ToolNode
from covey.types.ids import CallId, RunId
from covey.types.program import Message, Objective, ObjectiveKind, SemanticCall
from services.agentflow.live import LiveRun


def call_id(node_id: str, submission: int) -> CallId:
    """Name a call: stable over restarts, so that the gateway knows a call that it has."""
    return CallId(f"{node_id}.{submission}")


def variable(live: LiveRun, node_id: str) -> str:
    """Name the variable that holds a node's value: the node's id, with a number for later submissions."""
    submission = live.node(node_id).submissions
    return node_id if submission <= 1 else f"{node_id}__{submission}"


def tool_key(run_id: RunId, node_id: str) -> str:
    """The idempotency key of a node's side effect: the same over retries and restarts."""
    return blake2b(f"{run_id}\0{node_id}".encode(), digest_size=16).hexdigest()


def semantic_call(live: LiveRun, node_id: str) -> SemanticCall:
    """Build the gateway's call of an llm node; its templates name the variables of the current submissions."""
    spec = live.state.graph.nodes[node_id]
    assert isinstance(spec.work, LlmNode)
    nodes = live.state.nodes

    def current(name: str) -> str:
        return variable(live, name) if name in nodes else name

    messages = tuple(
        Message(role=message.role, content=template.rename(message.content, current)) for message in spec.work.messages
    )
    return SemanticCall(
        call_id=call_id(node_id, live.node(node_id).submissions),
        messages=messages,
        output=variable(live, node_id),
        model=spec.work.model,
        params=spec.work.params,
        cache=spec.work.cache,
        then_tool=live.state.graph.then_tool(node_id),
        timeout_s=spec.timeout_s or live.state.limits.llm_timeout_s,
    )


def tool_call(live: LiveRun, node_id: str, values: Mapping[str, str], timeout_s: float) -> ToolCall:
    """Build a tool call with its arguments' values put in."""
    work = live.state.graph.nodes[node_id].work
    assert isinstance(work, ToolNode)
    return ToolCall(
        key=tool_key(live.run_id, node_id),
        run_id=live.run_id,
        node=node_id,
        tool=work.tool,
        arguments={name: template.render(text, values) for name, text in work.arguments.items()},
        timeout_s=timeout_s,
    )


def names_of(graph: Graph, node_id: str) -> tuple[str, ...]:
    """Return the inputs and nodes that a node's templates name."""
    work = graph.nodes[node_id].work
    texts = [m.content for m in work.messages] if isinstance(work, LlmNode) else list(work.arguments.values())
    return tuple(dict.fromkeys(name for text in texts for name in template.names(text)))


def objective(live: LiveRun, node_id: str, now: float) -> Objective:
    """What the node's value is wanted for: awaited ones soon, those in between whenever it suits the whole."""
    if not live.state.graph.is_awaited(node_id):
        return Objective(kind=ObjectiveKind.THROUGHPUT)
    if live.submit.deadline_s:
        return Objective(kind=ObjectiveKind.DEADLINE, target_s=max(live.state.deadline_at_s - now, 0.001))
    return Objective(kind=ObjectiveKind.LATENCY)
