"""One step of the runner, in the one thread that may touch it; the event loop may cut it short between two layers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import partial

import anyio
from anyio.lowlevel import checkpoint_if_cancelled

from covey import failpoint
from covey.clock import Clock
from covey.model.plan import Row, Runner, StepOutcome, StepPlan
from covey.policy.chunk import Chunk

from .sequence import Sequence
from .step_thread import StepThread


class StepInterrupt:
    """`plan.Interrupt`: written by the event loop, read by the step's thread; each change is one assignment."""

    def __init__(self) -> None:
        self._cancelled: frozenset[int] = frozenset()
        self._is_preempted = False

    def cancel(self, seq: int) -> None:
        """Nobody wants this row any more."""
        self._cancelled |= {seq}

    def preempt(self) -> None:
        """Let rows of several tokens stop at the next layer."""
        self._is_preempted = True

    def cancelled(self) -> Collection[int]:
        """See `plan.Interrupt.cancelled`."""
        return self._cancelled

    def is_preempted(self) -> bool:
        """See `plan.Interrupt.is_preempted`."""
        return self._is_preempted


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What a step brought, and how long it took in seconds."""

    outcome: StepOutcome
    elapsed_s: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RunningStep:
    """A step under way. Until it has ended, nobody may free or write the blocks of its sequences."""

    chunks: tuple[Chunk, ...]
    seqs: frozenset[int]
    interrupt: StepInterrupt
    future: asyncio.Future[Done]
    ended: anyio.Event

    @property
    def is_done(self) -> bool:
        """Whether `result` returns at once."""
        return self.future.done()

    async def result(self) -> Done:
        """Wait for the end of the step, also when cancelled. Raises what the runner raised."""
        with anyio.CancelScope(shield=True):
            done = await self.future
        await checkpoint_if_cancelled()
        return done


class Stepper:
    """Turns chunks into rows and runs them."""

    def __init__(self, runner: Runner, clock: Clock, *, niceness: int) -> None:
        self._runner = runner
        self._clock = clock
        self._thread = StepThread(niceness)

    def begin(
        self,
        work: Items[tuple[Sequence, Chunk]],
        guesses: Mapping[int, tuple[int, ...]],
        on_end: Callable[[], object],
    ) -> RunningStep:
        """Start computing chunks, whose blocks must be there; `on_end` is called in the event loop."""
        plan = StepPlan(rows=tuple(_row(seq, chunk, guesses.get(seq.id, ())) for seq, chunk in work))
        interrupt = StepInterrupt()
        ended = anyio.Event()
        future = self._thread.start(partial(self._run, plan, interrupt))
        future.add_done_callback(lambda _: ended.set())
        future.add_done_callback(lambda _: on_end())
        return RunningStep(
            chunks=tuple(chunk for _, chunk in work),
            seqs=frozenset(seq.id for seq, _ in work),
            interrupt=interrupt,
            future=future,
            ended=ended,
        )

    def drop(self, seq: Sequence) -> None:
        """Forget what a sequence left between two layers; not while a step runs."""
        if seq.is_suspended:
            seq.is_suspended = False
            self._runner.drop(seq.id)

    def close(self) -> None:
        """No more steps."""
        self._thread.close()

    def _run(self, plan: StepPlan, interrupt: StepInterrupt) -> Done:
        began = self._clock.now()
        failpoint.hit("engine.step")
        outcome = self._runner.step(plan, interrupt)
        return Done(outcome=outcome, elapsed_s=self._clock.now() - began)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a step failed for want of memory; torch says so in a RuntimeError."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "memory" in str(error).lower())


def _row(seq: Sequence, chunk: Chunk, guess: tuple[int, ...]) -> Row:
    known = seq.tokens[chunk.start : chunk.start + chunk.count]
    return Row(
        seq=seq.id,
        tokens=(*known, *guess[: chunk.draft]),
        start=chunk.start,
        blocks=tuple(seq.blocks),
        sample=seq.sample_spec() if chunk.is_drawn else None,
        draft=chunk.draft,
        first_layer=chunk.first_layer,
        last_layer=chunk.last_layer,
        elsewhere=seq.elsewhere,
    )
