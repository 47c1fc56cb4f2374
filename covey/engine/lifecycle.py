"""The course of sequences: admitted, loaded, computed step by step, swapped out and back, handed over, ended."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from anyio.from_thread import BlockingPortal

from covey.clock import Clock
from covey.errors import Cancelled, DeadlineExceeded, Internal, NoSpace, Unavailable
from covey.model.plan import Draw, Runner
from covey.policy.batch_policies import make_batcher
from covey.policy.blocks import BlockPool
from covey.policy.chunk import Chunk
from covey.policy.ledger import Demand
from covey.policy.speculation import Candidate, Speculation
from covey.types.generate import Event, Role, Stage, Tokens
from covey.types.ids import WorkerId
from covey.types.store import BlockStore

from .arrivals import Arrivals
from .background import Background
from .board import Board
from .borrowing import Neighbours, make_borrowing
from .creditor import Creditor
from .endings import cancelled, failed, finished
from .holdings import Holdings
from .integrity import Integrity
from .limits import EngineLimits
from .loading import Loader
from .migration import Migration
from .moves import Moves
from .preemption import Preemption
from .promises import make_promises
from .register import Register
from .retention import Retention
from .sequence import Sequence
from .stepping import Done, RunningStep, Stepper
from .text import Vocabulary
from .transfer import Transfers
from .write_ahead import WriteAhead


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
        neighbours: Neighbours | None = None,
    ) -> None:
        info = runner.info
        self._role = role
        self._limits = limits
        self._clock = clock
        self._vocabulary = vocabulary
        self._block_size = info.block_size
        transfers = _transfers(store, runner, clock, limits) if store is not None else None
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
        self.creditor = Creditor(self.pool, runner, limits, clock)
        self.borrowing = make_borrowing(self.pool, runner, limits, clock, neighbours, worker=worker)
        ahead = WriteAhead(self.pool, transfers, limits, self.board, worker=worker, block_bytes=info.block_bytes)
        movers = (self.migration, ahead, self.borrowing)
        self._moves = Moves(*movers, self._holdings, self.board, clock, block_size=info.block_size, end=self._end)
        self._preemption = Preemption(
            self.live, self.batcher, self._holdings, self.retention, self._moves, self._stepper, self.board
        )
        self._arrivals = Arrivals(
            self.batcher,
            self._holdings,
            Loader(transfers, self._holdings, clock, block_size=info.block_size, role=role, worker=worker),
            self._moves,
            self._stepper,
            clock,
            n_layers=info.n_layers,
            by_layer=limits.loading == "layers",
            in_step=self._is_in_step,
        )
        self._leaving: list[Sequence] = []

    def open(self, background: Background, portal: BlockingPortal) -> None:
        """Say where transfers run, and how a step reaches the event loop, before anything else is called."""
        self._moves.background = background
        if self.borrowing is not None:
            self.borrowing.portal = portal

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
        assert all(seq.named <= (seq.computed - seq.base) // self._block_size <= len(seq.blocks) for seq in live)
        if self.is_quiet:
            assert self.pool.held == self.pool.pinned + self.creditor.lent
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
            seq = self.live.running(seq_id)
            seq.admitted_at = seq.admitted_at or now
            self._arrivals.admitted(seq)
        if self.batcher.waiting:
            self._preemption.make_way(now)

    def _find_room(self, seq_id: int) -> bool:
        return self._holdings.find_room(self.live.running(seq_id), self.live.all())

    # -- one step ---------------------------------------------------------------------

    def begin_step(self, now: float, on_end: Callable[[], object]) -> RunningStep | None:
        """Start the next step; None when nothing can run. Call `end_step` or `fail_step` when it has ended."""
        guesses = self._guesses()
        chunks = self.batcher.plan(now, {seq: len(guess) for seq, guess in guesses.items()})
        work = self._preemption.with_blocks(chunks, now)
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
        if all(chunk.count == 1 and chunk.is_drawn and not chunk.first_layer for chunk in step.chunks):
            tried = {c.seq: (c.draft, drawn[c.seq] - 1) for c in step.chunks if c.draft and c.seq in drawn}
            tokens = sum(chunk.tokens for chunk in step.chunks)
            self.speculation.apply(tried, tokens=tokens, elapsed_s=done.elapsed_s)
        self._release_leaving()
        for seq_id, reason in outcome.failed:
            if (seq := self.live.get(seq_id)) is not None:
                error = Unavailable(reason) if seq.elsewhere is not None else Internal(reason)
                self._end(seq, failed(error, retryable=seq.elsewhere is not None))
        for chunk in step.chunks:
            if (seq := self.live.get(chunk.seq)) is not None:
                seq.is_suspended = chunk.seq in suspended or chunk.last_layer is not None
                self._advance(seq, chunk, draws.get(seq.id, ()), now)
        self._arrivals.after_step()

    def fail_step(self, step: RunningStep) -> None:
        """A step found no memory: its requests end, the engine lives on."""
        self.step = None
        self._release_leaving()
        self._arrivals.after_step()
        for seq_id in step.seqs:
            if (seq := self.live.get(seq_id)) is not None:
                seq.is_suspended = True  # perhaps: the runner may have stopped anywhere
                self._end(seq, failed(NoSpace("the worker had no memory left for this step"), retryable=True))

    def _guesses(self) -> dict[int, tuple[int, ...]]:
        """Guesses for a step that only decodes; prompts are worth more than guesses."""
        if self._role is Role.PREFILL or not self._limits.speculation.guess_max:
            return {}
        running = [s for s in self.live.all() if s.is_running and s.paused_at is None and not s.is_loading]
        if any(len(seq.tokens) - seq.computed > 1 for seq in running):
            return {}
        candidates = [Candidate(seq=seq.id, tokens=seq.tokens, room=seq.guess_room) for seq in running]
        return self.speculation.plan(candidates, tokens=len(running), draws=len(running))

    def _advance(self, seq: Sequence, chunk: Chunk, draws: tuple[Draw, ...], now: float) -> None:
        seq.show(Stage.DECODE if seq.first_token_at else Stage.PREFILL)
        if seq.is_suspended:
            if seq.is_loading:
                self._arrivals.stood_still(seq)
            return
        computed = chunk.start + chunk.count + max(0, len(draws) - 1)
        tokens = seq.push(draws, self._vocabulary) if draws else None
        seq.computed = min(computed, len(seq.tokens) - 1) if draws else computed
        self._holdings.book(seq)
        if tokens is not None:
            seq.first_token_at = seq.first_token_at or now
            self.board.generated_tokens += len(tokens.ids)
            self._deliver(seq, tokens)
        elif self._role is Role.PREFILL:
            self._moves.write_ahead(seq)

    def _deliver(self, seq: Sequence, tokens: Tokens) -> None:
        if seq.has_ended:
            seq.outbox.put(tokens)
            self._finish(seq)
        elif self._role is Role.PREFILL:
            self.batcher.remove(seq.id)
            seq.is_running = False
            self._moves.run(seq, partial(self._moves.hand_over, first=tokens), self._arrivals.start)
        else:
            seq.outbox.put(tokens)
            if seq.outbox.is_full:
                seq.paused_at = self._clock.now()
                seq.outbox.is_paused = True
                self.batcher.pause(seq.id, is_paused=True)

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
        if self.step is not None and self._is_in_step(seq):
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
        self._stepper.drop(seq)
        seq.is_running = False
        self._moves.forget_written(seq)
        if seq.transfer is not None:
            seq.transfer.cancel()
            return
        if seq.preemptions:
            self._moves.forget_leases(seq)
        self._holdings.release(seq)

    def sweep(self, now: float) -> None:
        """End what is out of time; take up readers that have caught up; keep loans."""
        self.creditor.sweep(now)
        self._moves.sweep(now, self.live.all())
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

    def _is_in_step(self, seq: Sequence) -> bool:
        return self.step is not None and seq.id in self.step.seqs


def _transfers(store: BlockStore, runner: Runner, clock: Clock, limits: EngineLimits) -> Transfers:
    return Transfers(store, runner, clock, timeout_s=limits.kv_timeout_s, layers_min_bytes=limits.layers_min_bytes)
