"""What services hold of the engine: the request-level contract of design §11."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import anyio

from covey.actor import Ref, supervise
from covey.clock import Clock
from covey.errors import CoveyError, Overloaded
from covey.model.grammar import CompiledGrammar
from covey.model.plan import Runner
from covey.policy.prefix_cache import CacheKey
from covey.types.generate import (
    AdoptReply,
    AdoptRequest,
    EngineInfo,
    EngineLoad,
    Event,
    GenerateRequest,
    HandoverTicket,
    RetainReply,
    RetainRequest,
    Role,
)
from covey.types.ids import RequestId, WorkerId
from covey.types.store import BlockStore

from .actor import EngineActor, OnBlocks
from .board import Board
from .borrowing import Neighbours
from .creditor import Creditor
from .endings import failed, refused
from .grammars import Grammars
from .limits import EngineLimits
from .messages import Abort, Adopt, Cancel, Drain, Export, ListKeys, Message, Retain, Submit, Wake
from .outbox import Outbox, is_terminal
from .text import Vocabulary

FEATURES = {
    Role.PREFILL: ("handover",),
    Role.DECODE: ("retain", "export", "adopt", "resume"),
}


class Engine:
    """Generates, cancels, retains, exports and adopts. Errors of a request are events; other calls raise."""

    def __init__(
        self,
        ref: Ref[Message],
        board: Board,
        info: EngineInfo,
        limits: EngineLimits,
        clock: Clock,
        check: Callable[[], None],
        grammars: Grammars,
        creditor: Creditor,
    ) -> None:
        self._ref = ref
        self.check = check
        """Asserts the invariants of blocks and batch; for tests and debugging, between steps."""
        self._info = info
        self._limits = limits
        self._clock = clock
        self._grammars = grammars
        self._open: dict[RequestId, Outbox] = {}
        self.board = board
        self.creditor = creditor
        """Keeps blocks of other workers' sequences."""

    def info(self) -> EngineInfo:
        """What this worker is; the same for its whole life."""
        return self._info

    def load(self) -> EngineLoad:
        """How busy it is, as of the actor's last turn."""
        return self.board.load

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """Run a request; the last event is the one terminal event. Closing the iterator cancels the request.

        Something comes at least every `progress_s`, unless a step is stuck: then silence tells the watchdog.
        """
        outbox = Outbox(self._limits.outbox_tokens)
        self._open[request.request_id] = outbox
        try:
            grammar: CompiledGrammar | None = None
            if request.grammar:
                compiling = self._grammars.start(request.grammar, timeout_s=request.deadline_s)
                while (grammar := await compiling.wait(self._limits.progress_s)) is None:
                    yield outbox.progress
            submit = Submit(request=request, outbox=outbox, grammar=grammar)
            self._ref.offer(submit)
            while True:
                event = await self._next(submit)
                if event is not None:
                    yield event
                    if is_terminal(event):
                        return
        except Overloaded as error:
            yield refused(error)
        except CoveyError as error:
            yield failed(error)
        finally:
            outbox.is_unwanted = True
            self._ref.signal(Abort(outbox=outbox))
            if self._open.get(request.request_id) is outbox:
                del self._open[request.request_id]

    async def cancel(self, request_id: RequestId) -> None:
        """End a request with `Finished(CANCELLED)`, and its hand-over's leases; unknown ids are no error."""
        if (outbox := self._open.get(request_id)) is not None:
            outbox.is_unwanted = True  # the signal overtakes a submit that still waits
        self._ref.signal(Cancel(request_id=request_id))

    async def retain(self, request: RetainRequest, *, timeout_s: float | None = 5.0) -> RetainReply:
        """Keep a finished request's blocks. Raises LeaseExpired once its grace is over."""
        return await self._ref.ask(Retain(request=request), timeout_s=timeout_s)

    async def export(self, request_id: RequestId, *, timeout_s: float | None = 10.0) -> HandoverTicket:
        """Store the blocks of a running request, which runs on. Raises NotFound, FailedPrecondition and the store's."""
        return await self._ref.ask(Export(request_id=request_id), timeout_s=timeout_s)

    async def adopt(self, request: AdoptRequest, *, timeout_s: float | None = 10.0) -> AdoptReply:
        """Load a ticket's blocks ahead of its request. Raises Overloaded without room."""
        return await self._ref.ask(Adopt(request=request), timeout_s=timeout_s)

    async def keys(self, *, timeout_s: float | None = 5.0) -> tuple[CacheKey, ...]:
        """Every block of the prefix cache, for a snapshot."""
        return await self._ref.ask(ListKeys(), timeout_s=timeout_s)

    async def drain(self, *, timeout_s: float | None = None) -> None:
        """Refuse new requests and wait until none runs. Raises DeadlineExceeded."""
        await self._ref.ask(Drain(), timeout_s=timeout_s)

    async def _next(self, submit: Submit) -> Event | None:
        """The next event, or a sign of life, or None when the engine shows none."""
        outbox = submit.outbox
        with anyio.move_on_after(self._limits.progress_s):
            event = await outbox.get()
            if outbox.is_paused and outbox.is_drained:
                self._ref.signal(Wake())
            return event
        if submit.reply.done:
            try:
                await submit.reply.wait()
            except CoveyError as error:
                return failed(error)
        return None if self.board.is_stalled(self._clock.now(), self._limits.step_stall_s) else outbox.progress


@asynccontextmanager
async def open_engine(
    runner: Runner,
    vocabulary: Vocabulary,
    *,
    role: Role,
    worker: WorkerId,
    clock: Clock,
    limits: EngineLimits | None = None,
    store: BlockStore | None = None,
    on_blocks: OnBlocks | None = None,
    model: str | None = None,
    dialect: str = "",
    neighbours: Neighbours | None = None,
    grace_s: float = 10.0,
) -> AsyncIterator[Engine]:
    """Run an engine for the length of a block; leaving it lets running requests end for at most `grace_s`.

    `model` is what the mesh calls the runner's model, by default the runner's own name for it. Engines of another
    `dialect` share no blocks with this one. `neighbours` are the workers that blocks of long sequences may go to.

    A crash of the engine leaves as an exception: a new process is the cure.
    """
    limits = limits or EngineLimits()
    actor = EngineActor(
        runner=runner,
        vocabulary=vocabulary,
        role=role,
        worker=worker,
        limits=limits,
        clock=clock,
        store=store,
        on_blocks=on_blocks,
        model=model or runner.info.model,
        neighbours=neighbours,
    )
    grammars = Grammars(vocabulary, runner.info, clock)
    async with AsyncExitStack() as stack:
        stack.callback(grammars.close)
        supervisor = await stack.enter_async_context(supervise(grace_s=grace_s))
        capacity = limits.batch.queue_max + limits.batch.max_running
        ref = supervisor.start(lambda: actor, name=f"engine {worker}", capacity=capacity)
        info, creditor = _info(actor, runner, role, worker, dialect), actor.lifecycle.creditor
        yield Engine(ref, actor.board, info, limits, clock, actor.check, grammars, creditor)


def _info(actor: EngineActor, runner: Runner, role: Role, worker: WorkerId, dialect: str) -> EngineInfo:
    info = runner.info
    return EngineInfo(
        worker=worker,
        role=role,
        model=actor.intake.model,
        revision=info.revision,
        tokenizer_hash=info.tokenizer_hash,
        block_size=info.block_size,
        block_bytes=info.block_bytes,
        layers=info.n_layers,
        capacity_blocks=info.n_blocks,
        context_limit=actor.intake.context_limit,
        layout_fingerprint=info.layout_fingerprint + dialect,
        precision=info.precision,
        kv_dtype=info.kv_dtype,
        features=FEATURES[role],
    )
