"""A run in memory: its state, its events with their numbers, and who waits for the next one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import anyio

from covey.errors import Unavailable
from covey.policy.flow import FlowRun
from covey.policy.flow_event import FlowChange, NodeFailed, NodeRetried, NodeStarted, NodeSucceeded, RunEnded, Value
from covey.policy.flow_state import NodeRun
from covey.types.flow import FlowEvent, LlmNode, NodeView, RunState, SubmitRun
from covey.types.ids import RunId, TenantId


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """An event as it was when journaled; `value` is put in when somebody asks."""

    event: FlowEvent
    value: Value | None = None


class LiveRun:
    """One run. `record` is the journal's number of its last record; event numbers count from 1, the run's beginning."""

    def __init__(
        self, *, run_id: RunId, tenant: TenantId, submit: SubmitRun, digest: bytes, state: FlowRun, record: int
    ) -> None:
        self.run_id = run_id
        self.tenant = tenant
        self.submit = submit
        self.digest = digest
        self.state = state
        self.record = record
        self._changed = anyio.Event()
        self._left = False
        created = FlowEvent(run_id=run_id, seq=1, at_s=state.created_s, run_state=RunState.PENDING)
        self.entries = [Entry(event=created)]

    @property
    def seq(self) -> int:
        """Number of the last event."""
        return len(self.entries)

    def apply(self, events: Sequence[FlowChange], record: int) -> None:
        """Move on by the events of one journaled record, and wake who waits."""
        for event in events:
            self.state.apply(event)
            self.entries.append(self._entry(event))
        self.record = record
        self._changed.set()
        self._changed = anyio.Event()

    def leave(self) -> None:
        """This process stops: send those who wait away."""
        self._left = True
        self._changed.set()

    async def changed(self, seq: int) -> None:
        """Wait until there is an event above `seq`. Raises `Unavailable` when this process stops."""
        while self.seq <= seq:
            await self._wait()

    async def until_ended(self) -> None:
        """Wait until nothing of the run is at work any more. Raises `Unavailable` when this process stops."""
        while not self.state.ended:
            await self._wait()

    async def _wait(self) -> None:
        if self._left:
            raise Unavailable("agentflow is stopping: the run goes on with the next one", retry_after_ms=500)
        await self._changed.wait()

    def node_view(self, node_id: str) -> NodeView:
        """One node as it is now, without its value."""
        node, spec = self.state.nodes[node_id], self.state.graph.nodes[node_id]
        return NodeView(
            id=node_id,
            state=node.state,
            attempts=node.attempts,
            started_s=node.started_s,
            ended_s=node.ended_s,
            error_code=node.code,
            error=node.message,
            usage=node.usage,
            timings=node.timings,
            cache=node.cache,
            pinned_blocks=node.pinned_blocks,
            depends_on=self.state.graph.needs[node_id],
            kind="llm" if isinstance(spec.work, LlmNode) else "tool",
            worker=node.worker,
        )

    def node(self, node_id: str) -> NodeRun:
        return self.state.nodes[node_id]

    def _entry(self, event: FlowChange) -> Entry:
        written = FlowEvent(run_id=self.run_id, seq=self.seq + 1, at_s=event.at_s, run_state=self.state.state)
        match event:
            case NodeStarted() | NodeRetried() | NodeFailed():
                return Entry(event=replace(written, node=self.node_view(event.node)))
            case NodeSucceeded():
                return Entry(event=replace(written, node=self.node_view(event.node)), value=event.value)
            case RunEnded():
                return Entry(event=replace(written, error_code=event.code, error=event.message))
            case _:
                return Entry(event=written)
