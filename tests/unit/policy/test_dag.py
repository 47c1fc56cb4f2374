"""The program graph: what is refused and how it is named, and that every call starts exactly once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey.errors import AlreadyExists, InvalidArgument, Overloaded
from covey.policy.dag import CallState, Graph, Node
from covey.types.ids import CallId
from tests.support.graphs import dags, node


def test_a_call_starts_when_its_last_input_has_a_value() -> None:
    graph = Graph()
    graph.add([node("c", "out_a out_b"), node("a", "y"), node("b")], ["y"])
    assert graph.startable() == ("a", "b")
    for call_id in graph.startable():
        assert CallId("c") not in graph.startable()
        graph.start(call_id)
        graph.finish(call_id)
    assert graph.startable() == ("c",)


def test_late_value_releases_the_waiting_call() -> None:
    graph = Graph()
    graph.add([node("a")])
    graph.add([node("b", "out_a x")], ["x"])
    graph.start(CallId("a"))
    graph.finish(CallId("a"))
    assert graph.startable() == ("b",)
    graph.check()


@pytest.mark.parametrize(
    ("nodes", "variables", "error", "words", "field"),
    [
        ([node("a", "nope")], [], InvalidArgument, ["'a'", "'nope'"], "calls[0].messages"),
        ([node("a"), node("a")], [], InvalidArgument, ["'a'", "twice"], "calls[1].call_id"),
        ([node("a", "", "v"), node("b", "", "v")], [], InvalidArgument, ["'a'", "'b'", "'v'"], "calls[1].output"),
        ([node("a", "", "v")], ["v"], InvalidArgument, ["'a'", "'v'"], "calls[0].output"),
        ([node("a", "out_a")], [], InvalidArgument, ["'a'", "'out_a'"], "calls[0].messages"),
        ([node("z"), node("a", "out_b"), node("b", "out_a")], [], InvalidArgument, ["waits for itself"], None),
    ],
)
def test_what_is_wrong_is_named(
    nodes: list[Node], variables: list[str], error: type[Exception], words: list[str], field: str | None
) -> None:
    graph = Graph()
    with pytest.raises(error) as caught:
        graph.add(nodes, variables)
    assert all(word in str(caught.value) for word in words)
    assert field is None or caught.value.field == field  # type: ignore[attr-defined]
    assert not graph.nodes  # nothing of a refused batch stays
    assert not graph.knows("v")


def test_a_known_call_is_known_and_another_body_is_refused() -> None:
    graph = Graph()
    graph.add([node("a", digest=b"1")])
    assert graph.add([node("a", digest=b"1"), node("b")])[1] == ("a",)
    with pytest.raises(AlreadyExists, match="'a'"):
        graph.add([node("a", digest=b"2")])


def test_values_are_set_once_and_never_for_a_producer() -> None:
    graph = Graph()
    graph.add([node("a")], ["x"])
    with pytest.raises(AlreadyExists, match="'x'"):
        graph.set("x")
    with pytest.raises(AlreadyExists, match="'a'"):
        graph.set("out_a")


def test_a_program_is_bounded() -> None:
    graph = Graph(calls_max=2)
    graph.add([node("a"), node("b")])
    with pytest.raises(Overloaded):
        graph.add([node("c")])
    assert graph.add([node("a")])[1] == ("a",)


def test_a_failure_takes_everything_downstream_and_nothing_else() -> None:
    graph = Graph()
    graph.add([node("a"), node("b", "out_a"), node("c", "out_b"), node("d")])
    graph.start(CallId("a"))
    assert set(graph.fail(CallId("a"))) == {"a", "b", "c"}
    assert graph.startable() == ("d",)
    graph.check()


@given(dags(), st.randoms(use_true_random=False), st.floats(0, 0.5))
def test_every_call_ends_once_whatever_fails(nodes: list[Node], rng, failures: float) -> None:  # type: ignore[no-untyped-def]
    graph = Graph()
    graph.add(nodes)
    started: list[CallId] = []
    while ready := graph.startable():
        call_id = rng.choice(ready)
        graph.start(call_id)
        started.append(call_id)
        if rng.random() < failures:
            graph.fail(call_id)
        else:
            graph.finish(call_id)
        graph.check()
    assert len(set(started)) == len(started)
    assert all(graph.state(n.call_id) in (CallState.DONE, CallState.FAILED) for n in nodes)
    if failures == 0:
        assert len(started) == len(nodes)
