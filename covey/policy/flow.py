"""The state of a run as a pure machine: events in, what to do next out; replaying a journal rebuilds it."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from typing import Protocol

from covey.errors import CoveyError, FailedPrecondition
from covey.policy.flow_event import (
    CancelRequested,
    FlowChange,
    NodeFailed,
    NodeRetried,
    NodeStarted,
    NodeSucceeded,
    RunEnded,
)
from covey.policy.flow_state import Effect, End, Expire, FlowLimits, NodeRun, Start
from covey.policy.workflow import Graph
from covey.types.flow import NodeState, RunState

ENDED = (RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED)
ERROR_CHARS_MAX = 1024


class Rng(Protocol):
    """Where jitter comes from: a `random.Random`."""

    def uniform(self, a: float, b: float, /) -> float: ...


class FlowRun:
    """One run. Tool nodes start when all that they need has succeeded; llm nodes as soon as what is missing is at
    work at the gateway, which then pipes values from call to call. The first node that fails for good ends the run.
    """

    def __init__(self, graph: Graph, *, created_s: float, deadline_s: float = 0.0, limits: FlowLimits) -> None:
        self.graph = graph
        self.created_s = created_s
        self.deadline_at_s = created_s + min(deadline_s or limits.run_timeout_s, limits.run_timeout_s)
        self.limits = limits
        self.state = RunState.PENDING
        self.ended_s = 0.0
        self.code = ""
        self.message = ""
        self.seq = 0
        """Events applied so far."""
        self.nodes = {node_id: NodeRun(eligible_s=created_s) for node_id in graph.nodes}
        self._place = {node_id: i for i, node_id in enumerate(graph.nodes)}
        self._left = len(graph.nodes)
        self._cancel_asked = False
        self._failed: str | None = None
        self._missing = {node_id: len(graph.needs[node_id]) for node_id in graph.nodes}
        self._unready = dict(self._missing)
        self._ready = {node_id for node_id, count in self._unready.items() if count == 0}
        self._timers: list[tuple[float, int, str]] = []
        for node_id in self._ready:
            self._push_timer(self.node_deadline_s(node_id), node_id)

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    def running(self) -> tuple[str, ...]:
        """Return the nodes at work, in topological order."""
        return tuple(node_id for node_id, node in self.nodes.items() if node.state is NodeState.RUNNING)

    def has_all_needs(self, node_id: str) -> bool:
        """Whether everything that the node needs has succeeded, so that its own result may be journaled."""
        return self._missing[node_id] == 0

    def node_deadline_s(self, node_id: str) -> float:
        """Return when the node's time is up, counted from when all that it needs was there."""
        node = self.graph.nodes[node_id]
        default_s = self.limits.llm_timeout_s if self.graph.is_llm(node_id) else self.limits.tool_timeout_s
        return min(self.nodes[node_id].eligible_s + (node.timeout_s or default_s), self.deadline_at_s)

    # -- decisions -----------------------------------------------------------

    def ready(self, now: float) -> tuple[Effect, ...]:
        """Return what to do next; the same until an event changes it or time passes `next_wake`.

        Starts come in topological order and together: an llm node and those that will get its value at the gateway.
        """
        if self.ended:
            return ()
        end = self._end(now)
        if end is not None:
            return (end,)
        expired = tuple(Expire(node=node_id) for node_id in self._due(now))
        if expired:
            return expired
        return tuple(
            Start(node=node_id, submission=self.nodes[node_id].submissions + 1) for node_id in self._startable(now)
        )

    def _startable(self, now: float) -> list[str]:
        todo = [node_id for node_id in self._ready if self.nodes[node_id].resume_at_s <= now]
        unready: dict[str, int] = {}
        found: list[str] = []
        while todo:
            node_id = todo.pop()
            found.append(node_id)
            for consumer in self.graph.consumers[node_id]:
                if not self._can_pipe(node_id, consumer) or self.nodes[consumer].state is not NodeState.WAITING:
                    continue
                unready[consumer] = unready.get(consumer, self._unready[consumer]) - 1
                if unready[consumer] == 0 and self.nodes[consumer].resume_at_s <= now:
                    todo.append(consumer)
        return sorted(found, key=self._place.__getitem__)

    def next_wake(self) -> float:
        """Return the Unix time at which `ready` may change without an event."""
        resume = (self.nodes[node_id].resume_at_s for node_id in self._ready)
        self._drop_stale_timers()
        timer = self._timers[0][0] if self._timers else self.deadline_at_s
        return min(timer, self.deadline_at_s, *(at_s for at_s in resume if at_s))

    def judge(self, node_id: str, error: CoveyError, *, now: float, rng: Rng) -> NodeRetried | NodeFailed:
        """Decide about a failed attempt: back-off with full jitter over the server's hint, or the end."""
        policy = self.graph.nodes[node_id].retry or self.limits.retry
        failures = self.nodes[node_id].failures + 1
        code, text = error.code, error.message[:ERROR_CHARS_MAX]
        if error.retryable and failures < policy.attempts:
            bound_s = min(policy.ceiling_s, policy.base_s * 2.0 ** min(failures - 1, 64))
            resume_at_s = now + (error.retry_after_ms or 0) / 1000 + rng.uniform(0, bound_s)
            if resume_at_s < self.node_deadline_s(node_id):
                return NodeRetried(node=node_id, at_s=now, resume_at_s=resume_at_s, code=code, message=text)
        return NodeFailed(node=node_id, at_s=now, code=code, message=text)

    def _end(self, now: float) -> End | None:
        if self._cancel_asked:
            return End(state=RunState.CANCELLED, code="CANCELLED", message="the run was cancelled")
        if self._failed is not None:
            node = self.nodes[self._failed]
            return End(state=RunState.FAILED, code=node.code, message=f"node {self._failed!r}: {node.message}")
        if self._left == 0:
            return End(state=RunState.SUCCEEDED)
        if now >= self.deadline_at_s:
            return End(state=RunState.FAILED, code="DEADLINE_EXCEEDED", message="the run's deadline passed")
        return None

    def _due(self, now: float) -> Iterable[str]:
        self._drop_stale_timers()
        if not self._timers or self._timers[0][0] > now:
            return ()
        return tuple(node_id for at_s, _, node_id in self._timers if at_s <= now and self._is_open(node_id))

    def _drop_stale_timers(self) -> None:
        while self._timers and not self._is_open(self._timers[0][2]):
            heapq.heappop(self._timers)

    def _is_open(self, node_id: str) -> bool:
        return self.nodes[node_id].state in (NodeState.WAITING, NodeState.RUNNING)

    def _push_timer(self, at_s: float, node_id: str) -> None:
        heapq.heappush(self._timers, (at_s, self._place[node_id], node_id))

    # -- events --------------------------------------------------------------

    def apply(self, event: FlowChange) -> None:
        """Move on by one journaled event.

        Raises:
            FailedPrecondition: the state does not allow the event: the journal is not this run's.
        """
        self._allow(not self.ended, "the run has ended", event)
        match event:
            case NodeStarted():
                self._apply_started(event)
            case NodeRetried():
                self._apply_retried(event)
            case NodeSucceeded():
                self._apply_succeeded(event)
            case NodeFailed():
                self._apply_failed(event)
            case CancelRequested():
                self._cancel_asked = True
            case RunEnded():
                self._apply_ended(event)
        if self.state is RunState.PENDING:
            self.state = RunState.RUNNING
        self.seq += 1

    def _apply_started(self, event: NodeStarted) -> None:
        node = self._node(event.node, event)
        self._allow(event.node in self._ready, "it was not ready", event)
        self._allow(event.submission == node.submissions + 1, "a submission is missing", event)
        self._set(
            event.node,
            replace(
                node,
                state=NodeState.RUNNING,
                submissions=event.submission,
                started_s=node.started_s or event.at_s,
                resume_at_s=0.0,
            ),
        )

    def _apply_retried(self, event: NodeRetried) -> None:
        node = self._node(event.node, event)
        self._allow(node.state is NodeState.RUNNING, "it was not running", event)
        self._set(
            event.node,
            replace(
                node,
                state=NodeState.WAITING,
                failures=node.failures + 1,
                resume_at_s=event.resume_at_s,
                code=event.code,
                message=event.message,
            ),
        )

    def _apply_succeeded(self, event: NodeSucceeded) -> None:
        node = self._node(event.node, event)
        self._allow(node.state is NodeState.RUNNING, "it was not running", event)
        self._allow(self._missing[event.node] == 0, "a node that it needs has not succeeded", event)
        self._left -= 1
        self._set(
            event.node,
            replace(
                node,
                state=NodeState.SUCCEEDED,
                ended_s=event.at_s,
                value=event.value,
                code="",
                message="",
                usage=event.usage,
                timings=event.timings,
                cache=event.cache,
                worker=event.worker,
                pinned_blocks=event.pinned_blocks,
            ),
        )
        for consumer in self.graph.consumers[event.node]:
            self._missing[consumer] -= 1
            if self._missing[consumer] == 0:
                self.nodes[consumer] = replace(self.nodes[consumer], eligible_s=event.at_s)
                self._push_timer(self.node_deadline_s(consumer), consumer)

    def _apply_failed(self, event: NodeFailed) -> None:
        node = self._node(event.node, event)
        self._allow(self._is_open(event.node), "it had ended", event)
        failed = replace(
            node,
            state=NodeState.FAILED,
            failures=node.failures + (node.state is NodeState.RUNNING),
            ended_s=event.at_s,
            code=event.code,
            message=event.message,
        )
        self._set(event.node, failed)
        self._failed = self._failed or event.node

    def _apply_ended(self, event: RunEnded) -> None:
        self._allow(event.state in ENDED, "it is no end", event)
        self._allow(event.state is not RunState.SUCCEEDED or self._left == 0, "a node has not succeeded", event)
        self.state, self.ended_s, self.code, self.message = event.state, event.at_s, event.code, event.message
        for node_id, node in self.nodes.items():
            if self._is_open(node_id):
                state = NodeState.CANCELLED if node.state is NodeState.RUNNING else NodeState.SKIPPED
                self.nodes[node_id] = replace(node, state=state, ended_s=event.at_s)
        self._ready.clear()
        self._timers.clear()

    def _set(self, node_id: str, node: NodeRun) -> None:
        """Change a node, then what follows for its consumers.

        A producer that failed an attempt takes the llm nodes after it along: the gateway fails their calls with it, so
        they are handed out again.
        """
        todo = [(node_id, node)]
        while todo:
            current, changed = todo.pop()
            served = {name: self._serves(current, name) for name in self.graph.consumers[current]}
            self.nodes[current] = changed
            self._refresh(current)
            for consumer, before in served.items():
                serves = self._serves(current, consumer)
                if serves == before:
                    continue
                self._unready[consumer] += -1 if serves else 1
                self._refresh(consumer)
                if self.nodes[consumer].state is NodeState.RUNNING and not serves:
                    todo.append((consumer, replace(self.nodes[consumer], state=NodeState.WAITING)))

    def _refresh(self, node_id: str) -> None:
        waits = self.nodes[node_id].state is NodeState.WAITING
        if waits and self._unready[node_id] == 0:
            self._ready.add(node_id)
        else:
            self._ready.discard(node_id)

    def _serves(self, producer: str, consumer: str) -> bool:
        """Whether the consumer may be handed out as far as this producer goes."""
        state = self.nodes[producer].state
        if state is not NodeState.RUNNING:
            return state is NodeState.SUCCEEDED
        return self._can_pipe(producer, consumer)

    def _can_pipe(self, producer: str, consumer: str) -> bool:
        """Whether the gateway hands the value on by itself."""
        both_llm = self.graph.is_llm(producer) and self.graph.is_llm(consumer)
        return both_llm and producer not in self.graph.nodes[consumer].after

    def _node(self, node_id: str, event: FlowChange) -> NodeRun:
        self._allow(node_id in self.nodes, "there is no such node", event)
        return self.nodes[node_id]

    def _allow(self, allowed: bool, why: str, event: FlowChange) -> None:
        if not allowed:
            name = getattr(event, "node", "run")
            what = f"{type(event).__name__} of {name!r} at event {self.seq + 1}"
            raise FailedPrecondition(f"{what}: {why}", field="journal")

    def check(self) -> None:
        """Assert the invariants."""
        for node_id, node in self.nodes.items():
            needs = self.graph.needs[node_id]
            missing = sum(self.nodes[name].state is not NodeState.SUCCEEDED for name in needs)
            assert self._missing[node_id] == missing
            assert self._unready[node_id] == sum(not self._serves(name, node_id) for name in needs) or self.ended
            assert node.state is not NodeState.SUCCEEDED or (missing == 0 and node.value is not None)
            assert node.state is not NodeState.RUNNING or self._unready[node_id] == 0
            waits = node.state is NodeState.WAITING and self._unready[node_id] == 0
            assert (node_id in self._ready) == waits or self.ended
            assert not self.ended or not self._is_open(node_id)
        assert self._left == sum(node.state is not NodeState.SUCCEEDED for node in self.nodes.values())
        assert self.state is not RunState.SUCCEEDED or self._left == 0
        assert all(earlier < later for earlier, later in pairwise(self._place.values()))
