"""The effects of a run: llm nodes at the gateway and tools at their workers, each reporting one outcome."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any, Protocol

import anyio
from anyio.abc import TaskGroup

from covey import failpoint
from covey.clock import Clock
from covey.errors import CoveyError, NotFound, Unavailable
from covey.types.flow import NodeState
from covey.types.ids import CallId
from covey.types.program import VariableValue
from services.agentflow import calls
from services.agentflow.blob import Blobs
from services.agentflow.live import LiveRun
from services.agentflow.program import Gateways, Program
from services.agentflow.toolbox import Toolbox

CALL_FIELD = "calls["


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a submission of a node ended."""

    node: str
    submission: int
    result: VariableValue | CoveyError


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What the runs of a process share."""

    blobs: Blobs
    toolbox: Toolbox
    gateways: Gateways
    waits: anyio.CapacityLimiter
    clock: Clock
    rng: Random
    gateway_patience_s: float
    tool_stop_s: float


class Report(Protocol):
    async def __call__(self, outcome: Outcome, /) -> None: ...


class Work:
    """Everything of one run that is at work outside. Lives inside `tasks`, which ends it all."""

    def __init__(self, live: LiveRun, around: Surroundings, tasks: TaskGroup, report: Report) -> None:
        self._live = live
        self._around = around
        self._tasks = tasks
        self._report = report
        self._scopes: dict[str, anyio.CancelScope] = {}
        self._program = Program(
            around.gateways,
            run_id=live.run_id,
            tenant=live.tenant,
            patience_s=around.gateway_patience_s,
            clock=around.clock,
            rng=around.rng,
        )
        self._acked: set[str] = set()
        self._sending = anyio.Lock()

    def start(self, node_ids: Sequence[str], *, again: bool = False) -> None:
        """Hand nodes out that are journaled as running; `again` after a restart, when they may have been before."""
        graph = self._live.state.graph
        llms = [node_id for node_id in node_ids if graph.is_llm(node_id)]
        scopes = {node_id: anyio.CancelScope() for node_id in node_ids}
        self._scopes |= scopes
        if llms:
            self._tasks.start_soon(self._submit, [(node_id, self._submission(node_id)) for node_id in llms], scopes)
        for node_id in node_ids:
            if not graph.is_llm(node_id):
                job = partial(self._use_tool, node_id, again=again)
                self._tasks.start_soon(self._guard, node_id, self._submission(node_id), scopes[node_id], job)

    def drop_withdrawn(self) -> None:
        """Stop waiting for nodes that are no longer running."""
        for node_id in tuple(self._scopes):
            if self._live.node(node_id).state is not NodeState.RUNNING:
                self._scopes.pop(node_id).cancel()

    async def stop(self, node_id: str) -> str:
        """Stop one node's work and return what is known of why it took so long."""
        graph, why = self._live.state.graph, ""
        work = graph.nodes[node_id].work
        if graph.is_llm(node_id):
            if self._live.node(node_id).state is NodeState.RUNNING:
                await self._program.cancel([calls.call_id(node_id, self._submission(node_id))])
        else:
            tool = getattr(work, "tool", "")
            if not self._around.toolbox.offers(self._live.tenant, tool):
                why = f": no attached worker offers the tool {tool!r}"
            await self._around.toolbox.stop(self._key(node_id), timeout_s=self._around.tool_stop_s)
        scope = self._scopes.pop(node_id, None)
        if scope is not None:
            scope.cancel()
        return why

    async def stop_all(self) -> None:
        """Stop decoding and tools; returns when they have stopped."""
        running = self._live.state.running()
        graph = self._live.state.graph
        async with anyio.create_task_group() as tg:
            if any(graph.is_llm(node_id) for node_id in running):
                tg.start_soon(self._program.cancel)
            for node_id in running:
                if not graph.is_llm(node_id):
                    tg.start_soon(
                        partial(self._around.toolbox.stop, self._key(node_id), timeout_s=self._around.tool_stop_s)
                    )

    async def close(self) -> None:
        """Let the gateway forget the run's program."""
        await self._program.close()

    async def ack(self, node_ids: Sequence[str]) -> None:
        """Tell the gateway which values no call of it needs any more."""
        graph, state = self._live.state.graph, self._live.state
        candidates = dict.fromkeys(name for node_id in node_ids for name in (node_id, *graph.values[node_id]))
        done = [
            name
            for name in candidates
            if graph.is_llm(name)
            and name not in self._acked
            and all(state.nodes[user].state is NodeState.SUCCEEDED for user in (name, *graph.consumers[name]))
        ]
        if done and self._program.opened:
            self._acked.update(done)
            self._tasks.start_soon(self._program.ack, [calls.variable(self._live, name) for name in done])

    # -- llm nodes -----------------------------------------------------------

    async def _submit(self, nodes: list[tuple[str, int]], scopes: dict[str, anyio.CancelScope]) -> None:
        try:
            async with self._sending:  # in order: later calls name the outputs of earlier ones
                await self._submit_now([n for n, submission in nodes if self._submission(n) == submission])
        except CoveyError as error:
            blamed = _blamed(error, [node_id for node_id, _ in nodes])
            for node_id, submission in nodes:
                if node_id in blamed:
                    await self._report(Outcome(node=node_id, submission=submission, result=error))
            return
        for node_id, submission in nodes:
            job = partial(self._await_value, node_id)
            self._tasks.start_soon(self._guard, node_id, submission, scopes[node_id], job)

    async def _submit_now(self, node_ids: list[str]) -> None:
        lives = self._program.lives
        if not self._program.opened:
            await self._program.reopen(lives, self._remaining_s())
        try:
            await self._send(node_ids)
        except NotFound:
            if not await self._revive(lives):
                raise

    async def _revive(self, lives: int) -> bool:
        """Open the program anew if the gateway forgot it, with all calls at work; False when it did not forget."""
        if self._program.lives != lives:
            return True
        if not await self._program.reopen(lives, self._remaining_s()):
            return False
        await self._send([n for n in self._live.state.running() if self._live.state.graph.is_llm(n)])
        return True

    async def _send(self, node_ids: Sequence[str]) -> None:
        live, graph = self._live, self._live.state.graph
        values: dict[str, str] = {}
        for node_id in node_ids:
            for name in calls.names_of(graph, node_id):
                variable = calls.variable(live, name) if name in graph.nodes else name
                if not self._program.knows(variable) and (text := await self._text(name)) is not None:
                    values[variable] = text
        await self._program.submit([calls.semantic_call(live, node_id) for node_id in node_ids], values)

    async def _await_value(self, node_id: str) -> VariableValue:
        async with self._around.waits:
            while True:
                lives, name = self._program.lives, calls.variable(self._live, node_id)
                wanted = calls.objective(self._live, node_id, self._around.clock.wall())
                try:
                    return await self._program.get(name, wanted)
                except (Unavailable, NotFound):
                    # Either the call failed or the gateway did; if it forgot the program, all calls are sent again.
                    async with self._sending:
                        revived = await self._revive(lives)
                    if not revived:
                        raise

    # -- tools ---------------------------------------------------------------

    async def _use_tool(self, node_id: str, *, again: bool) -> VariableValue:
        live, around = self._live, self._around
        values = {name: await self._text(name) or "" for name in calls.names_of(live.state.graph, node_id)}
        timeout_s = max(live.state.node_deadline_s(node_id) - around.clock.wall(), 0.001)
        call = calls.tool_call(live, node_id, values, timeout_s)
        await failpoint.hit_async("agentflow.before_effect")
        value, worker = await around.toolbox.call(live.tenant, call, again=again)
        await failpoint.hit_async("agentflow.after_effect")
        return VariableValue(name=node_id, value=value, call_id=CallId(call.key), worker=worker)

    # -- both ----------------------------------------------------------------

    async def _guard(self, node_id: str, submission: int, scope: anyio.CancelScope, job: partial[Any]) -> None:
        result: VariableValue | CoveyError
        with scope:
            try:
                result = await job()
            except CoveyError as error:
                result = error
            await self._report(Outcome(node=node_id, submission=submission, result=result))

    async def _text(self, name: str) -> str | None:
        if name in self._live.submit.inputs:
            return self._live.submit.inputs[name]
        value = self._live.node(name).value
        return None if value is None else await self._around.blobs.load(self._live.tenant, value)

    def _submission(self, node_id: str) -> int:
        return self._live.node(node_id).submissions

    def _key(self, node_id: str) -> str:
        return calls.tool_key(self._live.run_id, node_id)

    def _remaining_s(self) -> float:
        return self._live.state.deadline_at_s - self._around.clock.wall()


def _blamed(error: CoveyError, node_ids: list[str]) -> set[str]:
    """Return the nodes that a refused submission is about: the one that `calls[i]` names, else all of them."""
    place = error.field or ""
    index = place.removeprefix(CALL_FIELD).partition("]")[0]
    if place.startswith(CALL_FIELD) and index.isdigit() and int(index) < len(node_ids):
        return {node_ids[int(index)]}
    return set(node_ids)
