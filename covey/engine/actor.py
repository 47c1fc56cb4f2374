"""The actor that owns a runner: takes what its inbox holds, then does one step; during a step it goes on listening."""

from __future__ import annotations

from collections.abc import Callable

import anyio
from anyio.from_thread import BlockingPortal

from covey import failpoint
from covey.actor import Inbox
from covey.clock import Clock
from covey.errors import AlreadyExists, CoveyError, NotFound, Overloaded, Unavailable
from covey.model.plan import Runner
from covey.policy.prefix_cache import BlockChanges
from covey.types.generate import Accepted, Role, Stage
from covey.types.ids import WorkerId
from covey.types.store import BlockStore

from .background import Background
from .borrowing import Neighbours
from .endings import answer_at_once, failed, refused
from .intake import Intake
from .lifecycle import Lifecycle
from .limits import EngineLimits
from .messages import Abort, Adopt, Cancel, Drain, Export, ListKeys, Message, Retain, Submit, Wake
from .stepping import RunningStep, is_out_of_memory
from .text import Vocabulary

OnBlocks = Callable[[BlockChanges], None]
"""Called with what entered and left the prefix cache; must not block."""

LOOK_S = 0.1
"""How often an idle actor looks at a few cached blocks: half a percent of a core."""
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
        neighbours: Neighbours | None = None,
    ) -> None:
        self._worker = worker
        self._clock = clock
        self._on_blocks = on_blocks
        self._block_size = runner.info.block_size
        self.lifecycle = Lifecycle(
            runner=runner,
            vocabulary=vocabulary,
            role=role,
            worker=worker,
            limits=limits,
            clock=clock,
            store=store,
            neighbours=neighbours,
        )
        borrow_blocks = limits.borrow_blocks if self.lifecycle.borrowing is not None else 0
        self.intake = Intake(runner.info, vocabulary, role, model, borrow_blocks=borrow_blocks)
        self.board = self.lifecycle.board
        self.check = self.lifecycle.check
        self._later: list[Message] = []
        self._drains: list[Drain] = []
        self._is_draining = False
        self._is_stopping = False
        self._background: Background

    async def run(self, inbox: Inbox[Message]) -> None:
        """Serve until the inbox is drained and every request has ended."""
        life = self.lifecycle
        try:
            async with BlockingPortal() as portal, anyio.create_task_group() as tasks:
                self._background = Background(tasks, on_end=lambda: inbox.signal(Wake()))
                life.open(self._background, portal)
                while not (self._is_stopping and life.is_quiet):
                    await self._turn(inbox)
                await life.retention.close()
        finally:
            life.close()
            for seq in life.live.all():
                seq.outbox.put(failed(Unavailable("the engine stopped")))

    async def _turn(self, inbox: Inbox[Message]) -> None:
        failpoint.hit("engine.turn")
        self._drain_inbox(inbox)
        now = self.board.busy_since = self.board.seen_at = self._clock.now()
        self._sweep(now)
        self.lifecycle.admit(now)
        step = self.lifecycle.begin_step(now, on_end=lambda: inbox.signal(Wake()))
        self._publish()
        if step is not None:
            await self._finish_step(step, inbox)
        else:
            await self._idle(inbox, now)

    def _drain_inbox(self, inbox: Inbox[Message]) -> None:
        later, self._later = self._later, []
        for put_off in later:
            self._handle(put_off)
        while (message := inbox.next()) is not None:
            self._handle(message)

    async def _idle(self, inbox: Inbox[Message], now: float) -> None:
        self.board.busy_since = None
        if self._is_stopping:
            await anyio.sleep(NAP_S)
            return
        life = self.lifecycle
        due = [life.pool.next_pin_expiry(), life.batcher.wakes_at()]
        if life.is_quiet and life.pool.cached:
            life.integrity.look()
            due.append(now + LOOK_S)
        await self._listen(inbox, now, [at for at in due if at is not None])

    async def _finish_step(self, step: RunningStep, inbox: Inbox[Message]) -> None:
        """Listen until the step has ended: a cancelled row or a more urgent request stops it at the next layer."""
        batcher = self.lifecycle.batcher
        interrupts_at = batcher.interrupts_at()
        while not step.is_done:
            now = self.board.seen_at = self._clock.now()
            self.lifecycle.sweep(now)
            if (interrupts_at is not None and now >= interrupts_at) or batcher.should_interrupt(now):
                step.interrupt.preempt()
                interrupts_at = None
            if self._is_stopping:
                with anyio.move_on_after(NAP_S):
                    await step.ended.wait()
                self._drain_inbox(inbox)
            else:
                await self._listen(inbox, now, [] if interrupts_at is None else [interrupts_at])
        try:
            done = await step.result()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            self.lifecycle.fail_step(step)
        else:
            self.lifecycle.end_step(step, done)
        await failpoint.hit_async("engine.after_step")

    async def _listen(self, inbox: Inbox[Message], now: float, due: list[float]) -> None:
        """Handle the next message, or return when a deadline, or one of `due`, has passed."""
        due += [seq.deadline for seq in self.lifecycle.live.all()]
        wait_s = min(1.0, max(0.0, min(due, default=now + 1.0) - now)) + 0.001  # past the moment, not just before it
        with anyio.move_on_after(wait_s):
            try:
                self._handle(await inbox.get())
            except anyio.EndOfStream:
                self._is_draining = self._is_stopping = True

    # -- messages ----------------------------------------------------------------

    def _handle(self, message: Message) -> None:
        live = self.lifecycle.live
        match message:
            case Submit():
                self._submit(message)
                message.reply.set(None)
            case Abort(outbox=outbox):
                self.lifecycle.cancel(live.of_outbox(outbox))
            case Cancel(request_id=request_id):
                self.lifecycle.migration.forget(request_id, self._background.spawn)
                self.lifecycle.cancel(live.of_request(request_id))
            case Drain():
                self._is_draining = True
                self._drains.append(message)
            case Wake():
                pass
            case _:
                self._handle_blocks(message)

    def _handle_blocks(self, message: Retain | Export | Adopt | ListKeys) -> None:
        life = self.lifecycle
        match message:
            case Retain():
                try:
                    message.reply.set(life.retention.retain(message.request, now=self._clock.now()))
                except CoveyError as error:
                    message.reply.fail(error)
            case Export():
                self._export(message)
            case Adopt():
                self._background.spawn(life.migration.adopt, message)
            case ListKeys():
                message.reply.set(life.pool.keys())

    def _export(self, message: Export) -> None:
        life = self.lifecycle
        seq = life.live.of_request(message.request_id)
        if seq is not None and life.step is not None and seq.id in life.step.seqs:
            self._later.append(message)  # its last block is being written
        elif seq is None or not seq.computed or seq.transfer is not None or seq.is_long:
            message.reply.fail(NotFound("no such request is running here", field="request_id"))
        else:
            life.migration.export(message, seq, self._block_size, self._background.spawn)

    def _submit(self, message: Submit) -> None:
        life, request, outbox = self.lifecycle, message.request, message.outbox
        former = life.live.of_request(request.request_id)
        try:
            if self._is_draining:
                outbox.put(refused(Unavailable("this worker is draining")))
                return
            if former is not None and former.request.attempt >= request.attempt:
                raise AlreadyExists("this request is running already", field="request_id")
            seq = self.intake.accept(request, outbox, self._clock.now(), message.grammar)
            if outbox.is_unwanted or seq.has_ended:
                answer_at_once(seq, self._worker, self._clock.now())
                return
            life.enter(seq)
        except Overloaded as error:
            outbox.put(refused(error))
            return
        except CoveyError as error:
            outbox.put(failed(error))
            return
        life.cancel(former)
        life.live.add(seq)
        outbox.put(Accepted(worker=self._worker))
        seq.show(Stage.QUEUE)

    def _sweep(self, now: float) -> None:
        life = self.lifecycle
        life.sweep(now)
        life.retention.sweep(now, self._background.spawn)
        life.migration.sweep(now, self._background.spawn)
        if life.is_quiet:
            for drain in self._drains:
                drain.reply.set(None)
            self._drains.clear()

    def _publish(self) -> None:
        life = self.lifecycle
        changes = life.pool.take_changes()
        if self._on_blocks is not None and (changes.stored or changes.evicted):
            self._on_blocks(changes)
        self.board.demoted_blocks, self.board.lost_demotions = life.retention.demoted, life.retention.lost
        self.board.drafted_tokens, self.board.accepted_tokens = life.speculation.drafted, life.speculation.accepted
        self.board.lent_blocks, self.board.attended_rows = life.creditor.lent, life.creditor.attended
        self.board.loans = life.borrowing.borrowed if life.borrowing is not None else 0
        self.board.verified_blocks, self.board.corrupt_blocks = life.integrity.verified, life.integrity.corrupt
        self.board.show_load(life.batcher, life.pool, lendable=life.creditor.lendable, is_draining=self._is_draining)
