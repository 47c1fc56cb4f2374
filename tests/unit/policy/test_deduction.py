"""Deduction: groups, inheritance, raising by a later get, and equality with a brute-force walk of all paths."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from covey.policy.dag import Graph, Node
from covey.policy.deduction import deduce, more_urgent
from covey.types.ids import CallId
from covey.types.program import Objective, ObjectiveKind
from tests.support.graphs import dags, node

LATENCY = Objective(kind=ObjectiveKind.LATENCY)
THROUGHPUT = Objective(kind=ObjectiveKind.THROUGHPUT)


def graph_of(*nodes: Node) -> Graph:
    graph = Graph()
    graph.add(nodes)
    return graph


def test_a_chain_inherits_the_objective() -> None:
    purposes = deduce(graph_of(node("a"), node("b", "out_a"), node("c", "out_b")), {"out_c": LATENCY})
    assert {c: (p.objective.kind, p.depth) for c, p in purposes.items()} == {
        "c": (ObjectiveKind.LATENCY, 0),
        "b": (ObjectiveKind.LATENCY, 1),
        "a": (ObjectiveKind.LATENCY, 2),
    }


def test_siblings_become_a_throughput_group() -> None:
    purposes = deduce(graph_of(node("a"), node("b"), node("r", "out_a out_b")), {"out_r": LATENCY})
    for member in ("a", "b"):
        assert purposes[CallId(member)].objective == THROUGHPUT
        assert purposes[CallId(member)].group == "r"
    assert purposes[CallId("r")].objective == LATENCY


def test_a_group_of_one_left_is_on_the_critical_path() -> None:
    graph = graph_of(node("a"), node("b"), node("r", "out_a out_b"))
    graph.start(CallId("a"))
    graph.finish(CallId("a"))
    assert deduce(graph, {"out_r": LATENCY})[CallId("b")].objective == LATENCY


def test_a_later_get_raises_what_an_earlier_one_wanted() -> None:
    """Parrot's code keeps the first objective (agents.md §1.4, defect 8)."""
    graph = graph_of(node("a"), node("b", "out_a"))
    assert deduce(graph, {"out_b": THROUGHPUT})[CallId("a")].objective == THROUGHPUT
    raised = deduce(graph, {"out_b": THROUGHPUT, "out_a": LATENCY})
    assert raised[CallId("a")].objective == LATENCY
    assert raised[CallId("b")].objective == THROUGHPUT


def test_a_nearer_target_is_more_urgent() -> None:
    near, far = (Objective(kind=ObjectiveKind.DEADLINE, target_s=t) for t in (1.0, 9.0))
    assert more_urgent(near, far) == more_urgent(far, near) == near


def brute_force(
    graph: Graph, call_id: CallId, objective: Objective, depth: int, best: dict[CallId, tuple[Objective, int]]
) -> None:
    known = best.get(call_id, (objective, depth))
    best[call_id] = (more_urgent(known[0], objective), max(known[1], depth))
    producers = {p for name in graph.nodes[call_id].inputs if (p := graph.producer(name)) is not None}
    for producer in producers:
        brute_force(graph, producer, objective if len(producers) == 1 else THROUGHPUT, depth + 1, best)


@given(dags(), st.randoms(use_true_random=False))
def test_equals_brute_force_on_small_graphs(nodes: list[Node], rng) -> None:  # type: ignore[no-untyped-def]
    graph = graph_of(*nodes)
    wanted = {n.output: rng.choice([LATENCY, THROUGHPUT]) for n in nodes if rng.random() < 0.5}
    best: dict[CallId, tuple[Objective, int]] = {}
    # A call's own purpose is settled before it is handed on, so walk each call with its final objective.
    purposes = deduce(graph, wanted)
    for variable, objective in wanted.items():
        producer = graph.producer(variable)
        assert producer is not None
        brute_force(graph, producer, objective, 0, best)
    assert {c: (p.objective, p.depth) for c, p in purposes.items()} == best
