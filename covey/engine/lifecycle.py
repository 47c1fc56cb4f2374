"""The course of sequences: admitted, loaded, computed step by step, swapped out and back, handed over, ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from covey.clock import Clock
from covey.errors import Cancelled, DeadlineExceeded, Internal, NoSpace
from covey.model.plan import Draw, Runner
from covey.policy.batch_policies import make_batcher
from covey.policy.blocks import BlockPool
from covey.policy.chunk import Chunk
from covey.policy.ledger import Demand
from covey.policy.speculation import Candidate, Speculation
from covey.types.generate import Event, Role, Stage, Tokens
from covey.types.ids import WorkerId
from covey.types.store import BlockStore

from .background import Background
from .board import Board
from .endings import cancelled, failed, finished
from .holdings import Holdings
from .integrity import Integrity
from .limits import EngineLimits
from .loading import Loader
from .migration import Migration
from .moves import Moves
from .promises import make_promises
from .register import Register
from .retention import Retention
from .sequence import Sequence
from .stepping import Done, RunningStep, Stepper
from .text import Vocabulary
from .transfer import Transfers


class Lifecycle:
    """Everything that happens to live sequences, called by the one actor that owns it.

    While a step runs, what is to be freed of its sequences waits for its end; all else may go on.
    """

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
    ) -> None:
        info = runner.info
        self._role = role
        self._limits = limits
        self._clock = clock
        self._vocabulary = vocabulary
        self._block_size = info.block_size
        transfers = Transfers(store, runner, clock, timeout_s=limits.kv_timeout_s) if store is not None else None
        self.pool = BlockPool(n_blocks=info.n_blocks, name=str(worker))
        self.batcher = make_batcher(limits.batch, n_layers=info.n_layers)
        self.speculation = Speculation(limits.speculation)
        self.board = Board()
        self.live = Register()
        self.retention = Retention(
            self.pool, transfers, limits, owner=f"{worker}/retention", block_bytes=info.block_bytes
        )
        self.migration = Migration(self.pool, transfers, limits, worker=worker, clock=clock)
        self.integrity = Integrity(self.pool, runner)
        self.step: RunningStep | None = None
        """The step under way."""
        self._promises = make_promises(limits.admission, self.pool, info.block_size)
        self._holdings = Holdings(self.pool, self._promises, info.block_size)
        self._stepper = Stepper(runner, clock, niceness=limits.niceness)
        self._loader = Loader(transfers, self._holdings, block_size=info.block_size, role=role, worker=worker)
        self._moves = Moves(
            self.migration, self._holdings, self.board, clock, block_size=info.block_size, end=self._end
        )
        self._leaving: list[Sequence] = []

    def open(self, background: Background) -> None:
        """Say where transfers run, before anything else is called."""
        self._moves.background = background

    @property
    def is_quiet(self) -> bool:
        """Whether nothing lives and nothing moves."""
        return not len(self.live) and self.step is None and not self._moves.are_running

    def check(self) -> None:
        """Assert the invariants of blocks and batch; when nothing runs, nothing is held or promised."""
        self.pool.check()
        self.batcher.check()
        self.speculation.check()
        live = self.live.all()
        assert self.pool.reserved >= sum(seq.promised for seq in live)
        assert all(seq.named <= seq.computed // self._block_size <= len(seq.blocks) for seq in live)
        if self.is_quiet:
            assert self.pool.held == self.pool.pinned
            assert self.pool.reserved == 0
            assert self.batcher.running == self.batcher.waiting == 0

    def close(self) -> None:
        """No more steps."""
        self._stepper.close()

    # -- from the queue to the batch ------------------------------------------------

    def enter(self, seq: Sequence) -> None:
        """Put a new sequence in the line. Raises Overloaded when the line is full."""
        request, now = seq.request, seq.submitted_at
        due = now + self._limits.first_token_s if not seq.generated else None
        demand = Demand(tokens=len(seq.tokens), arrived_at=now, first_token_by=due, priority=request.priority)
        self.batcher.submit(seq.id, demand)

    def admit(self, now: float) -> None:
        """Give waiting sequences their blocks, for as long as there are some."""
        for seq_id in self.batcher.admit(self._find_room, now):
            seq = self._seq(seq_id)
            seq.admitted_at = seq.admitted_at or now
            if self._loader.can_load(seq):
                self._moves.run(seq, self._loader.load, self._start)
            else:
                self._start(seq)
        if not self.batcher.waiting:
            return
        if not self.batcher.running:
            self.retention.give_way(now)
        elif not self._moves.swapping:
            for seq_id in self.batcher.preempt(now):
                self._preempt(self._seq(seq_id))

    def _find_room(self, seq_id: int) -> bool:
        return self._holdings.find_room(self._seq(seq_id), self.live.all())

    def _start(self, seq: Sequence) -> None:
        seq.started_at = seq.started_at or self._clock.now()
        seq.is_running = True
        if seq.preemptions:
            self._moves.forget_leases(seq)
        self._holdings.book(seq)
        self.batcher.start(seq.id, computed=seq.computed, known=len(seq.tokens))
        if seq.paused_at is not None:
            self.batcher.pause(seq.id, is_paused=True)
        seq.show(Stage.PREFILL)

    # -- one step ---------------------------------------------------------------------

    def begin_step(self, now: float, on_end: Callable[[], object]) -> RunningStep | None:
        """Start the next step; None when nothing can run. Call `end_step` or `fail_step` when it has ended."""
        guesses = self._guesses()
        chunks = self.batcher.plan(now, {seq: len(guess) for seq, guess in guesses.items()})
        work = self._with_blocks(chunks, now)
        if work:
            self.step = self._stepper.begin(work, guesses, on_end)
        return self.step

    def end_step(self, step: RunningStep, done: Done) -> None:
        """Book what a step brought, and say it to the readers."""
        self.step = None
        outcome, now = done.outcome, self._clock.now()
        draws = {sampled.seq: sampled.draws for sampled in outcome.sampled}
        suspended = dict(outcome.suspended)
        drawn = {seq: len(found) for seq, found in draws.items()}
        self.board.count(step.chunks, suspended)
        self.batcher.apply(step.chunks, drawn, done.elapsed_s, suspended=suspended)
        if all(chunk.count == 1 for chunk in step.chunks):
            tried = {c.seq: (c.draft, drawn[c.seq] - 1) for c in step.chunks if c.draft and c.seq in drawn}
            tokens = sum(chunk.tokens for chunk in step.chunks)
            self.speculation.apply(tried, tokens=tokens, elapsed_s=done.elapsed_s)
        self._release_leaving()
        for seq_id, reason in outcome.failed:
            if (seq := self.live.get(seq_id)) is not None:
                self._end(seq, failed(Internal(reason)))
        for chunk in step.chunks:
            if (seq := self.live.get(chunk.seq)) is not None:
                seq.is_suspended = chunk.seq in suspended or chunk.last_layer is not None
                self._advance(seq, chunk, draws.get(seq.id, ()), now)

    def fail_step(self, step: RunningStep) -> None:
        """A step found no memory: its requests end, the engine lives on."""
        self.step = None
        self._release_leaving()
        for seq_id in step.seqs:
            if (seq := self.live.get(seq_id)) is not None:
                seq.is_suspended = True  # perhaps: the runner may have stopped anywhere
                self._end(seq, failed(NoSpace("the worker had no memory left for this step"), retryable=True))

    def _guesses(self) -> dict[int, tuple[int, ...]]:
        """Guesses for a step that only decodes; prompts are worth more than guesses."""
        if self._role is Role.PREFILL or not self._limits.speculation.guess_max:
            return {}
        running = [seq for seq in self.live.all() if seq.is_running and seq.paused_at is None]
        if any(len(seq.tokens) - seq.computed > 1 for seq in running):
            return {}
        candidates = [Candidate(seq=seq.id, tokens=seq.tokens, room=seq.guess_room) for seq in running]
        return self.speculation.plan(candidates, tokens=len(running), draws=len(running))

    def _with_blocks(self, chunks: tuple[Chunk, ...], now: float) -> list[tuple[Sequence, Chunk]]:
        """The chunks that can run now; when blocks run out, somebody is swapped out for those that go first."""
        work = []
        for chunk in chunks:
            seq = self._seq(chunk.seq)
            if not seq.is_running:
                continue  # swapped out for an earlier one
            if self._holdings.cover(seq, chunk.start + chunk.tokens):
                work.append((seq, chunk))
            elif self._holdings.cover(seq, chunk.start + chunk.count) or self._make_room(seq, chunk, now):
                work.append((seq, replace(chunk, draft=0)))
        return [(seq, chunk) for seq, chunk in work if seq.is_running]

    def _make_room(self, seq: Sequence, chunk: Chunk, now: float) -> bool:
        """Swap out others, or this one, until the chunk has its blocks; False when it must wait."""
        while not self._moves.swapping:
            victim = self.batcher.victim()
            if victim is None or (victim == seq.id and self._running == 1):
                self.retention.give_way(now)
                return False
            self._preempt(self._seq(victim))
            if victim == seq.id:
                return False
            if self._holdings.cover(seq, chunk.start + chunk.count):
                return True
        return False

    def _advance(self, seq: Sequence, chunk: Chunk, draws: tuple[Draw, ...], now: float) -> None:
        seq.show(Stage.DECODE if seq.first_token_at else Stage.PREFILL)
        if seq.is_suspended:
            return
        computed = chunk.start + chunk.count + max(0, len(draws) - 1)
        tokens = seq.push(draws, self._vocabulary) if draws else None
        seq.computed = min(computed, len(seq.tokens) - 1) if draws else computed
        self._holdings.book(seq)
        if tokens is not None:
            seq.first_token_at = seq.first_token_at or now
            self.board.generated_tokens += len(tokens.ids)
            self._deliver(seq, tokens)

    def _deliver(self, seq: Sequence, tokens: Tokens) -> None:
        if seq.has_ended:
            seq.outbox.put(tokens)
            self._finish(seq)
        elif self._role is Role.PREFILL:
            self.batcher.remove(seq.id)
            seq.is_running = False
            self._moves.run(seq, partial(self._moves.hand_over, first=tokens), self._start)
        else:
            seq.outbox.put(tokens)
            if seq.outbox.is_full:
                seq.paused_at = self._clock.now()
                seq.outbox.is_paused = True
                self.batcher.pause(seq.id, is_paused=True)

    # -- leaving the pool for a while, or for good ---------------------------------------

    def _preempt(self, seq: Sequence) -> None:
        """Take a running sequence's blocks; it waits for room and goes on where it was."""
        self.batcher.requeue(seq.id)
        self._drop_layers(seq)
        seq.is_running = False
        seq.preemptions += 1
        self.board.preemptions += 1
        self._moves.swap_out(seq)

    # -- endings ------------------------------------------------------------------------

    def _finish(self, seq: Sequence) -> None:
        now = self._clock.now()
        grace_s = self._limits.grace_s if self._role is Role.DECODE else 0.0
        lease = self.retention.keep(seq, now=now, grace_s=grace_s)
        self._promises.ended(seq)
        self._end(seq, finished(seq, now, lease))

    def cancel(self, seq: Sequence | None) -> None:
        """End a sequence as its caller asked; without effect on None."""
        if seq is not None:
            self._end(seq, cancelled(seq, self._clock.now()))

    def _end(self, seq: Sequence, event: Event) -> None:
        """Send the terminal event and let go of the blocks; those in a step or a transfer go when that has ended."""
        seq.is_over = True
        seq.outbox.put(event)
        self.live.remove(seq)
        if self.step is not None and seq.id in self.step.seqs:
            self.step.interrupt.cancel(seq.id)
            self._leaving.append(seq)
        else:
            self._let_go(seq)

    def _release_leaving(self) -> None:
        for seq in self._leaving:
            seq.is_suspended = True  # perhaps: it was cancelled somewhere in the step
            self._let_go(seq)
        self._leaving.clear()

    def _let_go(self, seq: Sequence) -> None:
        self.batcher.remove(seq.id)
        self.speculation.forget(seq.id)
        self._drop_layers(seq)
        seq.is_running = False
        if seq.transfer is not None:
            seq.transfer.cancel()
            return
        if seq.preemptions:
            self._moves.forget_leases(seq)
        self._holdings.release(seq)

    def sweep(self, now: float) -> None:
        """End what is out of time; take up readers that have caught up."""
        for seq in self.live.all():
            if now >= seq.deadline:
                self._end(seq, failed(DeadlineExceeded("the request's time ran out")))
            elif seq.paused_at is not None:
                self._sweep_paused(seq, seq.paused_at, now)

    def _sweep_paused(self, seq: Sequence, paused_at: float, now: float) -> None:
        if seq.outbox.is_drained:
            seq.paused_at, seq.outbox.is_paused = None, False
            if seq.is_running:
                self.batcher.pause(seq.id, is_paused=False)
        elif now - paused_at > self._limits.reader_stall_s:
            self._end(seq, failed(Cancelled("the reader fell too far behind")))

    @property
    def _running(self) -> int:
        return sum(seq.is_running for seq in self.live.all())

    def _drop_layers(self, seq: Sequence) -> None:
        if seq.is_suspended:
            seq.is_suspended = False
            self._stepper.drop(seq.id)

    def _seq(self, seq_id: int) -> Sequence:
        seq = self.live.get(seq_id)
        assert seq is not None, "the batcher plans live sequences only"
        return seq
