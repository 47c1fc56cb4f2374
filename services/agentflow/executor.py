"""The actor of one run: journals each step before anybody sees it, hands work out and takes outcomes in."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import anyio

from covey import failpoint
from covey.actor import ActorStopped, Inbox
from covey.errors import CoveyError
from covey.policy.flow_event import (
    CancelRequested,
    FlowChange,
    NodeFailed,
    NodeRetried,
    NodeStarted,
    NodeSucceeded,
    RunEnded,
)
from covey.policy.flow_state import End, Expire, Start
from covey.retry import Backoff
from covey.types.flow import NodeState
from covey.types.program import VariableValue
from services.agentflow.journal import Journal
from services.agentflow.live import LiveRun
from services.agentflow.record import parts
from services.agentflow.work import Outcome, Surroundings, Work

log = logging.getLogger(__name__)

WAKE_S_MAX = 60.0
"""Wall clocks jump: look again at least this often."""
JOURNAL_BACKOFF = Backoff(base_s=0.1, ceiling_s=5.0)


class CancelRun:
    """Stop the run; sent ahead of all outcomes."""


Message = Outcome | CancelRun


class Executor:
    """Drives one run to its end. Whoever stops it earlier leaves an open run, which the next owner resumes.

    Raises `Fenced` when somebody else writes the run's journal.
    """

    def __init__(self, live: LiveRun, journal: Journal, around: Surroundings) -> None:
        self._live = live
        self._journal = journal
        self._around = around
        self._held: dict[str, Outcome] = {}
        """Outcomes of calls that ran ahead: journaled once all that they need is."""

    async def run(self, inbox: Inbox[Message]) -> None:
        """Serve the inbox until the run has ended or the process stops."""
        async with anyio.create_task_group() as tasks:

            async def report(outcome: Outcome) -> None:
                try:
                    await inbox.send(outcome)
                except ActorStopped:  # not journaled, so the next owner asks again
                    return

            work = Work(self._live, self._around, tasks, report)
            work.start(self._live.state.running(), again=True)
            end = await self._drive(inbox, work)
            if end is not None:
                await work.stop_all()
            tasks.cancel_scope.cancel()
        if end is not None:
            await self._record([RunEnded(at_s=self._now(), state=end.state, code=end.code, message=end.message)])
            await work.close()

    async def _drive(self, inbox: Inbox[Message], work: Work) -> End | None:
        while True:
            end = await self._advance(work)
            if end is not None:
                return end
            try:
                messages = await self._next(inbox)
            except anyio.EndOfStream:
                return None
            await self._take(messages, work)

    async def _advance(self, work: Work) -> End | None:
        """Do what the state asks for, until it asks for nothing."""
        while effects := self._live.state.ready(self._now()):
            match effects[0]:
                case End() as end:
                    return end
                case Expire():
                    for effect in effects:
                        await self._expire(effect.node, work) if isinstance(effect, Expire) else None
                case Start():
                    starts = [effect for effect in effects if isinstance(effect, Start)]
                    now = self._now()
                    await self._record([NodeStarted(node=s.node, at_s=now, submission=s.submission) for s in starts])
                    work.start([start.node for start in starts])
        return None

    async def _expire(self, node_id: str, work: Work) -> None:
        if self._live.node(node_id).state not in (NodeState.WAITING, NodeState.RUNNING):
            return
        why = await work.stop(node_id)
        message = f"its time ran out{why}"
        await self._record([NodeFailed(node=node_id, at_s=self._now(), code="DEADLINE_EXCEEDED", message=message)])

    async def _next(self, inbox: Inbox[Message]) -> list[Message]:
        """Wait for messages or for the state's next moment, and take all that wait."""
        messages: list[Message] = []
        wait_s = min(max(self._live.state.next_wake() - self._now(), 0.0), WAKE_S_MAX)
        with anyio.move_on_after(wait_s):
            messages.append(await inbox.get())
        while (message := inbox.next()) is not None:
            messages.append(message)
        return messages

    async def _take(self, messages: list[Message], work: Work) -> None:
        for message in messages:
            if isinstance(message, CancelRun):
                await self._record([CancelRequested(at_s=self._now())])
                return
            node = self._live.node(message.node)
            if node.state is NodeState.RUNNING and node.submissions == message.submission:
                self._held[message.node] = message
        await self._settle(work)

    async def _settle(self, work: Work) -> None:
        """Journal what can be: rounds, since one node's value lets those behind it settle."""
        state = self._live.state
        while ready := [node_id for node_id in self._held if state.has_all_needs(node_id)]:
            events = [await self._event(self._held.pop(node_id)) for node_id in ready]
            await self._record(events)
            await failpoint.hit_async("agentflow.after_journal")
            if any(isinstance(event, NodeRetried) for event in events):
                work.drop_withdrawn()
                for node_id in [n for n in self._held if state.nodes[n].state is not NodeState.RUNNING]:
                    del self._held[node_id]
            await work.ack([event.node for event in events if isinstance(event, NodeSucceeded)])

    async def _event(self, outcome: Outcome) -> NodeSucceeded | NodeRetried | NodeFailed:
        result = outcome.result
        if isinstance(result, VariableValue):
            try:
                value = await self._around.blobs.store(self._live.tenant, result.value)
            except CoveyError as error:
                result = error
            else:
                return NodeSucceeded(
                    node=outcome.node,
                    at_s=self._now(),
                    value=value,
                    usage=result.usage,
                    timings=result.timings,
                    cache=result.cache,
                    worker=result.worker,
                    pinned_blocks=result.pinned_blocks,
                )
        return self._live.state.judge(outcome.node, result, now=self._now(), rng=self._around.rng)

    async def _record(self, events: Sequence[FlowChange]) -> None:
        """Journal, then apply. A journal that is gone or full holds the run up until it is back."""
        for part in parts(events):
            self._live.apply(part, await self._append(part))

    async def _append(self, events: Sequence[FlowChange]) -> int:
        attempt = 0
        while True:
            try:
                return await self._journal.append(self._live.run_id, events, last=self._live.record)
            except CoveyError as error:
                if not error.retryable:
                    raise
                if attempt == 0:
                    log.warning("journal not writable run=%s code=%s", self._live.run_id, error.code)
                await anyio.sleep(
                    JOURNAL_BACKOFF.delay_s(attempt, self._around.rng, retry_after_ms=error.retry_after_ms)
                )
                attempt += 1

    def _now(self) -> float:
        return self._around.clock.wall()
