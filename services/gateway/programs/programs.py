"""All programs of this gateway: opened, run, expired; each call starts the moment its inputs exist."""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Self

import anyio
from anyio.abc import TaskGroup

from covey.clock import Clock
from covey.errors import Cancelled, CoveyError, DeadlineExceeded, NotFound, Overloaded
from covey.net.tasks import background_tasks
from covey.policy.dag import CallState
from covey.types.ids import CallId, ProgramId, RequestId, TenantId
from covey.types.program import (
    ChoiceDone,
    Completed,
    Delta,
    SemanticCall,
    SubmitCalls,
    SubmitReply,
    VariableValue,
)
from services.gateway.completions import Completions
from services.gateway.config import ProgramSettings
from services.gateway.job import Job, Prompt
from services.gateway.metrics import Metrics
from services.gateway.models import Catalog

from .intake import check_names, nodes_of
from .program import Program

log = logging.getLogger(__name__)

SWEEP_S = 1.0
BUSY_WAIT_S = 0.25
"""Before a call that found the gateway's queue full tries again."""


class _Running:
    """A call under way: how to stop it, and when it has stopped."""

    def __init__(self) -> None:
        self.scope = anyio.CancelScope()
        self.stopped = anyio.Event()


class Programs:
    """The table of programs, bounded; owns the tasks of their calls."""

    def __init__(
        self,
        tg: TaskGroup,
        completions: Completions,
        catalog: Catalog,
        clock: Clock,
        metrics: Metrics,
        settings: ProgramSettings,
        *,
        deadline_s: float,
    ) -> None:
        self._tg = tg
        self._completions = completions
        self._catalog = catalog
        self._clock = clock
        self._metrics = metrics
        self._settings = settings
        self._deadline_s = deadline_s
        self._programs: dict[ProgramId, Program] = {}
        self._keys: dict[tuple[TenantId, str], ProgramId] = {}
        self._running: dict[ProgramId, dict[CallId, _Running]] = {}

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        completions: Completions,
        catalog: Catalog,
        clock: Clock,
        metrics: Metrics,
        settings: ProgramSettings,
        *,
        deadline_s: float,
    ) -> AsyncIterator[Self]:
        """Own programs for a block; their calls are cancelled when it is left."""
        async with background_tasks() as tg:
            programs = cls(tg, completions, catalog, clock, metrics, settings, deadline_s=deadline_s)
            tg.start_soon(programs._sweep_often)
            yield programs

    @property
    def count(self) -> int:
        return len(self._programs)

    def create(self, tenant: TenantId, *, key: str, deadline_s: float, ttl_s: float) -> tuple[Program, bool]:
        """Open a program, or find the one of the same key; returns it and whether it existed.

        Raises:
            Overloaded: too many programs are open.
        """
        known = self._programs.get(self._keys.get((tenant, key), ProgramId(""))) if key else None
        if known is not None:
            self._touch(known)
            return known, True
        self.sweep()
        if len(self._programs) >= self._settings.programs_max:
            raise Overloaded("too many programs are open; close some", retry_after_ms=5000)
        now = self._clock.now()
        program = Program(
            ProgramId(f"prog-{secrets.token_hex(12)}"),
            tenant,
            key=key,
            ttl_s=ttl_s,
            deadline_at=now + deadline_s if deadline_s else float("inf"),
            calls_max=self._settings.calls_max,
            bytes_max=self._settings.bytes_max,
        )
        self._programs[program.program_id] = program
        self._running[program.program_id] = {}
        if key:
            self._keys[tenant, key] = program.program_id
        self._touch(program)
        return program, False

    def find(self, program_id: ProgramId, tenant: TenantId) -> Program:
        """The tenant's program. Raises NotFound, also for another tenant's."""
        program = self._programs.get(program_id)
        if program is None or program.tenant != tenant:
            raise NotFound("no such program; it may have expired", field="program_id")
        self._touch(program)
        return program

    def submit(self, request: SubmitCalls, tenant: TenantId) -> SubmitReply:
        """Add calls and values, and start what can run."""
        program = self.find(request.program_id, tenant)
        check_names(request.variables)
        nodes = nodes_of(request.calls, self._catalog)
        accepted, known = program.submit(request.calls, nodes, request.variables)
        self.advance(program)
        return SubmitReply(accepted=accepted, known=known)

    def advance(self, program: Program) -> None:
        """Start calls whose inputs exist, as many as may run at once."""
        running = self._running.get(program.program_id)
        if running is None:
            return  # closed meanwhile
        room = self._settings.running_max - len(running)
        if room <= 0:
            return
        for call_id in program.startable()[:room]:
            program.graph.start(call_id)
            running[call_id] = _Running()
            self._tg.start_soon(self._run, program, program.calls[call_id], running[call_id])

    def fork(self, program: Program) -> Program:
        """A new program with all values of `program`; calls that have not finished stay with the original."""
        left_s = max(0.001, program.deadline_at - self._clock.now())
        deadline_s = left_s if left_s < float("inf") else 0.0
        copy, _ = self.create(program.tenant, key="", deadline_s=deadline_s, ttl_s=program.ttl_s)
        copy.worker = program.worker
        copy.submit((), (), {name: value.value for name, value in program.values.items()})
        return copy

    async def cancel(self, program: Program, calls: Sequence[CallId], error: CoveyError | None = None) -> None:
        """Stop calls (none named: all) and what is downstream; returns when decoding has stopped.

        Raises:
            NotFound: no such call.
        """
        for call_id in calls:
            if call_id not in program.calls:
                raise NotFound(f"no call {call_id!r} in this program", field="calls")
        running = self._running.get(program.program_id, {})
        stopping: list[_Running] = []
        for call_id in calls or program.unfinished():
            if program.graph.state(call_id) in (CallState.WAITING, CallState.RUNNING):
                program.fail(call_id, error or Cancelled(f"call {call_id!r} was cancelled"))
            if call_id in running:
                running[call_id].scope.cancel()
                stopping.append(running[call_id])
        for one in stopping:
            await one.stopped.wait()

    async def close(self, program: Program) -> None:
        """Cancel what runs and forget the program."""
        self._drop(program)
        await self.cancel(program, ())

    def sweep(self) -> None:
        """Forget expired programs; fail what is unfinished of those whose deadline passed."""
        now = self._clock.now()
        for program in list(self._programs.values()):
            if now >= program.expires_at:
                self._drop(program)
                self._tg.start_soon(self.cancel, program, ())
            elif now >= program.deadline_at and program.unfinished():
                self._tg.start_soon(self.cancel, program, (), DeadlineExceeded("the program's deadline passed"))

    async def _sweep_often(self) -> None:
        while True:
            await anyio.sleep(SWEEP_S)
            self.sweep()

    def _drop(self, program: Program) -> None:
        self._programs.pop(program.program_id, None)
        if program.key:
            self._keys.pop((program.tenant, program.key), None)
        if not self._running.get(program.program_id):
            self._running.pop(program.program_id, None)
        self._metrics.programs.set(len(self._programs))

    def _touch(self, program: Program) -> None:
        program.expires_at = self._clock.now() + program.ttl_s
        self._metrics.programs.set(len(self._programs))

    async def _run(self, program: Program, call: SemanticCall, me: _Running) -> None:
        try:
            with me.scope:
                try:
                    await self._generate(program, call)
                except CoveyError as error:
                    program.fail(call.call_id, error)
                    log.info("call failed program_id=%s code=%s", program.program_id, error.code)
        finally:
            running = self._running[program.program_id]
            running.pop(call.call_id, None)
            if program.program_id not in self._programs and not running:
                del self._running[program.program_id]
            me.stopped.set()
        self._touch(program)
        self.advance(program)

    async def _generate(self, program: Program, call: SemanticCall) -> None:
        deadline_at = min(program.deadline_at, self._clock.now() + (call.timeout_s or self._deadline_s))
        while True:
            try:
                await self._attempt(program, call, self._job(program, call, deadline_at))
            except Overloaded as error:
                if program.partial(call.output) or self._clock.now() + BUSY_WAIT_S >= deadline_at:
                    raise
                await anyio.sleep(max(BUSY_WAIT_S, (error.retry_after_ms or 0) / 1000))
            else:
                return

    async def _attempt(self, program: Program, call: SemanticCall, job: Job) -> None:
        text: list[str] = []
        done: ChoiceDone | None = None
        end: Completed | None = None
        async with self._completions.open(job) as completion:
            async for event in completion:
                match event:
                    case Delta() if event.text:
                        text.append(event.text)
                        program.append(call.output, event.text)
                    case ChoiceDone():
                        done = event
                    case Completed():
                        end = event
                    case _:
                        pass
        if program.graph.state(call.call_id) is not CallState.RUNNING:
            return  # cancelled at the last moment
        assert done is not None, "a completion ends with Completed or an error"
        assert end is not None, "a completion ends with Completed or an error"
        program.worker = completion.worker or program.worker
        program.finish(
            VariableValue(
                name=call.output,
                value="".join(text),
                call_id=call.call_id,
                reason=done.reason,
                usage=end.usage,
                timings=end.timings,
                cache=end.cache,
                worker=completion.worker,
                pinned_blocks=completion.pinned_blocks,
            )
        )

    def _job(self, program: Program, call: SemanticCall, deadline_at: float) -> Job:
        purpose = program.purpose(call.call_id)
        return Job(
            request_id=RequestId(f"call-{secrets.token_hex(12)}"),
            tenant=program.tenant,
            model=call.model,
            prompts=(Prompt(messages=program.messages(call)),),
            params=call.params,
            cache=call.cache,
            deadline_at=deadline_at,
            priority=purpose.priority,
            program_id=program.program_id,
            call_id=call.call_id,
            then_tool=call.then_tool,
            sticky=program.worker,
            hints={
                "objective": purpose.objective.kind.value,
                "depth": str(purpose.depth),
                **({"group": purpose.group} if purpose.group else {}),
            },
        )
