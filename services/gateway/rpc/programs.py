"""`Programs` over gRPC."""

from __future__ import annotations

from collections.abc import AsyncIterator

import anyio

from covey.codec.methods import Programs as Methods
from covey.errors import DeadlineExceeded, InvalidArgument
from covey.net.rpc import Call, Handlers
from covey.policy import template
from covey.types.common import Empty
from covey.types.program import (
    AckValues,
    CancelCalls,
    GetVariable,
    OpenProgram,
    ProgramHandle,
    ProgramRequest,
    SetVariable,
    SubmitCalls,
    SubmitReply,
    VariableDelta,
    VariableEvent,
    VariableValue,
)
from services.gateway.programs.programs import Programs

from .credentials import tenant_of


class ProgramsServicer:
    """Handlers of `Programs`."""

    def __init__(self, programs: Programs) -> None:
        self._programs = programs

    def handlers(self) -> Handlers:
        return {
            Methods.OPEN: self.open,
            Methods.SUBMIT: self.submit,
            Methods.SET: self.set,
            Methods.GET: self.get,
            Methods.STREAM: self.stream,
            Methods.ACK: self.ack,
            Methods.FORK: self.fork,
            Methods.CANCEL: self.cancel,
            Methods.CLOSE: self.close,
        }

    async def open(self, request: OpenProgram, call: Call) -> ProgramHandle:
        program, existing = self._programs.create(
            tenant_of(call), key=request.idempotency_key, deadline_s=request.deadline_s, ttl_s=request.ttl_s
        )
        return ProgramHandle(program_id=program.program_id, existing=existing)

    async def submit(self, request: SubmitCalls, call: Call) -> SubmitReply:
        return self._programs.submit(request, tenant_of(call))

    async def set(self, request: SetVariable, call: Call) -> Empty:
        program = self._programs.find(request.program_id, tenant_of(call))
        if not template.is_name(request.name):
            raise InvalidArgument(f"{request.name[:64]!r} cannot name a variable", field="name")
        program.set(request.name, request.value)
        self._programs.advance(program)
        return Empty()

    async def get(self, request: GetVariable, call: Call) -> VariableValue:
        program = self._programs.find(request.program_id, tenant_of(call))
        program.want(request.name, request.objective)
        return await program.wait(request.name, call.within(request.timeout_s))

    async def stream(self, request: GetVariable, call: Call) -> AsyncIterator[VariableEvent]:
        """Pieces as they are produced, then the whole value. A reader sets its own pace: pieces wait in the program."""
        program = self._programs.find(request.program_id, tenant_of(call))
        program.want(request.name, request.objective)
        sent = chars = 0
        deadline_s = call.within(request.timeout_s)
        until = anyio.current_time() + deadline_s
        while True:
            pieces = program.partial(request.name)
            while sent < len(pieces):
                yield VariableDelta(name=request.name, text=pieces[sent])
                chars += len(pieces[sent])
                sent += 1
            value = program.peek(request.name)
            if value is not None:
                if len(value.value) > chars:
                    yield VariableDelta(name=request.name, text=value.value[chars:])
                yield value
                return
            if sent == len(program.partial(request.name)):
                with anyio.CancelScope(deadline=until) as waiting:
                    await program.changed(request.name)
                if waiting.cancelled_caught:
                    raise DeadlineExceeded(
                        f"variable {request.name!r} is not complete after {deadline_s:g} s", field="timeout_s"
                    )

    async def ack(self, request: AckValues, call: Call) -> Empty:
        self._programs.find(request.program_id, tenant_of(call)).ack(request.names)
        return Empty()

    async def fork(self, request: ProgramRequest, call: Call) -> ProgramHandle:
        program = self._programs.fork(self._programs.find(request.program_id, tenant_of(call)))
        return ProgramHandle(program_id=program.program_id)

    async def cancel(self, request: CancelCalls, call: Call) -> Empty:
        await self._programs.cancel(self._programs.find(request.program_id, tenant_of(call)), request.calls)
        return Empty()

    async def close(self, request: ProgramRequest, call: Call) -> Empty:
        await self._programs.close(self._programs.find(request.program_id, tenant_of(call)))
        return Empty()
