"""From what somebody awaits to what each call is for: a backwards pass over the graph (Parrot, OSDI 2024, §5.2)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from covey.policy.dag import CallState, Graph
from covey.types.ids import CallId
from covey.types.program import Objective, ObjectiveKind

_URGENCY = {
    ObjectiveKind.THROUGHPUT: 0,
    ObjectiveKind.DEADLINE: 1,
    ObjectiveKind.TPOT: 2,
    ObjectiveKind.TTFT: 3,
    ObjectiveKind.LATENCY: 4,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Purpose:
    """What one call is for. `group` names the consumer whose inputs are wanted together; empty: it stands alone.

    `depth` counts the calls between this one and the awaited output: 0 produces it.
    """

    objective: Objective
    depth: int = 0
    group: CallId = CallId("")

    @property
    def priority(self) -> int:
        """The worker's priority: greater goes first."""
        return _URGENCY[self.objective.kind]


def more_urgent(a: Objective, b: Objective) -> Objective:
    """The stronger of two wishes: latency, TTFT, TPOT, deadline, throughput; of equals the nearer target (0: none)."""
    return max(a, b, key=lambda o: (_URGENCY[o.kind], -(o.target_s or float("inf"))))


def deduce(graph: Graph, wanted: Mapping[str, Objective]) -> dict[CallId, Purpose]:
    """The purpose of every unfinished call upstream of a wanted variable.

    An only producer inherits its consumer's objective. Several unfinished producers of one consumer are a task group:
    the consumer waits for the last of them, so each is worth throughput, not latency; so is all upstream of them,
    unless another path wants it sooner. A call reached on several paths keeps the most urgent purpose, so that a later
    and more urgent `get` raises everything upstream.
    """
    purposes: dict[CallId, Purpose] = {}
    for variable, objective in wanted.items():
        producer = graph.producer(variable)
        if producer is not None and _unfinished(graph, producer):
            _offer(purposes, producer, Purpose(objective=objective))
    consumers_left = _reach(graph, purposes)
    todo = [call_id for call_id, left in consumers_left.items() if left == 0]
    while todo:  # each call after all of its consumers, so each is visited once
        call_id = todo.pop()
        producers = _producers(graph, call_id)
        handed = _handed(purposes[call_id], call_id, alone=len(producers) == 1)
        for producer in producers:
            _offer(purposes, producer, handed)
            consumers_left[producer] -= 1
            if consumers_left[producer] == 0:
                todo.append(producer)
    return purposes


def _unfinished(graph: Graph, call_id: CallId) -> bool:
    return graph.state(call_id) not in (CallState.DONE, CallState.FAILED)


def _producers(graph: Graph, call_id: CallId) -> set[CallId]:
    """The unfinished calls that feed `call_id`."""
    found = (graph.producer(name) for name in graph.nodes[call_id].inputs if not graph.has_value(name))
    return {p for p in found if p is not None and _unfinished(graph, p)}


def _reach(graph: Graph, roots: Iterable[CallId]) -> dict[CallId, int]:
    """Every unfinished call upstream of `roots`, with how many of these consume its output."""
    consumers = dict.fromkeys(roots, 0)
    todo = list(consumers)
    while todo:
        for producer in _producers(graph, todo.pop()):
            if producer not in consumers:
                consumers[producer] = 0
                todo.append(producer)
            consumers[producer] += 1
    return consumers


def _handed(purpose: Purpose, call_id: CallId, *, alone: bool) -> Purpose:
    """What a call passes to its producers: its own purpose to an only one, throughput to a group."""
    if alone:
        return Purpose(objective=purpose.objective, depth=purpose.depth + 1, group=purpose.group)
    return Purpose(objective=Objective(kind=ObjectiveKind.THROUGHPUT), depth=purpose.depth + 1, group=call_id)


def _offer(purposes: dict[CallId, Purpose], call_id: CallId, offered: Purpose) -> None:
    current = purposes.get(call_id)
    purposes[call_id] = offered if current is None else _merge(current, offered)


def _merge(a: Purpose, b: Purpose) -> Purpose:
    """The most urgent objective, the greatest depth, and the group that comes with that objective."""
    objective = more_urgent(a.objective, b.objective)
    groups = [p.group for p in (a, b) if p.objective == objective]
    return Purpose(objective=objective, depth=max(a.depth, b.depth), group=min(groups))
