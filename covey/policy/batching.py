"""First come, first served continuous batching with chunked prefill under a token budget (Orca §4, SplitFuse)."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from covey.errors import Overloaded


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLimits:
    """Bounds of a batch. Raises ValueError when a full batch of decoding sequences would leave prefill no token."""

    max_tokens: int = 512
    """New tokens a step, decoding and prefilling together."""
    max_running: int = 64
    """Sequences that hold blocks at once."""
    queue_max: int = 256
    """Sequences that wait for room."""
    step_target_s: float = 0.2
    """How long a step should last: prefill chunks shrink to it, because cancellation waits for a step."""
    chunk_min: int = 64
    """The prefill budget never shrinks below this many tokens: smaller ones mostly pay for reading the weights."""

    def __post_init__(self) -> None:
        if min(self.max_tokens, self.max_running, self.chunk_min) < 1 or self.queue_max < 0 or self.step_target_s <= 0:
            raise ValueError("every limit must be positive (queue_max may be 0)")
        if self.max_running >= self.max_tokens:
            raise ValueError("max_running must be less than max_tokens, or a full batch would starve prefill")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Compute `count` tokens of a sequence from position `start`; `is_last`: the next one is drawn."""

    seq: int
    start: int
    count: int
    is_last: bool


@dataclass(slots=True)
class _Running:
    computed: int
    known: int
    is_paused: bool = False


class Batcher:
    """Which sequences wait, which run, and what the next step computes.

    A sequence is submitted, admitted in order of arrival when the caller finds room for it, started once its blocks are
    there (loading them may take a while), then planned at every step until it is removed. Decoding sequences go first
    with one token each; the rest of the budget goes to prefills, oldest first. Nobody is overtaken while waiting.
    """

    def __init__(self, limits: BatchLimits) -> None:
        self.limits = limits
        self._waiting: dict[int, int] = {}
        self._admitted: dict[int, int] = {}
        self._running: dict[int, _Running] = {}
        self._s_per_token = 0.0

    @property
    def waiting(self) -> int:
        """Sequences without room."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Sequences with room, started or not."""
        return len(self._admitted) + len(self._running)

    @property
    def queued_tokens(self) -> int:
        """Tokens that must still be computed before every sequence here decodes."""
        ahead = sum(self._waiting.values()) + sum(self._admitted.values())
        return ahead + sum(r.known - r.computed for r in self._running.values() if r.known - r.computed > 1)

    def submit(self, seq: int, tokens: int) -> None:
        """Put a sequence of `tokens` known tokens at the end of the queue. Raises Overloaded when the queue is full."""
        if len(self._waiting) >= self.limits.queue_max and self._waiting:
            raise Overloaded("the worker's queue is full", retry_after_ms=self.retry_after_ms())
        self._waiting[seq] = tokens

    def retry_after_ms(self) -> int:
        """A guess at when there is room again: the time that the queued tokens take."""
        return min(10_000, max(100, round(1000 * self.queued_tokens * (self._s_per_token or 0.001))))

    def admit(self, find_room: Callable[[int], bool]) -> tuple[int, ...]:
        """Admit waiting sequences in order for as long as `find_room` gives them their blocks."""
        admitted = []
        for seq, tokens in tuple(self._waiting.items()):
            if self.running >= self.limits.max_running or not find_room(seq):
                break
            del self._waiting[seq]
            self._admitted[seq] = tokens
            admitted.append(seq)
        return tuple(admitted)

    def start(self, seq: int, *, computed: int, known: int) -> None:
        """Let an admitted sequence run: `computed` of its `known` tokens are in its blocks."""
        assert 0 <= computed < known, "a token is left to compute, or none could be drawn"
        del self._admitted[seq]
        self._running[seq] = _Running(computed, known)

    def pause(self, seq: int, *, is_paused: bool) -> None:
        """Leave a running sequence out of the batch, or take it in again."""
        self._running[seq].is_paused = is_paused

    def remove(self, seq: int) -> None:
        """Forget a sequence, wherever it is; without effect when it is not here."""
        self._waiting.pop(seq, None)
        self._admitted.pop(seq, None)
        self._running.pop(seq, None)

    def plan(self) -> tuple[Chunk, ...]:
        """What the next step computes: each sequence at most once, within the budget; empty when nothing can run."""
        chunks = []
        prefills = []
        for seq, state in self._running.items():
            if state.is_paused:
                continue
            if state.known - state.computed > 1:
                prefills.append((seq, state))
            else:
                chunks.append(Chunk(seq=seq, start=state.computed, count=1, is_last=True))
        budget = min(self.limits.max_tokens - len(chunks), self._prefill_budget(len(chunks)))
        for seq, state in prefills:
            if budget <= 0:
                break
            left = state.known - state.computed
            count = min(left, budget)
            chunks.append(Chunk(seq=seq, start=state.computed, count=count, is_last=count == left))
            budget -= count
        return tuple(chunks)

    def apply(self, plan: tuple[Chunk, ...], sampled: Collection[int], elapsed_s: float) -> None:
        """Book a finished step: `sampled` sequences have one more known token; others that ended were removed."""
        for chunk in plan:
            state = self._running.get(chunk.seq)
            if state is None:
                continue
            state.computed = chunk.start + chunk.count
            if chunk.seq in sampled:
                state.known += 1
        tokens = sum(chunk.count for chunk in plan)
        if tokens >= self.limits.chunk_min:  # smaller steps cost what reading the weights costs, not what tokens cost
            per_token = elapsed_s / tokens
            self._s_per_token = per_token if not self._s_per_token else 0.7 * self._s_per_token + 0.3 * per_token

    def check(self) -> None:
        """Assert the batcher's invariants."""
        places = [*self._waiting, *self._admitted, *self._running]
        assert len(places) == len(set(places)), "a sequence is in two places"
        assert len(self._waiting) <= max(1, self.limits.queue_max)
        assert self.running <= self.limits.max_running
        assert all(0 <= r.computed <= r.known for r in self._running.values())

    def _prefill_budget(self, decoding: int) -> int:
        if not self._s_per_token:
            return max(self.limits.chunk_min, min(64, self.limits.max_tokens))
        fits = int(self.limits.step_target_s / self._s_per_token) - decoding
        return max(self.limits.chunk_min, fits)
