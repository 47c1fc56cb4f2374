"""The RPCs of `Flow` and `Tools`: who calls, what they may see, and the values of what they see."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial

import anyio

from covey.codec.methods import Flow, Tools
from covey.errors import CoveyError, DeadlineExceeded, InvalidArgument
from covey.net.rpc import Call, Handlers
from covey.types.flow import (
    FlowEvent,
    ListRuns,
    RunHandle,
    RunList,
    RunRequest,
    RunView,
    SubmitRun,
    ToolAttached,
    ToolHello,
    ToolResult,
    ToolServerMessage,
    ToolWorkerMessage,
    WaitRun,
    WatchRun,
)
from services.agentflow.blob import Blobs
from services.agentflow.gatekeeper import tenant_of
from services.agentflow.runs import Runs
from services.agentflow.toolbox import Session, Toolbox
from services.agentflow.view import event_of, view_of

CANCEL_TIMEOUT_S = 60.0
HELLO_TIMEOUT_S = 10.0
BEATS_MISSED_MAX = 3


class Servicer:
    """Handlers for `covey.net.rpc.serve`; its `TenantGate` has found out who calls."""

    def __init__(self, runs: Runs, toolbox: Toolbox, blobs: Blobs, *, beat_s: float) -> None:
        self._runs = runs
        self._toolbox = toolbox
        self._blobs = blobs
        self._beat_s = beat_s

    def handlers(self) -> Handlers:
        """Return the handlers by method; the methods of `Flow` that are missing are answered as not implemented."""
        return {
            Flow.SUBMIT: self.submit,
            Flow.GET: self.get,
            Flow.LIST: self.list_runs,
            Flow.WAIT: self.wait,
            Flow.WATCH: self.watch,
            Flow.CANCEL: self.cancel,
            Tools.ATTACH: self.attach,
        }

    async def submit(self, request: SubmitRun, call: Call) -> RunHandle:
        run_id, existing = await self._runs.submit(tenant_of(call), request)
        return RunHandle(run_id=run_id, existing=existing)

    async def get(self, request: RunRequest, call: Call) -> RunView:
        live = await self._runs.find(tenant_of(call), request.run_id)
        return await view_of(live, self._blobs)

    async def list_runs(self, request: ListRuns, call: Call) -> RunList:
        return RunList(runs=self._runs.listed(tenant_of(call), request.state, request.limit))

    async def wait(self, request: WaitRun, call: Call) -> RunView:
        live = await self._runs.find(tenant_of(call), request.run_id)
        with anyio.move_on_after(call.within(request.timeout_s)):
            await live.until_ended()
        if not live.state.ended:
            raise DeadlineExceeded(f"run {request.run_id!r} has not ended: wait again, or watch it", field="timeout_s")
        return await view_of(live, self._blobs)

    async def watch(self, request: WatchRun, call: Call) -> AsyncIterator[FlowEvent]:
        tenant = tenant_of(call)
        live = await self._runs.find(tenant, request.run_id)
        seq = request.after_seq
        while True:
            for entry in live.entries[seq : seq + 64]:
                yield await event_of(entry, tenant, self._blobs)
                seq = entry.event.seq
            if live.seq <= seq:
                if live.state.ended:
                    return
                await live.changed(seq)

    async def cancel(self, request: RunRequest, call: Call) -> RunView:
        live = await self._runs.find(tenant_of(call), request.run_id)
        self._runs.cancel(live)
        with anyio.move_on_after(call.within(CANCEL_TIMEOUT_S)):
            await live.until_ended()
        if not live.state.ended:
            raise DeadlineExceeded(f"run {request.run_id!r} is still stopping: call again", field="run_id")
        return await view_of(live, self._blobs)

    async def attach(self, requests: AsyncIterator[ToolWorkerMessage], call: Call) -> AsyncIterator[ToolServerMessage]:
        tenant = tenant_of(call)
        hello = await self._hello(requests)
        with self._toolbox.attached(tenant, hello) as session:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(partial(self._listen, requests, session))
                yield ToolAttached(beat_s=self._beat_s)
                try:
                    async for message in session.incoming:
                        yield message
                except GeneratorExit:  # the caller left: end the listener and return, which closes this iterator
                    pass
                tasks.cancel_scope.cancel()

    async def _hello(self, requests: AsyncIterator[ToolWorkerMessage]) -> ToolHello:
        with anyio.move_on_after(HELLO_TIMEOUT_S):
            hello = await anext(requests, None)
            if not isinstance(hello, ToolHello):
                raise InvalidArgument("a tool worker says hello first", field="kind")
            return hello
        raise DeadlineExceeded("a tool worker says hello at once", field="kind")

    async def _listen(self, requests: AsyncIterator[ToolWorkerMessage], session: Session) -> None:
        """Take results in until the worker ends, breaks or falls silent; then end what is sent to it."""
        try:
            while True:
                with anyio.move_on_after(self._beat_s * BEATS_MISSED_MAX):
                    message = await anext(requests, None)
                    if isinstance(message, ToolResult):
                        self._toolbox.deliver(session, message)
                    elif message is None or isinstance(message, ToolHello):
                        return
                    continue
                return
        except CoveyError:
            return
        finally:
            session.outbox.close()
