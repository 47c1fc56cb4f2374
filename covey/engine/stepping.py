"""One step of the runner, in the one thread that may touch it."""

from __future__ import annotations

from collections.abc import Sequence as Items
from functools import partial

from covey import failpoint
from covey.clock import Clock
from covey.model.plan import Row, Runner, StepOutcome, StepPlan
from covey.policy.batching import Chunk

from .board import Board
from .holdings import Holdings
from .sequence import Sequence
from .step_thread import StepThread


class Stepper:
    """Turns chunks into rows and runs them. A cancelled caller waits for the step: nobody may free blocks under it."""

    def __init__(self, runner: Runner, holdings: Holdings, board: Board, clock: Clock, *, niceness: int) -> None:
        self._runner = runner
        self._holdings = holdings
        self._board = board
        self._clock = clock
        self._thread = StepThread(niceness)

    async def step(self, work: Items[tuple[Sequence, Chunk]]) -> tuple[StepOutcome, float]:
        """Compute the chunks; returns the outcome and how long it took, in seconds."""
        plan = StepPlan(rows=tuple(self._row(seq, chunk) for seq, chunk in work))
        began = self._clock.now()
        outcome = await self._thread.run(partial(self._run, plan))
        self._board.steps += 1
        self._board.computed_tokens += sum(len(row.tokens) for row in plan.rows)
        self._board.generated_tokens += len(outcome.sampled)
        return outcome, self._clock.now() - began

    def close(self) -> None:
        """No more steps."""
        self._thread.close()

    def _run(self, plan: StepPlan) -> StepOutcome:
        failpoint.hit("engine.step")
        return self._runner.step(plan)

    def _row(self, seq: Sequence, chunk: Chunk) -> Row:
        end = chunk.start + chunk.count
        self._holdings.cover(seq, end)
        return Row(
            seq=seq.id,
            tokens=tuple(seq.tokens[chunk.start : end]),
            start=chunk.start,
            blocks=tuple(seq.blocks),
            sample=seq.sample_spec() if chunk.is_last else None,
        )
