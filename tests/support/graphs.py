"""Small program graphs for tests: one node in a line, and random graphs without cycles."""

from __future__ import annotations

from hypothesis import strategies as st

from covey.policy.dag import Node
from covey.types.ids import CallId


def node(call_id: str, inputs: str = "", output: str = "", digest: bytes = b"") -> Node:
    return Node(call_id=CallId(call_id), inputs=tuple(inputs.split()), output=output or f"out_{call_id}", digest=digest)


@st.composite
def dags(draw: st.DrawFn) -> list[Node]:
    count = draw(st.integers(1, 12))
    nodes = [
        node(
            str(i), " ".join(f"out_{j}" for j in sorted(draw(st.sets(st.integers(0, i - 1), max_size=3)) if i else ()))
        )
        for i in range(count)
    ]
    return draw(st.permutations(nodes))
