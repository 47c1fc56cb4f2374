"""The actor that owns a runner: takes what its inbox holds, then does one step (style: drain, then step)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

import anyio

from covey import failpoint
from covey.actor import Inbox
from covey.clock import Clock
from covey.errors import (
    AlreadyExists,
    Cancelled,
    CoveyError,
    DeadlineExceeded,
    Internal,
    NotFound,
    Overloaded,
    Unavailable,
)
from covey.model.plan import Runner, StepOutcome
from covey.policy.batch_policies import make_batcher
from covey.policy.blocks import BlockChanges, BlockPool
from covey.policy.chunk import Chunk
from covey.policy.ledger import Demand
from covey.types.generate import Accepted, Event, GenerateRequest, Handover, Role, Stage, Tokens
from covey.types.ids import WorkerId
from covey.types.store import BlockStore

from .background import Background
from .board import Board
from .endings import answer_at_once, cancelled, failed, finished, refused
from .holdings import Holdings
from .intake import Intake
from .limits import EngineLimits
from .loading import Loader
from .messages import Abort, Adopt, Cancel, Drain, Export, ListKeys, Message, Retain, Submit, Wake
from .migration import Migration
from .outbox import Outbox
from .register import Register
from .retention import Retention
from .sequence import Sequence
from .stepping import Stepper
from .text import Vocabulary
from .transfer import Transfers

OnBlocks = Callable[[BlockChanges], None]
"""Called with what entered and left the prefix cache; must not block."""

NAP_S = 0.02
"""How often a stopping actor looks whether its transfers are through."""


class EngineActor:
    """Runs requests to their one terminal event. `Engine` is how others speak to it."""

    def __init__(
        self,
        *,
        runner: Runner,
        vocabulary: Vocabulary,
        role: Role,
        worker: WorkerId,
        limits: EngineLimits,
        clock: Clock,
        store: BlockStore | None,
        model: str,
        on_blocks: OnBlocks | None = None,
    ) -> None:
        info = runner.info
        self._role = role
        self._worker = worker
        self._limits = limits
        self._clock = clock
        self._on_blocks = on_blocks
        self._vocabulary = vocabulary
        self._block_size = info.block_size
        transfers = Transfers(store, runner, clock, timeout_s=limits.kv_timeout_s) if store is not None else None
        self.intake = Intake(info, vocabulary, role, model)
        self.pool = BlockPool(n_blocks=info.n_blocks, name=str(worker))
        self.batcher = make_batcher(limits.batch, n_layers=info.n_layers)
        self.board = Board()
        self._holdings = Holdings(self.pool, info.block_size)
        self._stepper = Stepper(runner, self._holdings, self.board, clock, niceness=limits.niceness)
        self._retention = Retention(
            self.pool, transfers, limits, owner=f"{worker}/retention", block_bytes=info.block_bytes
        )
        self._loader = Loader(transfers, self._holdings, block_size=info.block_size, role=role, worker=worker)
        self._migration = Migration(self.pool, transfers, limits, worker=worker, clock=clock)
        self._live = Register()
        self._drains: list[Drain] = []
        self._is_draining = False
        self._is_stopping = False
        self._background: Background

    async def run(self, inbox: Inbox[Message]) -> None:
        """Serve until the inbox is drained and every request has ended."""
        try:
            async with anyio.create_task_group() as tasks:
                self._background = Background(tasks, on_end=lambda: inbox.signal(Wake()))
                while not (self._is_stopping and self._is_quiet):
                    await self._turn(inbox)
                await self._retention.close()
        finally:
            self._stepper.close()
            for seq in self._live.all():
                seq.outbox.put(failed(Unavailable("the engine stopped")))

    def check(self) -> None:
        """Assert the invariants of blocks and batch; when nothing runs, nothing is held or promised."""
        self.pool.check()
        self.batcher.check()
        live = self._live.all()
        assert self.pool.reserved >= sum(seq.promised for seq in live)
        assert all(seq.named <= seq.computed // self._block_size <= len(seq.blocks) for seq in live)
        if self._is_quiet:
            assert self.pool.held == self.pool.pinned
            assert self.pool.reserved == 0
            assert self.batcher.running == self.batcher.waiting == 0

    @property
    def _is_quiet(self) -> bool:
        return not len(self._live) and not self._background.running

    async def _turn(self, inbox: Inbox[Message]) -> None:
        while (message := inbox.next()) is not None:
            self._handle(message)
        now = self.board.busy_since = self._clock.now()
        self._sweep(now)
        self._admit(now)
        chunks = self.batcher.plan(now)
        self._publish()
        if chunks:
            await self._step(chunks)
        else:
            await self._idle(inbox, now)

    async def _idle(self, inbox: Inbox[Message], now: float) -> None:
        self.board.busy_since = None
        if self._is_stopping:
            await anyio.sleep(NAP_S)
            return
        due = [seq.deadline for seq in self._live.all()]
        if (pin_at := self.pool.next_pin_expiry()) is not None:
            due.append(pin_at)
        wait_s = min(1.0, max(0.0, min(due, default=now + 1.0) - now)) + 0.001  # past the moment, not just before it
        with anyio.move_on_after(wait_s):
            try:
                self._handle(await inbox.get())
            except anyio.EndOfStream:
                self._is_draining = self._is_stopping = True

    # -- messages ----------------------------------------------------------------

    def _handle(self, message: Message) -> None:
        match message:
            case Submit():
                self._submit(message.request, message.outbox)
                message.reply.set(None)
            case Abort(outbox=outbox):
                self._cancel(self._live.of_outbox(outbox))
            case Cancel(request_id=request_id):
                self._migration.forget(request_id, self._background.spawn)
                self._cancel(self._live.of_request(request_id))
            case Drain():
                self._is_draining = True
                self._drains.append(message)
            case Wake():
                pass
            case _:
                self._handle_blocks(message)

    def _handle_blocks(self, message: Retain | Export | Adopt | ListKeys) -> None:
        match message:
            case Retain():
                try:
                    message.reply.set(self._retention.retain(message.request, now=self._clock.now()))
                except CoveyError as error:
                    message.reply.fail(error)
            case Export(request_id=request_id):
                seq = self._live.of_request(request_id)
                if seq is None or not seq.computed or seq.transfer is not None:
                    message.reply.fail(NotFound("no such request is running here", field="request_id"))
                else:
                    self._background.spawn(self._migration.export, message, seq, self._block_size)
            case Adopt():
                self._background.spawn(self._migration.adopt, message)
            case ListKeys():
                message.reply.set(self.pool.keys())

    def _submit(self, request: GenerateRequest, outbox: Outbox) -> None:
        former = self._live.of_request(request.request_id)
        try:
            if self._is_draining:
                outbox.put(refused(Unavailable("this worker is draining")))
                return
            if former is not None and former.request.attempt >= request.attempt:
                raise AlreadyExists("this request is running already", field="request_id")
            seq = self.intake.accept(request, outbox, self._clock.now())
            if outbox.is_unwanted or seq.has_ended:
                answer_at_once(seq, self._worker, self._clock.now())
                return
            demand = Demand(tokens=len(seq.tokens), arrived_at=seq.submitted_at, priority=request.priority)
            self.batcher.submit(seq.id, demand)
        except Overloaded as error:
            outbox.put(refused(error))
            return
        except CoveyError as error:
            outbox.put(failed(error))
            return
        self._cancel(former)
        self._live.add(seq)
        outbox.put(Accepted(worker=self._worker))
        seq.show(Stage.QUEUE)

    # -- from the queue to the batch ------------------------------------------------

    def _admit(self, now: float) -> None:
        for seq_id in self.batcher.admit(lambda seq_id: self._holdings.find_room(self._seq(seq_id)), now):
            seq = self._seq(seq_id)
            seq.admitted_at = now
            if self._loader.can_load(seq):
                self._move(seq, self._loader.load)
            else:
                self._start(seq)
        if self.batcher.waiting and not self.batcher.running:
            self._retention.give_way(now)

    def _start(self, seq: Sequence) -> None:
        seq.started_at = self._clock.now()
        self._holdings.book(seq)
        self.batcher.start(seq.id, computed=seq.computed, known=len(seq.tokens))
        seq.show(Stage.PREFILL)

    # -- one step ---------------------------------------------------------------------

    async def _step(self, chunks: tuple[Chunk, ...]) -> None:
        outcome, elapsed_s = await self._stepper.step([(self._seq(chunk.seq), chunk) for chunk in chunks])
        self._apply(chunks, outcome, elapsed_s)
        await failpoint.hit_async("engine.after_step")

    def _apply(self, chunks: tuple[Chunk, ...], outcome: StepOutcome, elapsed_s: float) -> None:
        now = self._clock.now()
        self.batcher.apply(
            chunks,
            {drawn.seq: len(drawn.draws) for drawn in outcome.sampled},
            elapsed_s,
            suspended=dict(outcome.suspended),
        )
        for seq_id, reason in outcome.failed:
            self._end(self._seq(seq_id), failed(Internal(reason)))
        for chunk in chunks:
            if (seq := self._live.get(chunk.seq)) is not None:
                seq.computed = chunk.start + chunk.count
                self._holdings.book(seq)
                seq.show(Stage.DECODE if seq.first_token_at else Stage.PREFILL)
        for drawn in outcome.sampled:
            seq = self._seq(drawn.seq)
            seq.first_token_at = seq.first_token_at or now
            self._deliver(seq, seq.push(drawn.draws[0], self._vocabulary))

    def _deliver(self, seq: Sequence, tokens: Tokens) -> None:
        if seq.has_ended:
            seq.outbox.put(tokens)
            self._finish(seq)
        elif self._role is Role.PREFILL:
            self.batcher.remove(seq.id)
            self._move(seq, partial(self._hand_over, first=tokens))
        else:
            seq.outbox.put(tokens)
            if seq.outbox.is_full:
                seq.paused_at = self._clock.now()
                seq.outbox.is_paused = True
                self.batcher.pause(seq.id, is_paused=True)

    async def _hand_over(self, seq: Sequence, *, first: Tokens) -> Handover:
        seq.show(Stage.TRANSFER)
        began = self._clock.now()
        try:
            ticket = await self._migration.stash(seq, self._block_size)
        except CoveyError:  # a store that is full or gone costs a second prefill, not the request
            ticket = self._migration.bare_ticket(seq)
            self.board.bare_handovers += 1
        seq.transfer_s += self._clock.now() - began
        await failpoint.hit_async("prefill.before_handover")
        return Handover(ticket=ticket, first=first, usage=seq.usage(), timings=seq.timings(self._clock.now()))

    # -- endings ------------------------------------------------------------------------

    def _finish(self, seq: Sequence) -> None:
        now = self._clock.now()
        grace_s = self._limits.grace_s if self._role is Role.DECODE else 0.0
        lease = self._retention.keep(seq, now=now, grace_s=grace_s)
        self._end(seq, finished(seq, now, lease))

    def _cancel(self, seq: Sequence | None) -> None:
        if seq is not None:
            self._end(seq, cancelled(seq, self._clock.now()))

    def _end(self, seq: Sequence, event: Event) -> None:
        """Send the terminal event and let go of the blocks; those in transfer go when the transfer has ended."""
        seq.is_over = True
        seq.outbox.put(event)
        self.batcher.remove(seq.id)
        self._live.remove(seq)
        if seq.transfer is None:
            self._holdings.release(seq)
        else:
            seq.transfer.cancel()

    def _sweep(self, now: float) -> None:
        for seq in self._live.all():
            if now >= seq.deadline:
                self._end(seq, failed(DeadlineExceeded("the request's time ran out")))
            elif seq.paused_at is not None:
                self._sweep_paused(seq, seq.paused_at, now)
        self._retention.sweep(now, self._background.spawn)
        self._migration.sweep(now, self._background.spawn)
        if self._is_quiet:
            for drain in self._drains:
                drain.reply.set(None)
            self._drains.clear()

    def _sweep_paused(self, seq: Sequence, paused_at: float, now: float) -> None:
        if seq.outbox.is_drained:
            seq.paused_at, seq.outbox.is_paused = None, False
            self.batcher.pause(seq.id, is_paused=False)
        elif now - paused_at > self._limits.reader_stall_s:
            self._end(seq, failed(Cancelled("the reader fell too far behind")))

    # -- background -----------------------------------------------------------------------

    def _move(self, seq: Sequence, work: Callable[[Sequence], Awaitable[Handover | None]]) -> None:
        """Run `work`, which copies the sequence's blocks; until it has ended they stay held, whatever happens."""
        seq.transfer = anyio.CancelScope()
        self._background.spawn(self._transfer, seq, seq.transfer, work)

    async def _transfer(
        self, seq: Sequence, scope: anyio.CancelScope, work: Callable[[Sequence], Awaitable[Handover | None]]
    ) -> None:
        event: Event | None = None
        with scope:
            try:
                event = await work(seq)
            except CoveyError as error:
                event = failed(error, retryable=True)
        seq.transfer = None
        if seq.is_over:
            self._migration.forget(seq.request.request_id, self._background.spawn)
            self._holdings.release(seq)
        elif event is not None:
            self._end(seq, event)
        else:
            self._start(seq)

    def _seq(self, seq_id: int) -> Sequence:
        seq = self._live.get(seq_id)
        assert seq is not None, "the batcher plans live sequences only"
        return seq

    def _publish(self) -> None:
        changes = self.pool.take_changes()
        if self._on_blocks is not None and (changes.stored or changes.evicted):
            self._on_blocks(changes)
        self.board.demoted_blocks, self.board.lost_demotions = self._retention.demoted, self._retention.lost
        self.board.show_load(self.batcher, self.pool, is_draining=self._is_draining)
