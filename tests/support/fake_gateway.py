"""An in-process gateway for tests: the Programs service over a real graph, with answers that tests choose."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from hashlib import blake2b

import anyio
from anyio.abc import TaskGroup

from covey.codec.methods import Inference, Programs
from covey.errors import Cancelled, CoveyError, DeadlineExceeded, FailedPrecondition, NotFound
from covey.net.rpc import Call, Handlers, Token, serve
from covey.net.tasks import background_tasks
from covey.policy import template
from covey.policy.dag import Graph, Node
from covey.types.common import Empty
from covey.types.generate import FinishReason, Timings, Usage
from covey.types.ids import CallId, ProgramId
from covey.types.program import (
    AckValues,
    CancelCalls,
    GetVariable,
    ModelCard,
    ModelList,
    OpenProgram,
    ProgramHandle,
    ProgramRequest,
    SemanticCall,
    SetVariable,
    SubmitCalls,
    SubmitReply,
    VariableDelta,
    VariableEvent,
    VariableValue,
)

Answer = Callable[[str, SemanticCall], Awaitable[str]]
"""Prompt and call to text; it may wait, or raise what the call fails with."""


async def echo(prompt: str, _call: SemanticCall) -> str:
    return f"<{prompt}>"


@dataclass(eq=False)
class FakeProgram:
    program_id: ProgramId
    tenant: str
    graph: Graph = field(default_factory=Graph)
    calls: dict[CallId, SemanticCall] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)
    errors: dict[str, CoveyError] = field(default_factory=dict)
    acked: list[str] = field(default_factory=list)
    scopes: dict[CallId, anyio.CancelScope] = field(default_factory=dict)
    changed: anyio.Event = field(default_factory=anyio.Event)

    def notify(self) -> None:
        self.changed.set()
        self.changed = anyio.Event()


class FakeGateway:
    """`ran` lists the prompts of all calls that ran; `programs` what is open."""

    def __init__(self, tasks: TaskGroup, answer: Answer = echo) -> None:
        self.answer = answer
        self.ran: list[str] = []
        self.cancelled: list[CallId] = []
        self.gets: list[GetVariable] = []
        self.submitted: list[SemanticCall] = []
        self.headers: list[Mapping[str, str]] = []
        self.opened: list[str] = []
        self.programs: dict[ProgramId, FakeProgram] = {}
        self._by_key: dict[tuple[str, str], ProgramId] = {}
        self._ids = itertools.count(1)
        self._tasks = tasks

    def handlers(self) -> Handlers:
        return {
            Programs.OPEN: self.open,
            Programs.SUBMIT: self.submit,
            Programs.SET: self.set,
            Programs.GET: self.get,
            Programs.STREAM: self.stream,
            Programs.ACK: self.ack,
            Programs.CANCEL: self.cancel,
            Programs.CLOSE: self.close,
            Inference.MODELS: self.models,
        }

    def forget(self) -> None:
        """Lose all programs, as a restarted gateway has."""
        for program in self.programs.values():
            for scope in program.scopes.values():
                scope.cancel()
            program.notify()
        self.programs.clear()
        self._by_key.clear()

    async def open(self, request: OpenProgram, call: Call) -> ProgramHandle:
        self.headers.append(call.headers)
        tenant = call.headers.get("x-covey-tenant", "")
        key = (tenant, request.idempotency_key or str(next(self._ids)))
        existing = key in self._by_key
        if not existing:
            self.opened.append(request.idempotency_key)
            program_id = self._by_key[key] = ProgramId(f"p{next(self._ids)}")
            self.programs[program_id] = FakeProgram(program_id, tenant)
        return ProgramHandle(program_id=self._by_key[key], existing=existing)

    async def submit(self, request: SubmitCalls, _call: Call) -> SubmitReply:
        program = self._program(request.program_id)
        nodes = [
            Node(
                call_id=call.call_id,
                inputs=tuple(dict.fromkeys(n for m in call.messages for n in template.names(m.content))),
                output=call.output,
                digest=blake2b(repr(call).encode()).digest(),
            )
            for call in request.calls
        ]
        fresh, known = program.graph.add(nodes, request.variables)
        program.values |= request.variables
        program.calls |= {call.call_id: call for call in request.calls}
        self.submitted += [call for call in request.calls if call.call_id not in known]
        self._start(program)
        return SubmitReply(accepted=tuple(n.call_id for n in fresh), known=known)

    async def set(self, request: SetVariable, _call: Call) -> Empty:
        program = self._program(request.program_id)
        program.graph.set(request.name)
        program.values[request.name] = request.value
        self._start(program)
        return Empty()

    async def get(self, request: GetVariable, _call: Call) -> VariableValue:
        self.gets.append(request)
        with anyio.move_on_after(request.timeout_s):
            while True:
                program = self._program(request.program_id)
                if request.name in program.values:
                    return self._value(program, request.name)
                if request.name in program.errors:
                    raise program.errors[request.name]
                if not program.graph.knows(request.name):
                    raise NotFound(f"no variable {request.name!r}", field="name")
                await program.changed.wait()
        raise DeadlineExceeded("no value yet", field="timeout_s")

    async def stream(self, request: GetVariable, call: Call) -> AsyncIterator[VariableEvent]:
        value = await self.get(request, call)
        for word in value.value.split(" "):
            yield VariableDelta(name=request.name, text=word + " ")
        yield value

    async def ack(self, request: AckValues, _call: Call) -> Empty:
        self._program(request.program_id).acked.extend(request.names)
        return Empty()

    async def cancel(self, request: CancelCalls, _call: Call) -> Empty:
        program = self._program(request.program_id)
        for call_id in request.calls or tuple(program.calls):
            self.cancelled.append(call_id)
            self._fail(program, call_id, Cancelled("cancelled"))
            if call_id in program.scopes:
                program.scopes[call_id].cancel()
        program.notify()
        return Empty()

    async def close(self, request: ProgramRequest, _call: Call) -> Empty:
        self.programs.pop(request.program_id, None)
        return Empty()

    async def models(self, _request: Empty, _call: Call) -> ModelList:
        return ModelList(models=(ModelCard(id="fake", context_limit=2048, ready_workers=1),))

    def _program(self, program_id: ProgramId) -> FakeProgram:
        if program_id not in self.programs:
            raise NotFound(f"no program {program_id!r}", field="program_id")
        return self.programs[program_id]

    def _start(self, program: FakeProgram) -> None:
        for call_id in program.graph.startable():
            program.graph.start(call_id)
            self._tasks.start_soon(self._run, program, program.calls[call_id])
        program.notify()

    async def _run(self, program: FakeProgram, call: SemanticCall) -> None:
        prompt = "\n".join(template.render(m.content, program.values) for m in call.messages)
        self.ran.append(prompt)
        with anyio.CancelScope() as scope:
            program.scopes[call.call_id] = scope
            try:
                text = await self.answer(prompt, call)
            except CoveyError as error:
                self._fail(program, call.call_id, error)
            else:
                program.values[call.output] = text
                program.graph.finish(call.call_id)
        del program.scopes[call.call_id]
        self._start(program)

    def _fail(self, program: FakeProgram, call_id: CallId, error: CoveyError) -> None:
        for failed in program.graph.fail(call_id):
            cause = error if failed == call_id else FailedPrecondition(f"call {call_id!r} before it failed")
            program.errors[program.calls[failed].output] = cause

    def _value(self, program: FakeProgram, name: str) -> VariableValue:
        return VariableValue(
            name=name,
            value=program.values[name],
            call_id=program.graph.producer(name) or CallId(""),
            reason=FinishReason.STOP,
            usage=Usage(prompt_tokens=3, completion_tokens=2),
            timings=Timings(),
            worker="decode-0",
        )


@asynccontextmanager
async def fake_gateway(answer: Answer = echo, *, token: Token | None = None) -> AsyncIterator[tuple[FakeGateway, str]]:
    """Serve one on a free port: (gateway, address)."""
    async with background_tasks() as tasks:
        gateway = FakeGateway(tasks, answer)
        async with serve("127.0.0.1:0", gateway.handlers(), token=token, grace_s=0.1) as server:
            yield gateway, server.address
