"""A run drawn from its events: one line a change without a terminal, a table with one."""

from __future__ import annotations

import io
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

from rich.console import Console

from covey.cli.run_view import follow
from covey.client.run import Run
from covey.testing import VirtualClock
from covey.types.flow import FlowEvent, NodeState, NodeView, RunState, RunView
from covey.types.generate import Usage
from covey.types.ids import RunId
from covey.types.program import CacheOutcome

RUN = RunId("run-1")
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
WAITING = (
    NodeView(id="ask", state=NodeState.WAITING, kind="llm"),
    NodeView(id="read", state=NodeState.WAITING, kind="tool", depends_on=("ask",)),
    NodeView(id="note", state=NodeState.WAITING, kind="llm", depends_on=("ask", "read")),
)
ASKED = NodeView(
    id="ask",
    state=NodeState.SUCCEEDED,
    kind="llm",
    started_s=10.0,
    ended_s=11.5,
    usage=Usage(prompt_tokens=20, completion_tokens=7, cached_tokens=4, loaded_tokens=12),
    pinned_blocks=3,
)
READING = NodeView(id="read", state=NodeState.RUNNING, kind="tool", depends_on=("ask",), started_s=11.5)
NOTED = NodeView(
    id="note",
    state=NodeState.SUCCEEDED,
    kind="llm",
    depends_on=("ask", "read"),
    started_s=12.0,
    ended_s=12.1,
    cache=CacheOutcome.EXACT,
)
FAILED = NodeView(
    id="note", state=NodeState.FAILED, kind="llm", started_s=12.0, ended_s=13.0, error_code="OVERLOADED", error="full"
)


class FakeRun:
    """The part of a run that the view uses, with events that are already there."""

    def __init__(self, events: Sequence[FlowEvent], end: RunState) -> None:
        self._events = events
        self._view = RunView(run_id=RUN, state=RunState.RUNNING, workflow="w", seq=0, created_s=9.0, nodes=WAITING)
        self._end = RunView(run_id=RUN, state=end, workflow="w", seq=len(events), created_s=9.0, nodes=WAITING)
        self.watched = False

    async def view(self) -> RunView:
        return self._end if self.watched else self._view

    @asynccontextmanager
    async def events(self) -> AsyncIterator[AsyncIterator[FlowEvent]]:
        async def each() -> AsyncIterator[FlowEvent]:
            for event in self._events:
                yield event

        yield each()
        self.watched = True


def events_of(*nodes: NodeView, end: RunState) -> list[FlowEvent]:
    changes = [
        FlowEvent(run_id=RUN, seq=i, at_s=10.0 + i, run_state=RunState.RUNNING, node=node)
        for i, node in enumerate(nodes, start=1)
    ]
    return [*changes, FlowEvent(run_id=RUN, seq=len(changes) + 1, at_s=20.0, run_state=end)]


async def drawn(events: Sequence[FlowEvent], end: RunState, **console: Any) -> tuple[RunView, str]:
    out = io.StringIO()
    run = cast("Run", FakeRun(events, end))
    view = await follow(run, Console(file=out, width=120, **console), VirtualClock())
    return view, out.getvalue()


async def test_one_line_a_change_without_a_terminal() -> None:
    events = events_of(ASKED, READING, NOTED, end=RunState.SUCCEEDED)
    view, text = await drawn(events, RunState.SUCCEEDED, force_terminal=False)

    asked, reading, noted = text.splitlines()
    assert view.state is RunState.SUCCEEDED
    assert asked.startswith("✓ ask")
    assert "1.5 s" in asked
    assert "20 → 7 tokens, 16 from cache, 3 blocks pinned" in asked
    assert reading.startswith("▶ read")
    assert noted.endswith("semcache: exact")


async def test_a_failure_says_why() -> None:
    view, text = await drawn(events_of(FAILED, end=RunState.FAILED), RunState.FAILED, force_terminal=False)
    assert view.state is RunState.FAILED
    assert text.startswith("✗ note")
    assert "OVERLOADED: full" in text


async def test_a_terminal_shows_the_graph_indented_by_depth() -> None:
    events = events_of(ASKED, NOTED, end=RunState.SUCCEEDED)
    _, text = await drawn(events, RunState.SUCCEEDED, force_terminal=True, color_system=None)

    frame = CONTROL.sub("", text).split("\r")[-1].splitlines()[:3]
    assert frame[0].startswith("✓ ask")
    assert frame[1].startswith("  · read")
    assert frame[2].startswith("    ✓ note")


async def test_the_watch_ends_with_the_run_and_not_with_the_stream() -> None:
    late = FlowEvent(run_id=RUN, seq=99, at_s=30.0, run_state=RunState.SUCCEEDED, node=FAILED)
    events = [*events_of(ASKED, end=RunState.SUCCEEDED), late]
    _, text = await drawn(events, RunState.SUCCEEDED, force_terminal=False)
    assert len(text.splitlines()) == 1
