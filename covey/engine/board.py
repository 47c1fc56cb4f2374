"""What the engine's actor lets everybody see."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, field

from covey.policy.batching import Batcher
from covey.policy.blocks import BlockPool
from covey.policy.chunk import Chunk
from covey.types.generate import EngineLoad


@dataclass(slots=True)
class Board:
    """Written by the actor alone, read by all: as fresh as its last turn."""

    load: EngineLoad = field(default_factory=EngineLoad)
    busy_since: float | None = None
    """When the actor's running turn began; None while it waits for something to do."""
    seen_at: float | None = None
    """When the actor last ran; None before it did. It does every second, also while a step runs."""
    steps: int = 0
    computed_tokens: int = 0
    generated_tokens: int = 0
    bare_handovers: int = 0
    """Hand-overs whose blocks the store did not take."""
    written_ahead: int = 0
    """Blocks that were stored while their prompt was still being computed."""
    lent_blocks: int = 0
    """Blocks here that belong to other workers' sequences."""
    attended_rows: int = 0
    """Rows of others that attention over them was computed for."""
    loans: int = 0
    """Loans that sequences here have with other workers."""
    demoted_blocks: int = 0
    lost_demotions: int = 0
    verified_blocks: int = 0
    """Idle looks at cached blocks that found them as they were."""
    corrupt_blocks: int = 0
    """Cached blocks that had changed; they were dropped."""
    drafted_tokens: int = 0
    """Guesses of speculative decoding."""
    accepted_tokens: int = 0
    """Guesses that held."""
    preemptions: int = 0
    """Sequences whose blocks were taken for others."""
    swapped_out: int = 0
    """Of those, the ones whose blocks the store took."""

    def is_stalled(self, now: float, stall_s: float) -> bool:
        """Whether a turn, and the step in it, takes so long that it must be stuck."""
        return self.busy_since is not None and now - self.busy_since > stall_s

    def is_stuck(self, now: float, stuck_s: float) -> bool:
        """Whether a step, or the event loop, has been held up for so long."""
        is_silent = self.seen_at is not None and now - self.seen_at > stuck_s
        return is_silent or self.is_stalled(now, stuck_s)

    def count(self, chunks: Iterable[Chunk], suspended: Container[int]) -> None:
        """Count a step; chunks that stopped between two layers count when they are through."""
        self.steps += 1
        self.computed_tokens += sum(chunk.tokens for chunk in chunks if chunk.seq not in suspended)

    def show_load(self, batcher: Batcher, pool: BlockPool, *, lendable: int, is_draining: bool) -> None:
        """Write how busy the engine is."""
        self.load = EngineLoad(
            running=batcher.running,
            waiting=batcher.waiting,
            queued_tokens=batcher.queued_tokens,
            free_blocks=pool.free,
            total_blocks=pool.capacity,
            pinned_blocks=pool.pinned,
            cached_blocks=pool.cached,
            draining=is_draining,
            lendable_blocks=0 if is_draining else lendable,
        )
