"""A program at the gateway, as its author sees it: calls go out as they are made, values come when asked for."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import replace

import anyio

from covey.client.variable import Variable
from covey.codec.methods import Programs
from covey.errors import CoveyError, DeadlineExceeded, FailedPrecondition, InvalidArgument
from covey.net.rpc import Channel
from covey.net.tasks import background_tasks
from covey.policy import template
from covey.types.ids import CallId, ProgramId
from covey.types.program import (
    CancelCalls,
    OpenProgram,
    ProgramHandle,
    ProgramRequest,
    SemanticCall,
    SubmitCalls,
    ToolHint,
)

RPC_TIMEOUT_S = 30.0
CLOSE_TIMEOUT_S = 5.0
CHUNK_CHARS = 1024**2
STEM_CHARS_MAX = 100

current: ContextVar[Program] = ContextVar("covey_program")


class Program:
    """Made by `client.program()`. Semantic functions called inside the block add to it; nothing waits for that."""

    def __init__(self, channel: Channel, program_id: ProgramId, *, model: str = "") -> None:
        self.channel = channel
        self.program_id = program_id
        self.model = model
        """What calls use whose function names no model; empty is the gateway's own choice."""
        self._ids = itertools.count(1)
        self._calls: list[SemanticCall] = []
        self._values: dict[str, str] = {}
        self._waiting: dict[str, None] = {}
        self._errors: dict[str, CoveyError] = {}
        self._added = anyio.Event()
        self._sent = anyio.Event()
        self._closed = False

    def value(self, text: str, *, name: str = "") -> Variable:
        """Put a text into the program, for several calls to share."""
        self._check_open()
        name = name or f"value_{next(self._ids)}"
        self._values[name] = text
        self._waiting[name] = None
        self._added.set()
        return Variable(self, name)

    def add(self, make: Callable[[CallId, str], SemanticCall], *, stem: str = "call") -> Variable:
        """Add the call that `make(call id, output name)` builds; return its output."""
        self._check_open()
        name = f"{stem[:STEM_CHARS_MAX] if template.is_name(stem) else 'call'}_{next(self._ids)}"
        call = make(CallId(name), name)
        self._calls.append(call if call.model else replace(call, model=self.model))
        self._waiting[name] = None
        self._added.set()
        return Variable(self, name)

    def hint_tool(self, variable: Variable, tool: str, *, expected_s: float = 0.0) -> None:
        """Say that a tool call follows the call of `variable`, so that its KV is kept for the turn after.

        Raises:
            FailedPrecondition: the call has been submitted: hint at once, before anything is awaited.
        """
        for i, call in enumerate(self._calls):
            if call.output == variable.name:
                self._calls[i] = replace(call, then_tool=ToolHint(tool=tool, expected_s=expected_s))
                return
        raise FailedPrecondition(f"the call of {variable.name!r} has been submitted", field=variable.name)

    async def cancel(self) -> None:
        """Cancel every call that has not ended; returns when decoding has stopped."""
        await self.channel.call(Programs.CANCEL, CancelCalls(program_id=self.program_id), timeout_s=RPC_TIMEOUT_S)

    async def submitted(self, name: str, timeout_s: float) -> None:
        """Wait until a variable is known to the gateway.

        Raises:
            DeadlineExceeded: it could not be sent within `timeout_s`.
            CoveyError: what the gateway refused its call with.
        """
        with anyio.move_on_after(timeout_s):
            while name in self._waiting:
                await self._sent.wait()
        if name in self._waiting:
            raise DeadlineExceeded(f"variable {name!r} could not be sent in time", field="timeout_s")
        if name in self._errors:
            raise self._errors[name]

    async def send_all(self) -> None:
        """Send what is added, for as long as the program's block lasts."""
        while True:
            await self._added.wait()
            self._added = anyio.Event()
            while self._calls or self._values:
                await self._send_some()

    async def close(self) -> None:
        """End the program: the gateway frees what it holds."""
        self._closed = True
        request = ProgramRequest(program_id=self.program_id)
        with anyio.CancelScope(shield=True):
            try:
                await self.channel.call(Programs.CLOSE, request, timeout_s=CLOSE_TIMEOUT_S)
            except CoveyError:
                return  # it ends by its time to live

    async def _send_some(self) -> None:
        values, calls = self._chunk()
        request = SubmitCalls(program_id=self.program_id, calls=calls, variables=values)
        names = (*values, *(call.output for call in calls))
        try:
            await self.channel.call(Programs.SUBMIT, request, timeout_s=RPC_TIMEOUT_S)
        except CoveyError as error:
            self._errors.update(dict.fromkeys(names, error))
        for name in names:
            self._waiting.pop(name, None)
        self._sent.set()
        self._sent = anyio.Event()

    def _chunk(self) -> tuple[dict[str, str], tuple[SemanticCall, ...]]:
        """Take values, then calls, as much as one message holds, and at least one."""
        values: dict[str, str] = {}
        chars = 0
        while self._values and (not values or chars < CHUNK_CHARS):
            name = next(iter(self._values))
            values[name] = self._values.pop(name)
            chars += len(values[name])
        count = 0
        while not self._values and count < len(self._calls) and (chars < CHUNK_CHARS):
            chars += sum(len(message.content) for message in self._calls[count].messages)
            count += 1
        calls, self._calls = tuple(self._calls[:count]), self._calls[count:]
        return values, calls

    def _check_open(self) -> None:
        if self._closed:
            raise FailedPrecondition("the program has ended: call inside its `async with` block")


def current_program() -> Program:
    """Return the program of the block that this task is in. Raises `InvalidArgument` outside of one."""
    program = current.get(None)
    if program is None:
        raise InvalidArgument("call semantic functions inside `async with client.program():`", field="program")
    return program


@asynccontextmanager
async def opened(channel: Channel, *, model: str, deadline_s: float, idempotency_key: str) -> AsyncIterator[Program]:
    """Own a program for a block; it is the current one there."""
    request = OpenProgram(idempotency_key=idempotency_key, deadline_s=deadline_s)
    handle: ProgramHandle = await channel.call(Programs.OPEN, request, timeout_s=RPC_TIMEOUT_S)
    program = Program(channel, handle.program_id, model=model)
    token = current.set(program)
    try:
        async with background_tasks() as tasks:
            tasks.start_soon(program.send_all)
            yield program
    finally:
        current.reset(token)
        await program.close()
