"""Attached tool workers: who offers which tool, with how many free places, and the calls that they hold."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from covey.actor import Reply
from covey.errors import (
    AlreadyExists,
    CoveyError,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    Overloaded,
    Unavailable,
)
from covey.types.flow import ToolCall, ToolCancel, ToolHello, ToolResult, ToolServerMessage, ToolSpec
from covey.types.ids import TenantId

OUTBOX_MAX = 4096
WORKERS_MAX = 1024
WAITING_MAX = 100_000


class ToolFailed(CoveyError):
    """The tool itself said that it failed; the text is its own. Never leaves the service but as a node's error."""

    code = "TOOL_FAILED"

    def __init__(self, message: str, *, retryable: bool) -> None:
        super().__init__(message)
        self.retryable = retryable  # type: ignore[misc] # of this failure, as the tool says


@dataclass(slots=True, eq=False)
class Session:
    """One attached worker."""

    tenant: TenantId
    worker: str
    tools: dict[str, ToolSpec]
    outbox: MemoryObjectSendStream[ToolServerMessage]
    incoming: MemoryObjectReceiveStream[ToolServerMessage]
    calls: dict[str, tuple[ToolCall, Reply[str]]] = field(default_factory=dict)

    def free(self, tool: str) -> int:
        """Return how many more calls of `tool` the worker takes; at most 0 when it has no such tool."""
        spec = self.tools.get(tool)
        if spec is None:
            return 0
        return spec.concurrency - sum(call.tool == tool for call, _ in self.calls.values())

    def send(self, message: ToolServerMessage) -> None:
        """Queue a message. Raises `Unavailable` when the worker is gone or does not read."""
        try:
            self.outbox.send_nowait(message)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError, anyio.WouldBlock) as error:
            raise Unavailable(f"tool worker {self.worker!r} is gone") from error


class Toolbox:
    """All attached workers, by tenant: a tenant's runs use only the tools that its own workers offer."""

    def __init__(self) -> None:
        self._sessions: dict[tuple[TenantId, str], Session] = {}
        self._changed = anyio.Event()
        self._queues: dict[tuple[TenantId, str], OrderedDict[anyio.Event, None]] = {}
        """Calls that wait for a place, the oldest first."""
        self._waiting = 0

    @property
    def workers(self) -> int:
        return len(self._sessions)

    @contextmanager
    def attached(self, tenant: TenantId, hello: ToolHello) -> Iterator[Session]:
        """Offer a worker's tools for a block; leaving it fails the calls that the worker still holds.

        Raises:
            InvalidArgument: no name, no tools or one twice.
            AlreadyExists: a worker of that name is attached.
            Overloaded: too many workers.
        """
        session = self._open(tenant, hello)
        self._wake(tenant, session.tools)
        try:
            yield session
        finally:
            del self._sessions[tenant, hello.worker]
            session.outbox.close()
            session.incoming.close()
            for _, reply in tuple(session.calls.values()):
                reply.fail(Unavailable(f"tool worker {hello.worker!r} is gone"))
            self._notify()

    def close(self) -> None:
        """Let all workers go: their streams end, and they attach to the next process."""
        for session in self._sessions.values():
            session.outbox.close()

    def _open(self, tenant: TenantId, hello: ToolHello) -> Session:
        if not hello.worker or not hello.tools:
            raise InvalidArgument("a tool worker names itself and at least one tool", field="worker")
        tools = {spec.name: spec for spec in hello.tools}
        if len(tools) < len(hello.tools) or "" in tools:
            raise InvalidArgument("each tool needs a name of its own", field="tools")
        if (tenant, hello.worker) in self._sessions:
            raise AlreadyExists(f"a tool worker {hello.worker!r} is attached", field="worker")
        if len(self._sessions) >= WORKERS_MAX:
            raise Overloaded("too many tool workers are attached", retry_after_ms=5000)
        outbox, incoming = anyio.create_memory_object_stream[ToolServerMessage](OUTBOX_MAX)
        session = Session(tenant=tenant, worker=hello.worker, tools=tools, outbox=outbox, incoming=incoming)
        self._sessions[tenant, hello.worker] = session
        return session

    def deliver(self, session: Session, result: ToolResult) -> None:
        """Hand a worker's result to who waits for it; one that nobody waits for is dropped."""
        found = session.calls.get(result.key)
        if found is None:
            return
        if result.error:
            found[1].fail(ToolFailed(result.error, retryable=result.retryable))
        else:
            found[1].set(result.value)

    def offers(self, tenant: TenantId, tool: str) -> bool:
        """Whether any attached worker of the tenant has the tool."""
        return any(s.tenant == tenant and tool in s.tools for s in self._sessions.values())

    async def call(self, tenant: TenantId, call: ToolCall, *, again: bool) -> tuple[str, str]:
        """Wait for a free place, run the tool there, return (value, worker). Waits without end: bound it.

        `again` says that an earlier process may have handed the call out.

        Raises:
            ToolFailed: the tool did.
            Unavailable: its worker was lost; the tool may have run, its key stays the same.
            FailedPrecondition: the tool may have run before and says that it must not run twice.
        """
        session = await self._place(tenant, call.tool)
        spec = session.tools[call.tool]
        if again and not spec.idempotent:
            raise FailedPrecondition(f"tool {call.tool!r} may have run, and is declared not to be idempotent")
        reply: Reply[str] = Reply()
        session.calls[call.key] = (call, reply)
        try:
            session.send(call)
            return await reply.wait(), session.worker
        except Unavailable as error:
            if spec.idempotent:
                raise
            message = f"{error.message}; tool {call.tool!r} may have run, and is declared not to be idempotent"
            raise FailedPrecondition(message) from error
        finally:
            session.calls.pop(call.key, None)
            self._wake(tenant, [call.tool])
            self._notify()

    async def stop(self, key: str, *, timeout_s: float) -> None:
        """Cancel a call at its worker and wait until the worker says that it has stopped, or until `timeout_s`."""
        held = [session for session in self._sessions.values() if key in session.calls]
        for session in held:
            try:
                session.send(ToolCancel(key=key))
            except Unavailable:
                continue
            with anyio.move_on_after(timeout_s):
                while key in session.calls and session in self._sessions.values():
                    await self._changed.wait()

    async def _place(self, tenant: TenantId, tool: str) -> Session:
        session = self._best(tenant, tool)
        if session is not None:
            return session
        if self._waiting >= WAITING_MAX:
            raise Overloaded("too many tool calls wait for a worker", retry_after_ms=1000)
        place = (tenant, tool)
        me = anyio.Event()
        self._queues.setdefault(place, OrderedDict())[me] = None
        self._waiting += 1
        try:
            while True:
                await me.wait()
                session = self._best(tenant, tool)
                if session is not None:
                    return session
                me = anyio.Event()  # somebody was quicker: wait on, in front
                queue = self._queues.setdefault(place, OrderedDict())
                queue[me] = None
                queue.move_to_end(me, last=False)
        finally:
            self._waiting -= 1
            self._leave(place, me)
            if me.is_set() and session is None:
                self._wake(tenant, [tool])  # cancelled with a place in hand: it is the next one's

    def _leave(self, place: tuple[TenantId, str], me: anyio.Event) -> None:
        queue = self._queues.get(place)
        if queue is not None:
            queue.pop(me, None)
            if not queue:
                del self._queues[place]

    def _best(self, tenant: TenantId, tool: str) -> Session | None:
        candidates = [s for s in self._sessions.values() if s.tenant == tenant and s.free(tool) > 0]
        return max(candidates, key=lambda s: s.free(tool), default=None)

    def _wake(self, tenant: TenantId, tools: Iterable[str]) -> None:
        """Wake as many calls as there are free places for their tools, the oldest first."""
        for tool in tools:
            queue = self._queues.get((tenant, tool))
            if not queue:
                continue
            free = sum(max(s.free(tool), 0) for s in self._sessions.values() if s.tenant == tenant)
            for me in list(itertools.islice(queue, free)):
                self._leave((tenant, tool), me)
                me.set()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    def check(self) -> None:
        """Assert the invariants."""
        for (tenant, worker), session in self._sessions.items():
            if (session.tenant, session.worker) != (tenant, worker):
                raise Internal("a session stands under another name")
            assert all(session.free(tool) >= 0 for tool in session.tools)
