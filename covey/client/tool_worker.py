"""The process side of tools: attached to agentflow, running calls, each key at most once at a time."""

from __future__ import annotations

import secrets
import socket
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from random import Random

import anyio
from anyio.abc import TaskGroup
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from covey.client.tool import Tool
from covey.codec.methods import Tools
from covey.errors import CoveyError, InvalidArgument, PermissionDenied, Unauthenticated
from covey.net.rpc import Channel
from covey.net.tasks import background_tasks
from covey.retry import Backoff
from covey.types.flow import ToolAttached, ToolBeat, ToolCall, ToolCancel, ToolHello, ToolResult, ToolWorkerMessage

RESULTS_KEPT_MAX = 1024
"""Results by key, for a call that comes again after a reconnect."""
RESULTS_CHARS_MAX = 16 * 1024**2
OUTBOX_MAX = 1024
ERROR_CHARS_MAX = 1024
BACKOFF = Backoff(base_s=0.1, ceiling_s=5.0)
REFUSED = (InvalidArgument, Unauthenticated, PermissionDenied)


class ToolWorker:
    """Offers tools for as long as `run` runs; it attaches again whenever the connection is lost."""

    def __init__(self, channel: Channel, tools: Sequence[Tool], *, worker: str = "") -> None:
        """Raise `InvalidArgument` when there is no tool, or two of a name."""
        self.worker = worker or f"{socket.gethostname()}-{secrets.token_hex(4)}"
        self.attached = anyio.Event()
        """Set once the tools are offered for the first time."""
        self._channel = channel
        self._tools = {tool.spec.name: tool for tool in tools}
        if not tools or len(self._tools) < len(tools):
            raise InvalidArgument("serve at least one tool, each with a name of its own", field="tools")
        self._running: dict[str, anyio.CancelScope] = {}
        self._results: OrderedDict[str, ToolResult] = OrderedDict()
        self._failures = 0
        self._outbox: MemoryObjectSendStream[ToolWorkerMessage] | None = None

    async def run(self) -> None:
        """Serve until cancelled.

        Raises:
            InvalidArgument, Unauthenticated, PermissionDenied: agentflow refuses these tools, or the key.
        """
        rng = Random()  # noqa: S311 - jitter, not a secret
        async with background_tasks() as tasks:
            while True:
                try:
                    await self._attach(tasks)
                except REFUSED:
                    raise
                except CoveyError:
                    self._failures += 1
                await anyio.sleep(BACKOFF.delay_s(self._failures, rng))

    async def _attach(self, tasks: TaskGroup) -> None:
        """Serve one connection to its end."""
        outbox, outgoing = anyio.create_memory_object_stream[ToolWorkerMessage](OUTBOX_MAX)
        specs = tuple(tool.spec for tool in self._tools.values())
        outbox.send_nowait(ToolHello(worker=self.worker, tools=specs))
        self._outbox = outbox
        with outbox, outgoing:
            async with self._channel.exchange(Tools.ATTACH, _drained(outgoing), timeout_s=None) as incoming:
                async for message in incoming:
                    match message:
                        case ToolAttached():
                            self._failures = 0
                            self.attached.set()
                            tasks.start_soon(self._beat, outbox, message.beat_s)
                        case ToolCall():
                            self._take(message, tasks)
                        case ToolCancel():
                            self._stop(message.key, tasks)

    async def _beat(self, outbox: MemoryObjectSendStream[ToolWorkerMessage], beat_s: float) -> None:
        """Say that we are alive until the connection's outbox is closed."""
        while True:
            try:
                await outbox.send(ToolBeat())
            except (anyio.BrokenResourceError, anyio.ClosedResourceError):
                return
            await anyio.sleep(beat_s)

    def _take(self, call: ToolCall, tasks: TaskGroup) -> None:
        done = self._results.get(call.key)
        if done is not None:
            tasks.start_soon(self._send, done)
        elif call.key not in self._running:
            scope = self._running[call.key] = anyio.CancelScope()
            tasks.start_soon(self._run_call, call, scope)

    def _stop(self, key: str, tasks: TaskGroup) -> None:
        scope = self._running.get(key)
        if scope is not None:
            scope.cancel()
        else:
            tasks.start_soon(self._send, ToolResult(key=key, error="it was not running", retryable=True))

    async def _run_call(self, call: ToolCall, scope: anyio.CancelScope) -> None:
        result = ToolResult(key=call.key, error="the call was cancelled or took too long", retryable=True)
        if call.timeout_s:
            scope.deadline = anyio.current_time() + call.timeout_s
        try:
            with scope:
                result = await self._result(call)
        finally:
            del self._running[call.key]
        if not result.error:
            self._keep(result)
        await self._send(result)

    async def _result(self, call: ToolCall) -> ToolResult:
        tool = self._tools.get(call.tool)
        if tool is None:
            return ToolResult(key=call.key, error=f"this worker has no tool {call.tool!r}", retryable=False)
        try:
            return ToolResult(key=call.key, value=await tool.invoke(call))
        except CoveyError as error:
            return ToolResult(key=call.key, error=error.message[:ERROR_CHARS_MAX], retryable=error.retryable)
        except Exception as error:  # noqa: BLE001 - the user's function: whatever it raises is its failure, not the worker's
            text = f"{type(error).__name__}: {error}"
            return ToolResult(key=call.key, error=text[:ERROR_CHARS_MAX], retryable=True)

    def _keep(self, result: ToolResult) -> None:
        self._results[result.key] = result
        chars = sum(len(kept.value) for kept in self._results.values())
        while len(self._results) > RESULTS_KEPT_MAX or (chars > RESULTS_CHARS_MAX and len(self._results) > 1):
            _, oldest = self._results.popitem(last=False)
            chars -= len(oldest.value)

    async def _send(self, result: ToolResult) -> None:
        """Send on the connection there is; what is lost with it is asked for again by its key."""
        if self._outbox is None:
            return
        try:
            await self._outbox.send(result)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            return


async def _drained(
    outgoing: MemoryObjectReceiveStream[ToolWorkerMessage],
) -> AsyncIterator[ToolWorkerMessage]:
    async for message in outgoing:
        yield message


@asynccontextmanager
async def serving(channel: Channel, tools: Sequence[Tool], *, worker: str = "") -> AsyncIterator[ToolWorker]:
    """Offer tools for a block; it starts once they are attached. Leaving it cancels the calls that run.

    Raises:
        InvalidArgument, Unauthenticated, PermissionDenied: agentflow refuses these tools, or the key.
    """
    tool_worker = ToolWorker(channel, tools, worker=worker)
    async with background_tasks() as tasks:
        tasks.start_soon(tool_worker.run)
        await tool_worker.attached.wait()
        yield tool_worker
